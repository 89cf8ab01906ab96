"""What the fuzz tests share: how many examples, JSON of any shape, and mutations of valid documents and files."""

import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from actsparse.errors import ActsparseError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""Examples a test; 0: the few of `make test`, always the same ones. `make soak` asks for more, and for others."""


def fuzzed(examples: int) -> settings:
    """Settings of a fuzz test that tries `examples` inputs in `make test`."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


SCALARS = (
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=12)
    | st.sampled_from(["", "\x1b[31m", "../x", "\ud800", "9" * 5000, "nan", "1e999", "²", "\u202e"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every node of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def changed(tree: Any, place: tuple[Any, ...], value: Any, *, remove: bool = False) -> Any:
    """The tree with one node replaced or removed."""
    if not place:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if len(place) == 1 and remove:
        del copy[place[0]]
    else:
        copy[place[0]] = changed(copy[place[0]], place[1:], value, remove=remove)
    return copy


@st.composite
def mutated_json(draw: st.DrawFn, document: Any) -> bytes:
    """A valid document with one to three nodes replaced or removed."""
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(document)[1:] or [()]))
        document = changed(document, place, draw(VALUES), remove=draw(st.booleans()))
    return json.dumps(document).encode("utf-8", "surrogatepass")


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A valid file cut short, with bytes flipped, or with bytes put in between."""
    copy = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(copy) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "flip", "insert", "zeros", "ones"]))
        if kind == "cut":
            del copy[at:]
        elif kind == "insert":
            copy[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "flip" and copy:
            copy[at] ^= 1 << draw(st.integers(0, 7))
        else:
            width = len(copy[at : at + 8])
            copy[at : at + 8] = (b"\0" if kind == "zeros" else b"\xff") * width
    return bytes(copy)


def only_ours(parse: Callable[..., Any], *given_to: Any) -> Any:
    """What a parser makes of its input, or None where it raises an error of ours that says what and what to do."""
    found = None
    try:
        found = parse(*given_to)
    except ActsparseError as error:
        if not (error.what and error.hint):
            raise RuntimeError("an error without a hint") from error
    return found
