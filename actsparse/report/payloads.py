"""What a page carries of its figures: plotly's JSON and the numbers, compressed together, and what is left out of them.

All figures are one gzip stream in base64: its first line lists their names, each further line is the JSON of one.
"""

import base64
import gzip
import json
import math
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup

from actsparse.report.economy import Economy, places
from actsparse.report.looks import Looks
from actsparse.report.view import FigureView
from actsparse.report.wording import clean

DIGITS = 6
Drawing = dict[str, Any]


def drawing(figure: FigureView, looks: Looks) -> Drawing:
    """The figure drawn: plotly's `data` and `layout` as plain JSON values."""
    from plotly.io.json import to_json_plotly

    drawn = figure.row.draw(figure.frame, looks).to_plotly_json()
    return {part: json.loads(str(to_json_plotly(drawn[part], engine="json"))) for part in ("data", "layout")}


def payload(figure: FigureView, drawn: Drawing, economy: Economy) -> dict[str, Any]:
    """Name, drawing and numbers of a figure, no more of each than the economy allows; `rows` counts all numbers."""
    data, layout = economy.thinned(drawn["data"], drawn["layout"])
    frame = figure.frame
    kept = frame[places(frame.height, economy.rows).tolist()] if frame.height > economy.rows else frame
    return {
        "name": figure.id,
        "data": data,
        "layout": _shortened(layout),
        "columns": columns(kept),
        "rows": frame.height,
    }


def _shortened(layout: Drawing) -> Drawing:
    """The layout with the numbers of its menu rounded."""
    meta = layout.get("meta") or {}
    if "variants" not in meta:
        return layout
    return {**layout, "meta": {**meta, "variants": rounded(meta["variants"])}}


def packed(payloads: list[dict[str, Any]]) -> Markup:
    """All figures of a page in one compressed text."""
    lines = [[one["name"] for one in payloads], *payloads]
    text = "\n".join(json.dumps(finite(line), separators=(",", ":"), allow_nan=False) for line in lines)
    return Markup(base64.b64encode(gzip.compress(text.encode("utf-8", errors="replace"), mtime=0)).decode())


def unpacked(text: str) -> dict[str, dict[str, Any]]:
    """The figures of a packed text by name, as the page reads them."""
    names, *rest = gzip.decompress(base64.b64decode(text)).decode().split("\n")
    return dict(zip(json.loads(names), map(json.loads, rest), strict=True))


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: no `<`, no line separators, no NaN."""
    text = json.dumps(finite(value), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def columns(frame: pl.DataFrame) -> dict[str, list[Any]]:
    """A frame's columns as lists, numbers rounded, text cleaned: the CSV of a figure."""
    return {name: [rounded(value) for value in frame[name].to_list()] for name in frame.columns}


def rounded(value: Any) -> Any:
    """Floats to six digits (not finite: None), text cleaned, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return value if "bdata" in value else {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple, np.ndarray)) else value


def finite(value: Any) -> Any:
    """The value with NaN and infinities as null, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    return [finite(part) for part in value] if isinstance(value, (list, tuple)) else value
