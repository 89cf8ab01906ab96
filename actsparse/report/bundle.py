"""plotly.js as the pages carry it: the cartesian bundle, shipped with the package, checked before use."""

import base64
import gzip
import hashlib
from functools import cache
from importlib.resources import files

from actsparse.errors import ActsparseError

VERSION = "4.1.1"
SHA256 = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
_FILE = "plotly-cartesian.min.js.gz"
_BODY, _EXPORT = '"use strict";var Plotly=(()=>{', "window.Plotly = Plotly;"


@cache
def plotly_js() -> str:
    """The bundle's source; raises ActsparseError where the installed file is not the one that was shipped."""
    packed = files("actsparse.report").joinpath("vendor").joinpath(_FILE).read_bytes()
    try:
        source = gzip.decompress(packed)
    except (OSError, EOFError) as error:
        raise _damaged(str(error)) from None
    if hashlib.sha256(source).hexdigest() != SHA256:
        raise _damaged("its content is not what was shipped")
    return source.decode()


@cache
def compressed_plotly() -> str:
    """The bundle without its wrapper, gzipped, as base64."""
    return base64.b64encode(gzip.compress(unwrapped(plotly_js()).encode(), compresslevel=9, mtime=0)).decode()


def unwrapped(source: str) -> str:
    """The bundle without its module wrapper, which makes browsers parse all of it twice (a third of the start-up).

    A bundle of another form stays as it is.
    """
    start, end = source.find(_BODY), source.rfind(_EXPORT)
    head = source.find("*/") + 2
    if not 0 < head < start < end:
        return source
    return f"{source[:head]}\n{source[start:end]}{_EXPORT}"


def _damaged(why: str) -> ActsparseError:
    return ActsparseError(
        f"the plotly.js of this installation is damaged: {why}", "reinstall: pip install --force-reinstall actsparse"
    )
