"""The figures of the report by section: the rows of the `*_rows.py` files."""

from actsparse.report import compare_rows, eval_rows, mechanism_rows, profile_rows
from actsparse.report.rows import Row

SECTIONS = {
    "frontier": "What can be had at once",
    "compare": "Models side by side",
    "sparse": "Where it is sparse",
    "neurons": "Which neurons and heads",
    "mechanisms": "What decides: token, history or habit",
    "cost": "What it costs",
    "gain": "What it buys",
}
ROWS: tuple[Row, ...] = (*compare_rows.ROWS, *profile_rows.ROWS, *mechanism_rows.ROWS, *eval_rows.ROWS)
