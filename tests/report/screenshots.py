"""Pictures of a report for the documentation: `python tests/report/screenshots.py report.html docs/images`."""

import sys
import tempfile
from pathlib import Path

from chromium import browser, find_chromium

SECTIONS = ("frontier", "plans", "sparse", "neurons", "cost", "gain", "samples")


def take(report: Path, folder: Path) -> list[Path]:
    """The pictures written: the top of the page, light, dark and on a phone, and the first screen of each section."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("there is no Chromium here: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(chromium, Path(profile)) as page:
        written = []
        for name, width, dark in (("summary", 1280, False), ("summary-dark", 1280, True), ("phone", 390, False)):
            page.open(report, width=width, height=860, dark=dark)
            written.append(folder / f"report-{name}.png")
            page.screenshot(written[-1], full=False)
        page.open(report, width=1280, height=860)
        for section in SECTIONS:
            if page.evaluate(f"document.getElementById('{section}') !== null"):
                page.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
                written.append(folder / f"report-{section}.png")
                page.screenshot(written[-1], full=False)
    return written


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
