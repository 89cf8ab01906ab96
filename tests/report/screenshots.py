"""Pictures of a report for the documentation: `python tests/report/screenshots.py report.html docs/images`."""

import sys
import tempfile
from pathlib import Path

from chromium import Page, browser, find_chromium

LARGEST = 300_000
TOPS = (("report", 1280, 900, False), ("report-dark", 1280, 900, True), ("report-phone", 390, 844, False))
SECTIONS = ("frontier", "compare", "mechanisms", "cost", "gain", "studies")


def take(report: Path, folder: Path) -> list[Path]:
    """The pictures written: the top of the page, light, dark and on a phone, and the first screen of each section.

    Stops where a picture is over 300 kB.
    """
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("there is no Chromium here: apt-get install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, browser(chromium, Path(profile)) as page:
        written = []
        for name, width, height, dark in TOPS:
            page.open(report, width=width, height=height, dark=dark, every=False)
            written.append(_shoot(page, folder / f"{name}.png"))
        page.open(report, width=1280, height=900)
        for section in SECTIONS:
            if page.evaluate(f"document.querySelector('#{section} figure') !== null"):
                page.evaluate(f"document.getElementById('{section}').scrollIntoView({{behavior: 'instant'}})")
                written.append(_shoot(page, folder / f"report-{section}.png"))
    return written


def _shoot(page: Page, path: Path) -> Path:
    page.screenshot(path, full=False)
    if path.stat().st_size > LARGEST:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}")
    return path


if __name__ == "__main__":
    for picture in take(Path(sys.argv[1]), Path(sys.argv[2])):
        print(picture)
