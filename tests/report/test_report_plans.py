"""Short forms read, and one look a plan everywhere."""

import pytest

from actsparse.report.looks import PLAN_COLOURS, looks_of
from actsparse.report.plans import Role, parse_plan


@pytest.mark.parametrize(
    ("plan", "method", "role", "amount", "title"),
    [
        ("dense", "dense", Role.DENSE, None, "Dense"),
        ("griffin@0.5", "griffin", Role.METHOD, 0.5, "GRIFFIN at 50\u202f% of neurons"),
        ("tda:target_error=0.2", "tda", Role.METHOD, None, "TDA at an error of 0.2"),
        ("static:stat=griffin@0.5", "static", Role.STATIC, 0.5,
         "Static mask by GRIFFIN's statistic at 50\u202f% of neurons"),
        ("random@0.25", "random", Role.RANDOM, 0.25, "Random mask at 25\u202f% of neurons"),
        ("teal@0.4", "teal", Role.METHOD, 0.4, "TEAL at 40\u202f% of input channels"),
        ("static:stat=griffin,source=n@0.5", "static", Role.STATIC, 0.5,
         "Static mask by GRIFFIN's statistic, source n at 50\u202f% of neurons"),
        ("channels-static@0.5", "channels-static", Role.STATIC, 0.5,
         "Static mask by mean |x|·‖w‖ at 50\u202f% of input channels"),
        ("channels-random@0.5", "channels-random", Role.RANDOM, 0.5, "Random mask at 50\u202f% of input channels"),
        ("heads-static:policy=drop@0.5", "heads-static", Role.STATIC, 0.5,
         "Static mask by mean output norm, policy drop at 50\u202f% of KV groups"),
        ("heads-random@0.5", "heads-random", Role.RANDOM, 0.5, "Random mask at 50\u202f% of KV groups"),
        ("auto@0.25", "auto", Role.METHOD, 0.25, "auto at 25\u202f% of the model's bytes"),
        ("oracle-a@0.5", "oracle-a", Role.ORACLE, 0.5, "Oracle by |a| at 50\u202f% of neurons"),
    ],
)  # fmt: skip
def test_short_forms(plan: str, method: str, role: Role, amount: float | None, title: str) -> None:
    name = parse_plan(plan)
    assert (name.method, name.role, name.amount, name.title) == (method, role, amount, title)


def test_a_plan_directory_takes_its_method_from_the_summary() -> None:
    name = parse_plan("runs/SmolLM2/plan-3f9c1e", "tda")
    assert (name.method, name.role) == ("tda", Role.METHOD)
    assert (name.short, name.title) == ("tda (plan-3f9c1e)", "TDA (plan-3f9c1e)")


def test_a_plan_directory_is_called_by_its_short_form_where_that_is_known() -> None:
    name = parse_plan("runs/SmolLM2/plan-3f9c1e", "tda", "tda:target_error=0.2")
    assert (name.plan, name.short) == ("runs/SmolLM2/plan-3f9c1e", "tda:target_error=0.2")
    assert name.title == "TDA at an error of 0.2"


def test_looks_tell_plans_apart_and_keep_a_series_together() -> None:
    plans = ["griffin@0.25", "griffin@0.5", "tda@0.5", "random@0.5", "static:stat=griffin@0.5"]
    looks = looks_of([parse_plan(plan) for plan in plans])
    assert looks["griffin@0.25"].colour == looks["griffin@0.5"].colour != looks["tda@0.5"].colour
    assert looks["griffin@0.25"].dash != looks["griffin@0.5"].dash
    assert looks["random@0.5"].colour not in PLAN_COLOURS
    assert [looks[plan].baseline for plan in plans] == [False, False, False, True, True]


def test_series_beyond_the_colours_differ_by_dash_and_symbol() -> None:
    names = [f"method{place}@0.5" for place in range(2 * len(PLAN_COLOURS))]
    looks = looks_of([parse_plan(name) for name in names])
    assert len({(looks[name].colour, looks[name].dash, looks[name].symbol) for name in names}) == len(names)
