import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.allocate import Curve, by_sensitivity, greedy


def plain_greedy(weights, target, error, step, most=0.99):
    """Every candidate measured at every step."""
    held = [w / sum(weights) for w in weights]
    shares, spent = [0.0] * len(held), 0.0
    while spent < target - 1e-12:
        amount = min(step, target - spent)
        tried = []
        for part, weight in enumerate(held):
            raised = min(most, shares[part] + amount / weight)
            if raised > shares[part]:
                tried.append((error((*shares[:part], raised, *shares[part + 1 :])), part, raised))
        _, part, raised = min(tried)
        spent += (raised - shares[part]) * held[part]
        shares[part] = raised
    return shares


def convex(costs):
    return lambda shares: sum(cost * share**2 for cost, share in zip(costs, shares, strict=True)) ** 0.5


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    weights=st.lists(st.floats(0.2, 10), min_size=2, max_size=7),
    target=st.floats(0.05, 0.9),
    data=st.data(),
)
def test_greedy_meets_the_budget(weights, target, data):
    costs = data.draw(st.lists(st.floats(0.1, 10), min_size=len(weights), max_size=len(weights)))
    shares = greedy(weights, target, convex(costs), step=0.02)
    spent = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    assert spent == pytest.approx(target, abs=1e-9)
    assert all(0 <= share <= 0.99 for share in shares)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
def test_greedy_takes_the_steps_of_a_plain_search_where_errors_add_up(target):
    weights, costs = [1.0, 1.0, 3.0, 4.0], [5.0, 1.0, 2.0, 0.7]

    def error(shares):
        return sum(cost * share**2 for cost, share in zip(costs, shares, strict=True))

    assert greedy(weights, target, error, step=0.02) == pytest.approx(plain_greedy(weights, target, error, 0.02))


def test_a_step_is_an_equal_share_of_all_weights():
    # the part of 9 tenths costs nothing: it is raised alone, by step / 0.9 of itself at a time
    seen = []

    def error(shares):
        seen.append(shares)
        return shares[0]

    assert greedy([1.0, 9.0], 0.09, error, step=0.03) == pytest.approx((0.0, 0.1))
    assert (0.0, pytest.approx(0.03 / 0.9)) in seen
    assert (pytest.approx(0.3), 0.0) in seen


def test_sensitivity_is_the_optimum_of_convex_curves():
    levels = tuple(i / 100 for i in range(100))
    costs = [1.0, 4.0, 0.25]
    curves = [Curve(levels, tuple(cost**0.5 * s for s in levels)) for cost in costs]
    shares = by_sensitivity([1.0, 1.0, 1.0], 0.3, curves)
    # sum cost * s^2 is least where cost * s is equal: s proportional to 1 / cost
    total = sum(1 / cost for cost in costs)
    assert shares == pytest.approx([0.9 / cost / total for cost in costs], abs=0.02)
    assert sum(shares) / 3 == pytest.approx(0.3)


def test_sensitivity_weighs_parts_and_flattens_curves_that_are_not_convex():
    # a jump that costs at once and then nothing more is taken whole or not at all
    jump = Curve((0.0, 0.5, 0.9), (0.0, 1.0, 1.0))
    smooth = Curve((0.0, 0.5, 0.9), (0.0, 0.1, 0.4))
    assert by_sensitivity([1.0, 1.0], 0.25, [jump, smooth]) == pytest.approx((0.0, 0.5))
    shares = by_sensitivity([3.0, 1.0], 0.5, [smooth, smooth])
    assert (3 * shares[0] + shares[1]) / 4 == pytest.approx(0.5)
