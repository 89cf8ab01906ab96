"""docs/cli.md names the options that commands have, and the documentation names no others."""

import re
from pathlib import Path

import pytest
import typer

from actsparse.cli.app import COMMANDS, app, main

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
OPTION = re.compile(r"--[a-z][a-z0-9-]*")
ANOTHERS = {
    "--nproc-per-node",  # torchrun
    "--repo-type",  # hf
    "--no-deps", "--force-reinstall",  # pip
}  # fmt: skip


def options_of(name: str) -> set[str]:
    """The long options of a command, from the command itself."""
    assert main(["--version"]) == 0  # commands register themselves when one is run
    command = typer.main.get_group(app).commands[name]
    spelt = [text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)]
    return {text for text in spelt if text.startswith("--")}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_the_options_of_every_command(name: str) -> None:
    section = REFERENCE.split(f"\n## actsparse {name}\n")[1].split("\n## ")[0]
    lines = [line.lstrip("│* ") for line in section.splitlines()]
    named = {text for line in lines if line.startswith("--") for text in OPTION.findall(line[:40])}
    assert named - {"--help"} == options_of(name), "run: make cli-reference"


def test_pages_name_no_option_that_is_gone() -> None:
    known = set(OPTION.findall(REFERENCE)) | ANOTHERS
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "actsparse" / "twins" / "train").glob("*.py")]
    known |= {text for script in scripts for text in OPTION.findall(script.read_text(encoding="utf-8"))}
    gone = {
        f"{page.name}: {text}"
        for page in PAGES
        for text in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", page.read_text(encoding="utf-8"))
        if text not in known
    }
    assert gone == set()
