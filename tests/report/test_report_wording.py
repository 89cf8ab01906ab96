"""Numbers as they are read, and outside text made harmless."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actsparse.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (22.509, "22.5"),
        (88.5, "88.5"),
        (20000.0, "20\u202f000"),
        (3.0e5, "3.0 × 10⁵"),
        (0.00012, "1.2 × 10⁻⁴"),
        (-0.5, "\u22120.500"),
        (0.0, "0"),
        (math.inf, "∞"),
        (math.nan, "\u2013"),
        (None, "\u2013"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("increase", "text"),
    [(0.316, "+31.6\u202f%"), (2.93, "+293\u202f%"), (887.9, "889×"), (-0.01, "\u22121.0\u202f%"), (math.inf, "∞")],
)
def test_change(increase: float, text: str) -> None:
    assert wording.change(increase) == text


def test_between_is_empty_where_an_end_is_unknown() -> None:
    assert wording.between(1.27, 1.35) == "1.27\u20131.35"
    assert wording.between(None, 1.35) == ""
    assert wording.between(math.nan, 1.35) == ""


def test_control_and_direction_characters_become_visible() -> None:
    assert wording.clean("\x1b[31m\u202egnp\x7f\x9b") == "␛[31m⟨U+202E⟩gnp␡⟨U+009B⟩"
    assert wording.clean("a\tb\nc") == "a\tb\nc"


@given(st.text())
def test_clean_text_holds_nothing_a_terminal_obeys(text: str) -> None:
    cleaned = wording.clean(text)
    assert all(c.isprintable() or c in "\n\t\u00a0\u202f" for c in cleaned)
    assert wording.clean(cleaned) == cleaned


def test_one_line_keeps_the_narrow_space_between_thousands() -> None:
    assert wording.one_line("n =\n 2\u202f032 ") == "n = 2\u202f032"


def test_listed() -> None:
    assert wording.listed(["a"]) == "a"
    assert wording.listed(["a", "b", "c"]) == "a, b and c"
    assert wording.listed([]) == ""
