"""The kernels of a batch against float64 and against each sequence alone; steps of batches against the torch step."""

import pytest
import torch
from test_products import norm_for, normed, split_value
from test_steps import FULL, GEMMA, GROUPED, make_plan

from actsparse.engine.cuda.batch_products import BatchOperators
from actsparse.engine.cuda.engine import decoder_of
from actsparse.engine.cuda.launcher import Tuning
from actsparse.engine.cuda.native_inputs import native_step
from actsparse.engine.cuda.row_products import Caps
from actsparse.engine.cuda.sums import new_sums, to_sums, to_values
from actsparse.engine.step import reference
from actsparse.engine.step.plans import DensePlan, InputPlan
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.state import Best
from actsparse.engine.step.torch_step import TorchStep
from actsparse.engine.step.weights import padded, random_weights

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
BATCHES = (2, 3, 4, 8)
# Rows, width: a layer's, small, fewer rows than a tile, of no whole tile, wider than a block takes of a batch.
SHAPES = ((4096, 4096), (1152, 896), (1001, 576), (7, 4096), (40, 8), (520, 11008))


@pytest.fixture(params=BATCHES)
def batched(request, device):
    return BatchOperators(device, request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rows_of_a_batch(batched, draw, poisoned, assert_near, dtype, rows, width):
    batch = batched.batch
    weight, bias, x = draw(rows, width, dtype=dtype, scale=width**-0.5), draw(rows), draw(batch, width)
    norm = norm_for(width, draw)
    if batch * width <= 46_000:
        out = poisoned(batch, rows)
        for values in (x, to_sums(x)):
            batched.project(out, values, weight, norm=norm, bias=bias)
            assert_near(out, normed(x, norm) @ weight.double().T + bias, limit=1e-5)
    sums = to_sums(draw(batch, rows))
    want = to_values(sums).double() + 0.3 * (x.double() @ weight.double().T + bias)
    again = sums.clone()
    batched.add(sums, x, weight, bias=bias, scale=0.3)
    batched.add(again, x, weight, bias=bias, scale=0.3)
    assert_near(to_values(sums), want, limit=1e-5)
    assert torch.equal(sums, again), "two runs differ"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("neurons", "width"), [(1376, 1024), (504, 576), (7, 4096)])
def test_gated_of_a_batch(batched, draw, poisoned, assert_near, dtype, activation, neurons, width):
    batch = batched.batch
    gate_up, x = draw(2 * neurons, width, dtype=dtype, scale=width**-0.5), draw(batch, width)
    norm, bias, out = norm_for(width, draw), draw(2 * neurons), poisoned(batch, neurons)
    batched.gated(out, x, gate_up, norm=norm, activation=activation, bias=bias)
    want = reference.gated(gate_up.double(), normed(x, norm), activation, bias)
    assert_near(out, want, limit=1e-4)
    count, mask = torch.tensor([neurons // 2], dtype=torch.int32, device="cuda"), (draw(batch, neurons) > 0).float()
    room = poisoned(batch, neurons + 8)
    some = room[:, :neurons]
    batched.gated(some, x, gate_up, norm=norm, activation=activation, bias=bias, mask=mask, count=count)
    live = count.item()
    assert_near(some[:, :live], (want * mask)[:, :live], limit=1e-4)
    assert room[:, live:].isnan().all(), "rows past the count were written"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
@pytest.mark.parametrize(("neurons", "width"), [(11008, 4096), (504, 576)])
def test_threshold_then_rows_that_any_sequence_keeps(batched, draw, poisoned, assert_near, share, neurons, width):
    batch = batched.batch
    gate_up, x = draw(2 * neurons, width, dtype=torch.bfloat16, scale=width**-0.5), draw(batch, width)
    gate, up = gate_up.chunk(2)
    norm, halves, out = norm_for(width, draw), poisoned(batch, 2 * neurons), poisoned(batch, neurons)
    factor = halves[:, :neurons]
    exact = reference.activate(normed(x, norm) @ gate.double().T, "silu")
    threshold = split_value(exact, share)
    batched.threshold(factor, x, gate, threshold, norm=norm, activation="silu")
    want = reference.keep_large(exact, threshold)
    assert torch.equal(factor != 0, want != 0)
    assert_near(factor, want, limit=1e-4)
    kept, exact_up = (factor != 0).any(dim=0), up.double()
    up[~kept] = torch.nan  # these rows are not read
    read = torch.zeros(1, dtype=torch.int64, device="cuda")
    batched.kept(out, x, up, factor, norm=norm, activation="identity", read=read)
    assert_near(out, factor.double() * (normed(x, norm) @ exact_up.T), limit=1e-4)
    assert read == kept.sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 11008), (11008, 4096), (576, 1001), (896, 1152), (33, 8)])
def test_columns_of_a_batch(batched, draw, assert_near, dtype, share, inputs, outputs):
    batch = batched.batch
    weight, x = padded(draw(inputs, outputs, dtype=dtype, scale=inputs**-0.5)), draw(batch, inputs)
    bias, norm = draw(outputs), norm_for(inputs, draw)
    exact = normed(x, norm)
    threshold = split_value(exact, share)
    want = 0.5 * torch.cat([reference.input_sparse(weight.double(), one[None], threshold, bias=bias) for one in exact])
    found = [new_sums(batch, outputs, device=weight.device) for _ in range(2)]
    for sums in found:
        batched.columns(sums, to_sums(x), weight, threshold=threshold, norm=norm, bias=bias, scale=0.5)
    assert_near(to_values(found[0]), want)
    assert torch.equal(*found), "two runs differ"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("inputs", "outputs"), [(5120, 2 * 17920), (28672, 8192), (40960, 1024)])
def test_columns_of_wide_models(device, draw, assert_near, batch, inputs, outputs):
    batched = BatchOperators(device, batch)
    weight, x = draw(inputs, outputs, dtype=torch.bfloat16, scale=inputs**-0.5), draw(batch, inputs)
    threshold = split_value(x, 0.5)
    want = torch.where(x.abs() >= threshold, x, 0.0) @ weight.float()
    sums = new_sums(batch, outputs, device=device)
    batched.columns(sums, x, weight, threshold=threshold)
    assert_near(to_values(sums), want)


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_that_no_sequence_keeps_are_not_read(device, draw, assert_near, batch):
    batched = BatchOperators(device, batch, Tuning(ahead=0))
    inputs, segments = 896, (896, 128, 128)
    weight = draw(inputs, sum(segments), dtype=torch.bfloat16, scale=inputs**-0.5)
    x, up, score = draw(batch, inputs), draw(batch, inputs), draw(3, inputs).abs()
    exact = reference.activate(to_values(to_sums(x)).double(), "silu") * to_values(to_sums(up))
    shares = (0.8, 0.9, 0.97)
    thresholds = torch.cat([split_value(exact * one, share) for one, share in zip(score, shares, strict=True)])
    want, counts = [], []
    for part, t, one in zip(weight.double().split(segments, dim=1), thresholds, score, strict=True):
        want.append(reference.input_sparse(part, exact, t, one))
        counts.append((exact.abs() * one >= t).any(dim=0))
    for kept, part in zip(counts, weight.split(segments, dim=1), strict=True):
        part[~kept] = torch.nan
    read, zero = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(5000, dtype=torch.int64, device=device)
    both = to_sums(torch.cat([x, up], dim=1))
    sums = new_sums(batch, sum(segments), device=device)
    batched.columns(
        sums, both[:, :inputs], weight, threshold=thresholds, segments=segments, score=score, up=both[:, inputs:],
        activation="silu", zero=zero, read=read,
    )  # fmt: skip
    assert_near(to_values(sums), torch.cat(want, dim=1))
    assert read.tolist() == [int(one.sum()) for one in counts]
    assert not zero.any()


@pytest.mark.parametrize("live", [0, 300, 640])
def test_columns_of_a_batch_read_only_the_live_rows(batched, draw, assert_near, live):
    weight, x = draw(640, 1024, dtype=torch.bfloat16), draw(batched.batch, 640)
    want = x[:, :live].double() @ weight[:live].double()
    weight[live:] = torch.nan
    sums = new_sums(batched.batch, 1024, device=weight.device)
    batched.columns(sums, x, weight, count=torch.tensor([live], dtype=torch.int32, device="cuda"))
    if live == 0:
        assert not sums.any()
    else:
        assert_near(to_values(sums), want)


def test_each_sequence_has_its_best_row(batched, draw, poisoned, assert_near):
    batch, blocks = batched.batch, batched.blocks
    weight, x, norm = draw(32001, 512, dtype=torch.bfloat16), draw(batch, 512), norm_for(512, draw)
    best = Best(poisoned(batch, blocks), torch.zeros(batch, blocks, dtype=torch.int32, device="cuda"))
    logits = poisoned(batch, 32001)
    batched.head(logits, best, to_sums(x), weight, norm=norm, caps=Caps(scale=0.25, cap=3.0))
    want = reference.soft_cap((normed(x, norm) @ weight.double().T) * 0.25, 3.0)
    assert_near(logits, want, limit=1e-4)
    for sequence in range(batch):
        value, row = best.value[sequence], best.row[sequence]
        assert row[value == value.max()].min() == logits[sequence].argmax()


def test_a_branch_of_sums_is_normed_and_left_empty(batched, draw, poisoned, assert_near):
    batch, width = batched.batch, 2304
    hidden, branch, norm, squares = draw(batch, width), draw(batch, width), norm_for(width, draw), poisoned(16)
    want, sums = hidden.double() + 0.5 * normed(branch, norm), to_sums(branch)
    batched.post_norm(hidden, sums, norm, squares=squares, scale=0.5)
    assert_near(hidden, want)
    assert_near(squares[:batch], want.square().sum(dim=1))
    assert not sums.any()


def filled(weights, batch, draw, padding=None):
    decoder = decoder_of(weights, max_length=96, batch=batch)
    state = decoder.state
    state.keys.copy_(draw(*state.keys.shape))
    state.values.copy_(draw(*state.values.shape))
    if padding is not None:
        state.padding.copy_(torch.tensor(padding, device="cuda"))
    return decoder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [GROUPED, FULL, GEMMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", ["dense", "sliced", "cats", "chess", "countdown"])
@pytest.mark.parametrize("padding", [None, (0, 9, 60)])
def test_every_stage_of_a_batch_equals_the_torch_step(draw, assert_near, kind, shape, dtype, padding):
    weights = random_weights(shape, dtype=dtype, device="cuda")
    decoder = filled(weights, 3, draw, padding)
    assert not decoder.warnings
    state, plan = decoder.state, make_plan(kind, weights)
    native = native_step(weights, state, plan, decoder.engine.operators, padded=padding is not None)
    plain = TorchStep(weights, state, plan, padded=padding is not None)
    state.position.fill_(70)
    for layer in range(shape.layers):
        for name in ("attention", "mlp"):
            hidden = draw(3, shape.width)
            for buffer in (state.qkv, state.mix, state.branch, state.halves, state.neurons):
                buffer.fill_(torch.nan)
            want = getattr(plain, name)(layer, hidden.clone()) - hidden
            state.hidden.copy_(hidden)
            native.begin()
            getattr(native, name)(layer)
            assert_near(native.hidden - hidden, want)


@pytest.mark.parametrize("shape", [GROUPED, FULL, GEMMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("kind", ["dense", "teal", "wina", "cats"])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_step_of_a_batch_is_that_of_each_alone(draw, assert_near, kind, shape, batch):
    weights = random_weights(shape, dtype=torch.bfloat16, device="cuda")
    decoder, plan = filled(weights, batch, draw), make_plan(kind, weights)
    tokens = torch.randint(0, shape.vocab, (batch,), device="cuda")
    decoder.start(tokens, 70)  # before the capture, whose warm-ups write the cache from here on
    decoder.set_plan(plan)
    assert decoder.path == "graph"
    assert decoder.warnings == []
    following = decoder.decode(1)
    logits = decoder.state.logits.clone()
    assert torch.equal(following[:, 0], logits.argmax(dim=1))
    decoder.start(tokens, 70)
    decoder.decode(1)
    assert torch.equal(decoder.state.logits, logits), "two replays differ"
    for sequence in range(batch):
        alone = decoder_of(weights, max_length=96)
        alone.state.keys.copy_(decoder.state.keys[:, sequence : sequence + 1])
        alone.state.values.copy_(decoder.state.values[:, sequence : sequence + 1])
        alone.start(tokens[sequence], 70)
        alone.set_plan(plan)
        alone.decode(1)
        # Another order of sums flips marginal entries of masks that are chosen by value.
        limit = 2e-3 if kind == "dense" else 5e-2
        assert_near(logits[sequence], alone.state.logits[0], limit=limit)
        assert torch.equal(decoder.state.keys[0, sequence, :, :70], alone.state.keys[0, 0, :, :70])
        assert_near(decoder.state.keys[0, sequence, :, 70], alone.state.keys[0, 0, :, 70], limit=5e-2)
    if isinstance(plan, InputPlan):
        counters = decoder.engine.counters[id(plan)]
        assert {one.unit for one in counters} == {"q", "k", "v", "o", "gate", "up", "down"}
        assert all(one.read.item() > 0 for one in counters)


def test_sequences_of_a_batch_draw_their_own_tokens():
    weights = random_weights(GROUPED, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=64, batch=4)
    texts = []
    for seed in (5, 5, 6):
        decoder.sample(Sampling(temperature=0.8, top_p=0.9, seed=seed))
        decoder.start(3, 0)
        texts.append(decoder.decode(40))
    assert decoder.path == "graph"
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert len({tuple(row) for row in texts[0].tolist()}) == 4


def test_forced_tokens_and_the_room_of_a_batch():
    weights = random_weights(GROUPED, dtype=torch.bfloat16, device="cuda")
    decoder = decoder_of(weights, max_length=12, batch=3)
    forced = torch.randint(0, GROUPED.vocab, (3, 6), device="cuda")
    decoder.start(1, 0)
    decoder.force(forced)
    assert torch.equal(decoder.decode(6), forced)
    decoder.set_plan(DensePlan())
    assert decoder.state.position.item() == 6
