"""The Triton kernels: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch

from actsparse.engine.step import reference
from actsparse.engine.step.weights import padded

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreters of earlier releases do not know present-day numpy
pytest.importorskip("triton", minversion=None if WHERE == "cuda" else "3.8")
pytestmark = pytest.mark.skipif(
    WHERE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("atomics", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(577, 301), (128, 512), (33, 8)])
def test_input_sparse_product(draw, poisoned, assert_near, dtype, atomics, inputs, outputs):
    from actsparse.engine.cuda import input_kernels

    weight = padded(draw(inputs, outputs, dtype=dtype, device=WHERE))
    x, score, bias = draw(inputs, device=WHERE), draw(inputs, device=WHERE).abs(), draw(outputs, device=WHERE)
    threshold = torch.tensor([0.5], device=WHERE)
    dropped = x.abs() * score < 0.5
    want = reference.input_sparse(weight.double(), x[None].double(), threshold, score.double(), bias)[0]
    weight[dropped] = torch.nan
    out = poisoned(outputs, device=WHERE)
    input_kernels.product(weight, x, threshold, score, bias, out, add=False, atomics=atomics)
    assert_near(out, want)
    before = out.clone()
    input_kernels.product(weight, x, threshold, score, None, out, add=True, atomics=atomics)
    assert_near(out, before + want - bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["gate", "up"])
def test_neuron_sparse_rows(draw, assert_near, dtype, first):
    from actsparse.engine.cuda import neuron_kernels

    gate, up = padded(draw(106, 70, dtype=dtype, device=WHERE)).chunk(2)
    x = draw(70, device=WHERE)
    decides, follows = (gate, up) if first == "gate" else (up, gate)
    acts = ("silu", "identity") if first == "gate" else ("identity", "gelu_tanh")
    threshold = torch.tensor([2.0], device=WHERE)
    exact = reference.activate(decides.double() @ x.double(), acts[0])
    factor = neuron_kernels.threshold_rows(decides, x, threshold, acts[0])
    assert_near(factor, reference.keep_large(exact, threshold))
    want = factor.double() * reference.activate(follows.double() @ x.double(), acts[1])
    follows[factor == 0] = torch.nan
    assert_near(neuron_kernels.kept_rows(follows, x, factor, acts[1]), want)
