"""A checkpoint whose projections store int8 and scales: it can be read and masked, not sliced."""

from collections.abc import Callable

import pytest
import torch
from tiny import FFN, HIDDEN, LAYERS, make_model, make_tokenizer, token_ids
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, masked, probed
from actsparse.engine.slicing import sliceable
from actsparse.errors import ModelError
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.models.load import LoadedModel
from actsparse.models.projections import materialise
from actsparse.models.record import quantization_name, record
from actsparse.models.sites import resolve
from actsparse.models.sources import Source
from actsparse.models.weights import dequantized
from actsparse.pipelines.profile import record_sequences
from actsparse.pipelines.progress import Silent
from actsparse.results import Site, SiteKind, TextRecord, Unit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Int8Linear(nn.Module):
    """Weights as int8 with one scale a row, as buffers (GPTQ's way) or as a parameter (bitsandbytes' way)."""

    def __init__(self, linear: nn.Linear, *, buffers: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        stored = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("scale", scale)
        if buffers:
            self.register_buffer("qweight", stored)
        else:
            self.weight = nn.Parameter(stored, requires_grad=False)

    @property
    def matrix(self) -> Tensor:
        stored = self.qweight if "qweight" in self._buffers else self.weight
        return stored * self.scale

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise TypeError(f"activations cannot be {x.dtype}")
        return x @ self.matrix.T


class ScaledInt8(Tensor):
    """A weight of an ordinary linear that stores int8 and calls itself float32 (torchao's way)."""

    stored: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, stored: Tensor, scale: Tensor) -> "ScaledInt8":
        found = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=torch.float32)
        found.stored, found.scale = stored, scale
        return found

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["stored", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context, size, stride) -> "ScaledInt8":
        return ScaledInt8(parts["stored"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].scale)
        raise NotImplementedError(f"{func} is not for quantised weights")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, bias = args
            product = x @ (weight.stored * weight.scale).T
            return product if bias is None else product + bias
        return super().__torch_function__(func, types, args, kwargs or {})


def int8_weight(linear: nn.Linear) -> nn.Linear:
    """The linear with its weight stored as int8 and scales."""
    packed = Int8Linear(linear, buffers=True)
    linear.weight = nn.Parameter(ScaledInt8(packed.qweight, packed.scale), requires_grad=False)
    linear.matrix = packed.matrix
    return linear


@pytest.fixture(params=["buffers", "parameter", "tensor"])
def quantised(request: pytest.FixtureRequest, tiny_folder: Callable) -> LoadedModel:
    model = make_model("llama")
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name in PROJECTIONS:
                if hasattr(parent, name):
                    linear = getattr(parent, name)
                    if request.param == "tensor":
                        int8_weight(linear)
                    else:
                        setattr(parent, name, Int8Linear(linear, buffers=request.param == "buffers"))
    sites = resolve(model)
    source = Source(directory=tiny_folder("llama"), resolved="int8-llama")
    return LoadedModel(model, make_tokenizer(), sites, record("int8-llama", source, sites))


def test_materialise_returns_the_matrix(quantised: LoadedModel) -> None:
    down = quantised.sites.layers[1].down
    torch.testing.assert_close(materialise(down, FFN, torch.zeros(1)), down.matrix, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(quantised.sites.layers[1].down_matrix(FFN), down.matrix, atol=1e-6, rtol=1e-6)


def test_materialise_takes_a_bias_off() -> None:
    linear = nn.Linear(700, 5)
    torch.testing.assert_close(materialise(linear, 700, torch.zeros(1)), linear.weight, atol=1e-6, rtol=1e-5)


def test_its_record_counts_stored_bytes(quantised: LoadedModel) -> None:
    assert quantised.record.intermediate_size == FFN
    assert 1.0 <= quantised.record.bytes_per_weight < 1.5
    assert quantised.record.step.mlp["down"] == pytest.approx(HIDDEN * FFN, rel=0.2)


def test_recording_works(quantised: LoadedModel) -> None:
    ids = token_ids(3, 20)
    text = TextRecord(role="profile", source="t", sha256="0", sequences=3, tokens=60)
    state = record_sequences(
        quantised, Sequences(tuple(ids), text), layers=(0, 1), slots=8, seed=0, batch_size=None, what="recording",
        progress=Silent(),
    )  # fmt: skip
    assert state.tokens == 3 * 16
    assert state.moments[Site(layer=1, kind=SiteKind.NEURON)].count == 3 * 16 * FFN
    assert float(state.heads[1].heads.min()) > 0


def test_masks_and_their_errors_work(quantised: LoadedModel) -> None:
    gate = FixedGate(torch.arange(FFN) % 2 == 0)
    ids = token_ids(1, 12)
    probe, run = (MaskedPlan([LayerGates(neurons=gate)] * LAYERS, prompt_length=4, sink_tokens=0) for _ in range(2))
    with torch.no_grad():
        with probed(quantised.sites, [probe]):
            quantised.model(input_ids=ids, use_cache=False)
        with masked(quantised.sites, run, errors=True):
            quantised.model(input_ids=ids, use_cache=False)
    for layer in range(LAYERS):
        assert probe.tally(Unit.NEURON, layer).positions == run.tally(Unit.NEURON, layer).positions == 8
        assert probe.tally(Unit.NEURON, layer).errors > 0
    first = Unit.NEURON, 0
    assert probe.tally(*first).errors == pytest.approx(run.tally(*first).errors)


def test_slicing_refuses_and_names_the_way_out(quantised: LoadedModel) -> None:
    before = [layer.mlp.down_proj for layer in quantised.model.model.layers]
    with pytest.raises(ModelError) as caught, sliceable(quantised.sites):
        pass
    assert "Int8" in caught.value.what
    assert "--dequantize" in caught.value.hint
    assert [layer.mlp.down_proj for layer in quantised.model.model.layers] == before


def test_the_record_names_the_quantiser_and_no_class_of_transformers() -> None:
    config = LlamaConfig(quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert quantization_name(config.quantization_config) == "bitsandbytes"
    assert quantization_name({"quant_method": "gptq"}) == "gptq"
    assert quantization_name(None) is None


def test_what_cannot_be_dequantised_says_so(tiny_folder: Callable) -> None:
    source = Source(directory=tiny_folder("llama"), resolved="some-checkpoint")
    with pytest.raises(ModelError, match="some-checkpoint") as caught:
        dequantized(make_model("llama"), source)
    assert "unquantised" in caught.value.hint
