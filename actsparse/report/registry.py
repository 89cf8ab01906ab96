"""The figures of the report by section: the rows of `profile_rows.py`, `mechanism_rows.py` and `eval_rows.py`."""

from actsparse.report import eval_rows, mechanism_rows, profile_rows
from actsparse.report.rows import Row

SECTIONS = {
    "frontier": "What can be had at once",
    "sparse": "Where it is sparse",
    "neurons": "Which neurons and heads",
    "mechanisms": "What decides: token, history or habit",
    "cost": "What it costs",
    "gain": "What it buys",
}
ROWS: tuple[Row, ...] = (*profile_rows.ROWS, *mechanism_rows.ROWS, *eval_rows.ROWS)
