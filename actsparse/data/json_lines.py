"""One line of a JSON-lines file, bounded in size and depth."""

import json
from typing import Any

from actsparse.errors import DataError

LONGEST_LINE = 64 * 2**20


def parse_line(line: str, where: str) -> Any:
    """What a line says; raises DataError naming `where` it stands where it is no JSON, too long, or too deep."""
    if len(line) > LONGEST_LINE:
        raise DataError(f"{where} is {len(line):,} characters long", "write one JSON object a line")
    try:
        return json.loads(line)
    # a number of thousands of digits is a ValueError
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}", "write one JSON object a line") from None


def check_text(text: str, where: str) -> None:
    """Raise DataError where a text cannot be encoded: a JSON escape may stand for half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half of a surrogate pair, which is no text", "correct the escape") from None
