"""Choices on the GPU, against the reference: the largest, routers' scores, and lists of what they keep."""

import pytest
import torch

from actsparse.engine.cuda.launcher import Norm
from actsparse.engine.cuda.sums import to_sums
from actsparse.engine.step import gate_step, reference
from actsparse.engine.step.plans import Selection
from actsparse.engine.step.work import Chosen

pytestmark = pytest.mark.gpu
SIZES = (33, 577, 4096, 11008, 28672)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def kept_by(operators, score, top, neurons, **groups):
    """The list and the mask that `choose` makes, poisoned before."""
    index, count, mask = ints(*[-7] * neurons), ints(-7), ints(*[-7] * neurons)
    operators.choose(Selection(index=index, count=count), score, top, **groups)
    operators.choose(mask, score, top, **groups)
    found = torch.zeros(neurons, dtype=torch.bool, device="cuda")
    found[index[: count.item()].long()] = True
    assert (index[: count.item()].diff() > 0).all(), "the list does not ascend"
    assert (index[count.item() :] == -7).all(), "the list goes on past its count"
    assert torch.equal(found, mask == 1)
    assert ((mask == 0) | (mask == 1)).all()
    return found


def wanted(score, top, neurons, **groups):
    router = Chosen(second=score[:, None], top=top, site=None, **groups)
    return gate_step.chosen(router, 0, {(None, 0): score.new_ones(1, 1)}, neurons)[0]


@pytest.mark.parametrize("inputs", SIZES)
def test_the_threshold_lies_between_the_largest_and_the_rest(operators, draw, poisoned, inputs):
    for share in (0.01, 0.25, 0.5, 0.9):
        x, score, top = draw(inputs, scale=3.0), draw(3, inputs).abs(), max(1, int(share * inputs))
        tops = (top, max(1, top // 2), inputs - 1)
        found = poisoned(3)
        operators.top(found, x, tops, score=score)
        size = x.abs() * score
        assert [(one >= t).sum().item() for one, t in zip(size, found, strict=True)] == list(tops)
        want = torch.cat([reference.top_threshold(one, n) for one, n in zip(size, tops, strict=True)])
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        one = poisoned(1)
        operators.top(one, to_sums(x), (top,))
        assert (x.abs() >= one).sum() == top


def test_the_largest_of_normed_and_of_gated_values(operators, draw, poisoned):
    x, up, norm = draw(4096), draw(4096), Norm(1 + draw(4096, scale=0.1), 1e-5)
    found = poisoned(1)
    for values in (x, to_sums(x)):
        operators.top(found, values, (1000,), norm=norm)
        want = reference.top_threshold(reference.rms_norm(x, norm.weight, norm.epsilon).abs(), 1000)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        other = to_sums(up) if values.dtype == torch.int64 else up
        operators.top(found, values, (1000,), up=other, activation="silu")
        want = reference.top_threshold((reference.activate(x, "silu") * up).abs(), 1000)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=0)


def test_equals_at_the_edge_are_all_kept(operators, draw, poisoned):
    x = draw(1000).clamp(-1.5, 1.5)
    for top in (1, 50, 100, 999):
        found = poisoned(1)
        operators.top(found, x, (top,))
        assert torch.equal(x.abs() >= found, x.abs() >= reference.top_threshold(x.abs(), top))
    zeros = torch.zeros(1000, device="cuda")
    operators.top(found, zeros, (10,))
    assert found == 0


@pytest.mark.parametrize("count", [1, 40, 900])
def test_what_is_no_number_takes_a_place_among_the_largest_and_is_not_lost(operators, draw, poisoned, count):
    x, rows, found = draw(1000), draw(1000, 264, dtype=torch.bfloat16), poisoned(1)
    lost = torch.randperm(1000, device="cuda")[:count]
    x[lost] = torch.nan
    operators.top(found, x, (100,))
    out = poisoned(264)
    operators.columns(out, x, rows, threshold=found, keeps_nan=True)
    assert out.isnan().all()
    rows[lost], x[lost] = 0.0, 1e9  # as large, but counting nothing
    if count < 100:
        want = torch.where(x.abs() >= reference.top_threshold(x.abs(), 100), x, 0.0).double() @ rows.double()
        operators.columns(out, x, rows, threshold=found, keeps_nan=True)
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
    x[lost] = torch.nan
    dropped = poisoned(264)
    operators.columns(dropped, x, rows, threshold=torch.ones(1, device="cuda"))
    assert dropped.isfinite().all(), "under a threshold what is no number is dropped"


@pytest.mark.parametrize(("rows", "width"), [(11008, 128), (1, 7), (1001, 577), (256, 4096)])
def test_scores_of_a_router(operators, draw, poisoned, assert_near, rows, width):
    weight, x, norm, out = draw(rows, width), draw(width), Norm(1 + draw(width, scale=0.1), 1e-5), poisoned(rows)
    operators.scores(out, x, weight)
    assert_near(out, weight.double() @ x.double(), limit=1e-5)
    for values in (x, to_sums(x)):
        operators.scores(out, values, weight, norm=norm, tanh=True)
        want = torch.tanh(weight.double() @ reference.rms_norm(x.double(), norm.weight.double(), norm.epsilon))
        assert_near(out, want, limit=1e-5)


@pytest.mark.parametrize("units", [1, 8, *SIZES])
def test_the_units_of_largest_score_are_listed(operators, draw, units):
    for top in (0, 1, units // 3, units - 1, units, units + 5):
        for score in (draw(units), draw(units).round(), torch.zeros(units, device="cuda")):
            assert torch.equal(kept_by(operators, score, top, units), wanted(score, top, units))


def test_groups_of_neurons_are_listed_with_those_that_always_are(operators, draw):
    neurons = 1000
    members = torch.randperm(neurons, device="cuda")[:960].view(-1, 8)
    members = torch.cat([members, torch.full((120, 1), -1, device="cuda")], dim=1).int()
    sizes = torch.randint(1, 9, (120,), dtype=torch.int32, device="cuda")
    always = (torch.rand(neurons, device="cuda") < 0.1).to(torch.uint8)
    for score in (draw(120), draw(120).round()):
        for top in (0, 1, 300, 5000):
            for groups in (
                {"members": members, "sizes": sizes},
                {"members": members, "sizes": sizes, "always": always},
                {"members": members},
            ):
                top = min(top, 120) if "sizes" not in groups else top
                assert torch.equal(
                    kept_by(operators, score, top, neurons, **groups), wanted(score, top, neurons, **groups)
                )
    score = draw(neurons)
    found = kept_by(operators, score, 100, neurons, always=always)
    assert torch.equal(found, wanted(score, 100, neurons, always=always))


def test_gate_and_up_are_merged(operators, draw, poisoned, assert_near):
    gate, up, out = draw(1401), draw(1401), poisoned(1401)
    operators.merge(out, gate, up, "gelu")
    assert_near(out, reference.activate(gate.double(), "gelu") * up)
