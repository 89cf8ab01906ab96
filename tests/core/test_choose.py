from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.choose import Option, cheapest, pareto

tenths = st.integers(0, 100).map(lambda n: n / 10)
points = st.tuples(tenths, tenths)
parts_of = st.lists(st.lists(points, min_size=1, max_size=3), min_size=1, max_size=4)


def options(pairs):
    return [Option(0.0, 0.0, "nothing"), *(Option(saved, cost, i) for i, (saved, cost) in enumerate(pairs))]


@settings(deadline=None, derandomize=True)
@given(pairs=st.lists(points, min_size=1, max_size=12))
def test_pareto_keeps_what_no_other_beats(pairs):
    kept = pareto(options(pairs))
    assert [one.saved for one in kept] == sorted(one.saved for one in kept)
    assert [one.cost for one in kept] == sorted(one.cost for one in kept)
    for one in options(pairs):
        assert any(best.saved >= one.saved and best.cost <= one.cost for best in kept)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(parts=parts_of, share=st.floats(0.05, 0.95))
def test_the_target_is_met_and_no_cheaper_choice_saves_as_much_for_its_price(parts, share):
    parts = [options(pairs) for pairs in parts]
    reachable = sum(max(one.saved for one in part) for part in parts)
    target = share * reachable
    chosen = cheapest(parts, target)
    saved, cost = sum(one.saved for one in chosen), sum(one.cost for one in chosen)
    assert saved >= target - 1e-6
    best = min(sum(one.cost for one in mix) for mix in product(*parts) if sum(one.saved for one in mix) >= saved - 1e-9)
    # exact where the price decides; within the dearest option where the last part changes over
    assert cost <= best + max(one.cost for part in parts for one in part) + 1e-6


def test_parts_are_filled_in_the_order_of_cost_per_byte():
    cheap = [Option(0.0, 0.0, "no"), Option(4.0, 1.0, "half"), Option(8.0, 10.0, "all")]
    dear = [Option(0.0, 0.0, "no"), Option(4.0, 4.0, "half"), Option(8.0, 20.0, "all")]
    assert [one.choice for one in cheapest([cheap, dear], 4.0)] == ["half", "no"]
    assert [one.choice for one in cheapest([cheap, dear], 8.0)] == ["half", "half"]
    assert [one.choice for one in cheapest([cheap, dear], 12.0)] == ["all", "half"]


def test_what_cannot_be_reached_gives_the_most():
    part = [Option(0.0, 0.0, "no"), Option(2.0, 5.0, "all")]
    chosen = cheapest([part, part], 10.0)
    assert sum(one.saved for one in chosen) == pytest.approx(4.0)
