from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.cost import LayerDrops, ceiling
from actsparse.core.cost import saved as saved_by_layer
from actsparse.results import Sparsity, StepBytes, Unit

ALL = frozenset({"gate", "up", "down"})
CATS = frozenset({"up", "down"})


def saved(step: StepBytes, matrices: frozenset[str], dropped: list[float]) -> Sparsity:
    """Sparsity of neurons alone."""
    return saved_by_layer(step, [LayerDrops(neurons=share, neuron_saves=matrices) for share in dropped])


def llama_step(
    *, layers: int, hidden: int, ffn: int, kv_width: int, vocab: int, bias: bool = False, itemsize: int = 2
) -> StepBytes:
    """Bytes of a Llama-shaped model with an untied lm_head, counted matrix by matrix from its public config."""
    matrix = hidden * ffn * itemsize
    attention = layers * itemsize * (2 * hidden * hidden + 2 * hidden * kv_width)
    norms = itemsize * (2 * layers + 1) * hidden + (itemsize * layers * (hidden + 2 * kv_width) if bias else 0)
    head = vocab * hidden * itemsize
    return StepBytes(
        layers=layers,
        mlp={"gate": matrix, "up": matrix, "down": matrix},
        projections=dict.fromkeys(("q", "k", "v", "o"), attention // (4 * layers)),
        attention=attention,
        head=head,
        total=3 * layers * matrix + attention + norms + head,
    )


LLAMA2_7B = llama_step(layers=32, hidden=4096, ffn=11008, kv_width=4096, vocab=32000)
LLAMA3_8B = llama_step(layers=32, hidden=4096, ffn=14336, kv_width=1024, vocab=128256)
MISTRAL_7B = llama_step(layers=32, hidden=4096, ffn=14336, kv_width=1024, vocab=32000)
QWEN25_7B = llama_step(layers=28, hidden=3584, ffn=18944, kv_width=512, vocab=152064, bias=True)


# Source of the golden numbers: methods.md, section 0, fact 1, recomputed here from the shapes of the public configs.
@pytest.mark.parametrize(
    ("step", "phi"), [(LLAMA2_7B, 0.655), (LLAMA3_8B, 0.751), (MISTRAL_7B, 0.793), (QWEN25_7B, 0.807)]
)
def test_the_mlp_share_of_a_decode_step_is_the_published_one(step, phi):
    everything = saved(step, ALL, [1.0] * step.layers)
    assert everything.model_bytes_frac == pytest.approx(phi, abs=0.0005)
    assert everything.mlp_bytes_frac == pytest.approx(1.0)


def test_the_ceilings_of_llama_2_7b_at_half_the_neurons():
    half = [0.5] * 32
    assert ceiling(saved(LLAMA2_7B, ALL, half).model_bytes_frac) == pytest.approx(1.49, abs=0.005)
    cats = saved(LLAMA2_7B, CATS, half)
    assert ceiling(cats.model_bytes_frac) == pytest.approx(1.28, abs=0.005)
    assert cats.model_bytes_frac == pytest.approx(0.22, abs=0.005)
    assert cats.mlp_bytes_frac == pytest.approx(1 / 3)
    assert cats.neuron_frac == pytest.approx(0.5)


def test_a_rule_that_needs_the_activation_saves_one_matrix_of_three_and_one_of_two_without_a_gate():
    assert saved(LLAMA2_7B, frozenset({"down"}), [0.6] * 32).mlp_bytes_frac == pytest.approx(0.2)
    plain = StepBytes(
        layers=2,
        mlp={"up": 100, "down": 100},
        projections={"q": 5, "k": 5, "v": 5, "o": 10},
        attention=50,
        head=50,
        total=500,
    )
    assert saved(plain, frozenset({"down"}), [0.5, 0.5]).mlp_bytes_frac == pytest.approx(0.25)
    assert saved(plain, CATS, [0.5, 0.5]).mlp_bytes_frac == pytest.approx(0.5)
    assert saved(plain, ALL, [0.5, 0.5]).model_bytes_frac == pytest.approx(0.4)


@settings(deadline=None, derandomize=True)
@given(dropped=st.lists(st.floats(0, 1), min_size=32, max_size=32))
def test_layers_count_alike_and_the_ceiling_is_the_bytes_before_over_the_bytes_after(dropped):
    found = saved(LLAMA2_7B, ALL, dropped)
    mean = float(torch.tensor(dropped, dtype=torch.float64).mean())
    assert found.neuron_frac == pytest.approx(mean, abs=1e-12)
    assert found.mlp_bytes_frac == pytest.approx(mean, abs=1e-12)
    left = LLAMA2_7B.total - sum(share * 3 * 4096 * 11008 * 2 for share in dropped)
    assert ceiling(found.model_bytes_frac) == pytest.approx(LLAMA2_7B.total / left)


def test_dropping_nothing_saves_nothing():
    found = saved(LLAMA2_7B, ALL, [0.0] * 32)
    assert (found.neuron_frac, found.mlp_bytes_frac, found.model_bytes_frac) == (0.0, 0.0, 0.0)
    assert ceiling(0.0) == 1.0


def test_channels_count_by_size_and_reach_all_seven_projections():
    everywhere = dict.fromkeys((Unit.Q, Unit.K, Unit.V, Unit.O, Unit.GATE, Unit.UP, Unit.DOWN), 0.5)
    found = saved_by_layer(LLAMA2_7B, [LayerDrops(channels=everywhere)] * 32)
    assert found.neuron_frac is None
    assert found.channel_frac == pytest.approx(0.5)
    assert found.mlp_bytes_frac == pytest.approx(0.5)
    assert ceiling(found.model_bytes_frac) == pytest.approx(1.96, abs=0.005)
    # one projection of four equal attention matrices and three MLP matrices of 11008 / 4096 times their size
    alone = saved_by_layer(LLAMA2_7B, [LayerDrops(channels={Unit.O: 0.3})] * 32)
    assert alone.channel_frac == pytest.approx(0.3 / (4 + 3 * 11008 / 4096))
    assert alone.mlp_bytes_frac == 0


def test_fused_projections_count_as_their_parts():
    parts = {Unit.Q: 0.4, Unit.K: 0.4, Unit.V: 0.4, Unit.GATE: 0.2, Unit.UP: 0.2}
    fused = {Unit.QKV: 0.4, Unit.GATE_UP: 0.2}
    one, other = (saved_by_layer(LLAMA3_8B, [LayerDrops(channels=drops)] * 32) for drops in (parts, fused))
    assert one == other


def test_rows_and_columns_that_are_dropped_leave_a_rectangle():
    drops = LayerDrops(neurons=0.5, channels={Unit.GATE: 0.5, Unit.DOWN: 0.2})
    assert drops.unread("gate") == pytest.approx(0.75)
    assert drops.unread("up") == pytest.approx(0.5)
    assert drops.unread("down") == pytest.approx(0.5)


def test_heads_save_rows_of_q_and_columns_of_o_and_what_rules_read_is_charged():
    attention = {"q": 40, "k": 20, "v": 20, "o": 40}
    step = StepBytes(layers=1, mlp={"up": 100, "down": 100}, projections=attention, attention=120, head=80, total=400)
    kept_kv = saved_by_layer(step, [LayerDrops(heads=0.5)])
    assert (kept_kv.head_frac, kept_kv.neuron_frac, kept_kv.model_bytes_frac) == (0.5, None, pytest.approx(0.1))
    dropped_kv = saved_by_layer(step, [LayerDrops(heads=0.5, head_saves=frozenset("qkvo"))])
    assert dropped_kv.model_bytes_frac == pytest.approx(0.15)
    routed = saved_by_layer(step, [LayerDrops(neurons=0.5, mlp_extra_bytes=20)])
    assert routed.mlp_bytes_frac == pytest.approx((100 - 20) / 200)
    assert routed.model_bytes_frac == pytest.approx(80 / 400)


def test_an_engine_skips_a_matrix_along_one_axis() -> None:
    mixed = LayerDrops(neurons=0.5, neuron_saves=frozenset({"up", "down"}), channels={Unit.UP: 0.3})
    assert mixed.unread("up") == pytest.approx(1 - 0.5 * 0.7)
    read = mixed.along_one_axis()
    assert (read.unread("up"), read.unread("down"), read.unread("gate")) == (pytest.approx(0.3), 0.5, 0.0)
    fused = replace(mixed, channels={Unit.GATE_UP: 0.3}).along_one_axis()
    assert fused.unread("up") == pytest.approx(0.3)
