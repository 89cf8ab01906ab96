"""A written page, opened or named so that a terminal can open it."""

import webbrowser
from pathlib import Path

from actsparse.cli.output import Output


def show_page(written: Path, output: Output, *, open_it: bool) -> None:
    """Where the page can be clicked on; with `open_it` in a browser, if there is one."""
    address = written.resolve().as_uri()
    if not open_it:
        output.note(f"open {address}")
    elif not webbrowser.open(address):
        output.note(f"no browser could be started here: open {address}")
