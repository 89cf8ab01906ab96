"""The compiled products against float64, on fresh inputs and any shape."""

import pytest
import torch

from actsparse.engine.cuda.column_products import Epilogue
from actsparse.engine.cuda.launcher import Norm, Tuning
from actsparse.engine.cuda.operators import Operators
from actsparse.engine.cuda.row_products import Caps
from actsparse.engine.cuda.sums import new_sums, to_sums, to_values
from actsparse.engine.step import reference
from actsparse.engine.step.state import Best
from actsparse.engine.step.weights import padded

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
# Rows, width: a layer's, small, odd in either, fewer rows than blocks, wider than shared memory's default.
SHAPES = ((4096, 4096), (1152, 896), (1001, 577), (67, 4096), (3, 8), (512, 14336))


def norm_for(width, draw):
    return Norm(1 + draw(width, scale=0.1), 1e-5)


def normed(x, norm):
    return reference.rms_norm(x.double(), norm.weight.double(), norm.epsilon)


def split_value(values, share):
    """A threshold that drops about `share` of |values| and lies in a wide gap, so that rounding decides nothing."""
    ranked = values.abs().flatten().double().sort().values
    at, near = int(share * (ranked.numel() - 2)), max(1, ranked.numel() // 100)
    window = ranked[max(0, at - near) : at + near + 2]
    widest = window.diff().argmax()
    return ((window[widest] + window[widest + 1]) / 2).float().reshape(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_project_and_add(operators, draw, poisoned, assert_near, dtype, rows, width):
    weight, x, bias = padded(draw(rows, width, dtype=dtype, scale=width**-0.5)), draw(width), draw(rows)
    norm, out = norm_for(width, draw), poisoned(rows)
    operators.project(out, x, weight, norm=norm, bias=bias)
    assert_near(out, weight.double() @ normed(x, norm) + bias)
    before = out.clone()
    operators.add(out, x, weight, bias=bias, scale=0.3)
    assert_near(out, before.double() + 0.3 * (weight.double() @ x.double() + bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("neurons", "width"), [(1376, 1024), (501, 577), (7, 4096)])
def test_gated(operators, draw, poisoned, assert_near, dtype, activation, neurons, width):
    gate_up, x = padded(draw(2 * neurons, width, dtype=dtype, scale=width**-0.5)), draw(width)
    norm, out, bias = norm_for(width, draw), poisoned(neurons), draw(2 * neurons)
    operators.gated(out, x, gate_up, norm=norm, activation=activation, bias=bias)
    want = reference.gated(gate_up.double(), normed(x, norm)[None], activation, bias)[0]
    assert_near(out, want)
    index = torch.randperm(neurons, device="cuda")[: neurons // 2 + 1].int()
    count = torch.tensor([neurons // 2], dtype=torch.int32, device="cuda")
    some = poisoned(index.numel())
    operators.gated(some, x, gate_up, norm=norm, activation=activation, bias=bias, index=index, count=count)
    assert_near(some[: count.item()], want[index[: count.item()].long()])
    assert some[count.item() :].isnan().all(), "rows past the count were written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
@pytest.mark.parametrize(("neurons", "width"), [(11008, 4096), (501, 577), (1536, 576)])
def test_threshold_then_kept_rows(operators, draw, poisoned, assert_near, dtype, share, neurons, width):
    gate_up, x = padded(draw(2 * neurons, width, dtype=dtype, scale=width**-0.5)), draw(width)
    gate, up = gate_up.chunk(2)
    norm, factor, out = norm_for(width, draw), poisoned(neurons), poisoned(neurons)
    exact = reference.activate(gate.double() @ normed(x, norm), "silu")
    threshold = split_value(exact, share)
    operators.threshold(factor, x, gate, threshold, norm=norm, activation="silu")
    want = reference.keep_large(exact, threshold)
    assert torch.equal(factor != 0, want != 0)
    assert_near(factor, want)
    operators.kept(out, x, up, factor, norm=norm, activation="identity")
    assert_near(out, factor.double() * (up.double() @ normed(x, norm)))
    each = threshold * torch.rand(neurons, device="cuda").add(0.5)
    each[(exact.abs() - each).abs() < 1e-4] += 1e-3
    operators.threshold(factor, x, gate, each, norm=norm, activation="silu")
    assert_near(factor, reference.keep_large(exact, each))


def test_rows_not_kept_are_not_read(device, draw, poisoned, assert_near):
    operators = Operators(device, Tuning(ahead=0))
    weight, x = draw(1024, 512, dtype=torch.bfloat16), draw(512)
    factor = draw(1024) * (torch.rand(1024, device="cuda") < 0.4)
    want = factor.double() * (weight.double() @ x.double())
    weight[factor == 0] = torch.nan
    out = poisoned(1024)
    operators.kept(out, x, weight, factor, norm=None, activation="identity")
    assert_near(out, want)
    some, rows = x * (torch.rand(512, device="cuda") < 0.4), draw(512, 1024, dtype=torch.bfloat16)
    want = some.double() @ rows.double()
    rows[some == 0] = torch.nan
    out = poisoned(1024)
    operators.columns(out, some, rows, skip_zeros=True)
    assert_near(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 11008), (11008, 4096), (577, 1001), (896, 1152), (33, 8)])
def test_columns(operators, draw, poisoned, assert_near, dtype, share, inputs, outputs):
    weight, x = padded(draw(inputs, outputs, dtype=dtype, scale=inputs**-0.5)), draw(inputs)
    bias, norm, out = draw(outputs), norm_for(inputs, draw), poisoned(outputs)
    exact = normed(x, norm)
    threshold = split_value(exact, share)
    operators.columns(out, x, weight, threshold=threshold, norm=norm, bias=bias)
    assert_near(out, reference.input_sparse(weight.double(), exact[None], threshold, bias=bias)[0])
    again = poisoned(outputs)
    operators.columns(again, x, weight, threshold=threshold, norm=norm, bias=bias)
    assert torch.equal(out, again), "two runs differ"
    for epilogue in (Epilogue.ADD, Epilogue.ATOMIC_ADD):
        residual = draw(outputs)
        want = residual.double() + 0.5 * reference.input_sparse(weight.double(), exact[None], threshold)[0]
        operators.columns(residual, x, weight, threshold=threshold, norm=norm, epilogue=epilogue, scale=0.5)
        assert_near(residual, want)


def test_long_shares_of_a_block(device, draw, poisoned, assert_near):
    tuned = Operators(device, Tuning(max_slices=1))
    weight, x, out = draw(17000, 264, dtype=torch.bfloat16, scale=0.01), draw(17000), poisoned(264)
    threshold = split_value(x, 0.3)
    want = reference.input_sparse(weight.double(), x[None].double(), threshold)[0]
    tuned.columns(out, x, weight, threshold=threshold)
    assert_near(out, want)
    count = torch.tensor([16001], dtype=torch.int32, device="cuda")
    tuned.columns(out, x, weight, count=count)
    assert_near(out, x[:16001].double() @ weight[:16001].double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_with_scores_segments_and_a_gate(operators, draw, poisoned, assert_near, dtype):
    inputs, segments = 896, (896, 128, 128)
    weight, x, up = draw(inputs, sum(segments), dtype=dtype, scale=inputs**-0.5), draw(inputs), draw(inputs)
    score = draw(3, inputs).abs()
    exact = reference.activate(x.double(), "silu") * up
    thresholds = torch.cat([split_value(exact * one, share) for one, share in zip(score, (0.2, 0.5, 0.8), strict=True)])
    out = poisoned(sum(segments))
    operators.columns(out, x, weight, threshold=thresholds, segments=segments, score=score, up=up, activation="silu")
    parts = zip(weight.double().split(segments, dim=1), thresholds, score, strict=True)
    assert_near(out, torch.cat([reference.input_sparse(part, exact[None], t, one)[0] for part, t, one in parts]))


@pytest.mark.parametrize("live", [0, 1, 300, 640])
def test_columns_read_only_the_live_rows(operators, draw, poisoned, assert_near, live):
    weight, x = draw(640, 1024, dtype=torch.bfloat16), draw(640)
    index = torch.randperm(640, device="cuda").int()
    want = x[:live].double() @ weight[index[:live].long()].double()
    weight[index[live:].long()] = torch.nan
    count, out = torch.tensor([live], dtype=torch.int32, device="cuda"), poisoned(1024)
    operators.columns(out, x, weight, index=index, count=count)
    if live == 0:
        assert (out == 0).all()
    else:
        assert_near(out, want)


def test_the_best_row_is_the_first_of_the_largest(operators, draw, poisoned):
    weight, x = draw(32001, 512, dtype=torch.bfloat16), draw(512)
    norm = norm_for(512, draw)
    best = Best(poisoned(1, operators.blocks), torch.zeros(1, operators.blocks, dtype=torch.int32, device="cuda"))
    logits = poisoned(32001)
    operators.head(logits, best, x, weight, norm=norm)
    winner = best.row[best.value == best.value.max()].min()
    assert winner == logits.argmax()
    weight[31000] = weight[winner.item()]
    operators.head(logits, best, x, weight, norm=norm)
    assert best.row[best.value == best.value.max()].min() == winner


def test_logits_are_scaled_and_capped(operators, draw, poisoned, assert_near):
    weight, x, norm = draw(1003, 512, dtype=torch.bfloat16), draw(512), norm_for(512, draw)
    best = Best(poisoned(1, operators.blocks), torch.zeros(1, operators.blocks, dtype=torch.int32, device="cuda"))
    logits = poisoned(1003)
    operators.head(logits, best, x, weight, norm=norm, caps=Caps(scale=0.25, cap=3.0))
    want = reference.soft_cap((weight.double() @ normed(x, norm)) * 0.25, 3.0)
    assert_near(logits, want)
    assert_near(best.value.max(), want.max())


def test_a_branch_is_normed_before_it_is_added(operators, draw, poisoned, assert_near):
    for width in (896, 2304, 577):
        hidden, branch, norm, squares = draw(width), draw(width), norm_for(width, draw), poisoned(4)
        want = hidden.double() + 0.5 * normed(branch, norm)
        operators.post_norm(hidden, branch, norm, squares=squares, scale=0.5)
        assert_near(hidden, want)
        assert_near(squares[0], want.square().sum())


@pytest.mark.parametrize("slices", [1, 3, 7, 13, 16])
@pytest.mark.parametrize("ahead", [0, 3, 16])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_any_tuning_gives_the_same_product(device, draw, poisoned, assert_near, slices, ahead, blocks):
    tuned = Operators(device, Tuning(max_slices=slices, ahead=ahead, columns_blocks_per_sm=blocks))
    for inputs, outputs in ((4096, 1024), (577, 1001), (40, 8), (2000, 9000)):
        weight, x, out = padded(draw(inputs, outputs, dtype=torch.bfloat16)), draw(inputs), poisoned(outputs)
        threshold = split_value(x, 0.6)
        want = reference.input_sparse(weight.double(), x[None].double(), threshold)[0]
        if ahead == 0:
            weight[x.abs() < threshold] = torch.nan
        tuned.columns(out, x, weight, threshold=threshold)
        assert_near(out, want)
        sums = new_sums(outputs, device=device)
        tuned.columns(sums, x, weight, threshold=threshold)
        assert_near(to_values(sums), want)


@pytest.mark.parametrize("slices", [1, 5, 16])
@pytest.mark.parametrize(("ahead", "later"), [(0, 0), (0, 2), (1, 9), (2, 1)])
def test_reading_ahead_in_two_steps_changes_nothing(device, draw, assert_near, slices, ahead, later):
    tuned = Operators(device, Tuning(max_slices=slices, ahead=ahead, later=later))
    for inputs, outputs in ((4096, 22016), (577, 1001), (40, 8), (11008, 4096)):
        weight, x = padded(draw(inputs, outputs, dtype=torch.bfloat16)), to_sums(draw(inputs))
        norm = norm_for(inputs, draw)
        exact = normed(to_values(x), norm)
        threshold = split_value(exact, 0.6)
        want = reference.input_sparse(weight.double(), exact[None], threshold)[0]
        found = []
        for _ in range(2):
            found.append(new_sums(outputs, device=device))
            tuned.columns(found[-1], x, weight, threshold=threshold, norm=norm)
        assert_near(to_values(found[0]), want)
        assert torch.equal(*found), "two runs differ"


def test_kept_values_without_their_fill_and_what_is_below(operators, draw, poisoned, assert_near):
    weight, x, fill = draw(577, 264, dtype=torch.bfloat16), draw(577), draw(577)
    threshold = split_value(x, 0.5)
    keep = x.abs() >= threshold
    out = poisoned(264)
    operators.columns(out, x, weight, threshold=threshold, fill=fill)
    assert_near(out, torch.where(keep, x - fill, 0.0).double() @ weight.double())
    operators.columns(out, x, weight, threshold=threshold, invert=True)
    assert_near(out, torch.where(keep, 0.0, x).double() @ weight.double())


def test_rows_of_a_list_are_computed_and_the_others_stay(operators, draw, poisoned, assert_near):
    weight, x, bias = draw(1001, 512, dtype=torch.bfloat16), draw(512), draw(1001)
    index = torch.randperm(1001, device="cuda")[:400].int()
    count, out = torch.tensor([300], dtype=torch.int32, device="cuda"), poisoned(1001)
    operators.project(out, x, weight, bias=bias, index=index, count=count, fresh=True)
    listed = index[:300].long()
    assert_near(out[listed], (weight.double() @ x.double() + bias)[listed])
    rest = torch.ones(1001, dtype=torch.bool, device="cuda").index_fill(0, listed, False)
    assert out[rest].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 11008), (11008, 4096), (577, 1001), (33, 8)])
def test_sums_in_fixed_point(operators, device, draw, assert_near, dtype, inputs, outputs):
    weight, x, up = padded(draw(inputs, outputs, dtype=dtype, scale=inputs**-0.5)), draw(inputs), draw(inputs)
    bias, norm, held, other = draw(outputs), norm_for(inputs, draw), to_sums(x), to_sums(up)
    threshold = split_value(normed(x, norm), 0.5)
    before, zero = draw(outputs), to_sums(draw(3000))
    sums = to_sums(before)
    how = {"threshold": threshold, "norm": norm, "bias": bias, "scale": 0.5}
    operators.columns(sums, held, weight, zero=zero, **how)
    want = reference.input_sparse(weight.double(), normed(x, norm)[None], threshold, bias=bias)[0]
    assert_near(to_values(sums), before.double() + 0.5 * want)
    assert (zero == 0).all(), "sums of a later product were left as they were"
    again = to_sums(before)
    operators.columns(again, held, weight, **how)
    assert torch.equal(sums, again), "two runs differ"
    sums = new_sums(outputs, device=device)
    operators.columns(sums, held, weight, up=other, activation="silu", skip_zeros=True)
    assert_near(to_values(sums), (reference.activate(x.double(), "silu") * up) @ weight.double())


def test_rows_read_and_add_to_sums(operators, device, draw, poisoned, assert_near):
    for rows, width in SHAPES:
        weight, x, bias, norm = (
            draw(rows, width, dtype=torch.bfloat16, scale=width**-0.5),
            draw(width),
            draw(rows),
            None,
        )
        weight, norm = padded(weight), norm_for(width, draw)
        out, before = poisoned(rows), draw(rows)
        operators.project(out, to_sums(x), weight, norm=norm, bias=bias)
        assert_near(out, weight.double() @ normed(x, norm) + bias)
        sums = to_sums(before)
        operators.add(sums, x, weight, bias=bias, scale=0.3)
        assert_near(to_values(sums), before.double() + 0.3 * (weight.double() @ x.double() + bias))
        fixed = new_sums(width, device=device).fill_(7)
        operators.fix(fixed, x)
        assert torch.equal(fixed, to_sums(x))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e7])
def test_what_is_no_number_is_none_in_the_sum(operators, device, draw, bad):
    weight, x = draw(4096, 256, dtype=torch.bfloat16), draw(4096)
    for at in (5, 4000):
        broken = x.clone()
        broken[at] = bad
        sums = new_sums(256, device=device)
        for _ in range(9):  # further parts do not bring it back
            operators.columns(sums, broken, weight, skip_zeros=True)
        values = to_values(sums)
        assert values.isnan().sum() >= (256 if not abs(bad) < torch.inf else 200)
        operators.columns(sums, x, weight, skip_zeros=True)
        assert torch.equal(to_values(sums).isnan(), values.isnan())
    sums = new_sums(8, device=device)
    operators.fix(sums, torch.tensor([1.0, bad, -2.5, 0.0, 2.0**-31, 1e6, -1e6, 0.1], device=device))
    assert to_values(sums).isnan().tolist() == [False, True] + [False] * 6
