"""docs/errors.md holds every error message of the package, with its way out."""

import ast
import importlib.util
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[1] / "packaging" / "error_page.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("error_page", PLACE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(maker) -> None:
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: make errors"


def test_every_error_has_a_way_out(maker) -> None:
    rows = [line for line in maker.page().splitlines() if line.startswith("| ")]
    assert len(rows) > 200
    assert [row for row in rows if row.endswith("|  |")] == []


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ('RunError(f"{path} is gone", "fetch " + "it")', "<path> is gone", "fetch it"),
        ('RunError(what="a" if x else "b", hint=h)', "a / b", "<h>"),
        ("RunError(f\"one{' more' if x else ''}\")", "one[ more]", ""),
    ],
)
def test_a_message_reads_as_it_will(maker, source: str, what: str, hint: str) -> None:
    assert list(maker.messages(ast.parse(source), {"RunError"})) == [(what, hint)]
