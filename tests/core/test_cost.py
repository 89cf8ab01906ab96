import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.cost import ceiling, saved
from actsparse.results import StepBytes

ALL = frozenset({"gate", "up", "down"})
CATS = frozenset({"up", "down"})


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
    plain = StepBytes(layers=2, mlp={"up": 100, "down": 100}, attention=50, head=50, total=500)
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
