"""The figures of the report by section: the rows of `profile_rows.py` and `eval_rows.py`."""

from actsparse.report import eval_rows, profile_rows
from actsparse.report.rows import Row

SECTIONS = {
    "frontier": "What can be had at once",
    "sparse": "Where it is sparse",
    "neurons": "Which neurons and heads",
    "cost": "What it costs",
    "gain": "What it buys",
}
ROWS: tuple[Row, ...] = (*profile_rows.ROWS, *eval_rows.ROWS)
