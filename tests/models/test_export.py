"""Export: the smaller checkpoint that transformers loads computes what the masked model computes."""

from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, LAYERS, WIDTHS, make_model, make_tokenizer, token_ids
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from actsparse.errors import ModelError, PlanError
from actsparse.models.export import save_smaller, smaller_model
from actsparse.models.sites import resolve
from actsparse.models.taps import tapped
from actsparse.results import Site, SiteKind

FIXED_WIDTH = ("bloom", "mpt")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")
BIASED = ("opt", "gpt2", "phi", "starcoder2", "gpt_neox", "gptj", "gpt_neo")


def drawn_masks(width: int, kept: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randperm(width, generator=generator) < kept for _ in range(LAYERS)]


def masked_logits(model, sites, masks, fills, ids) -> torch.Tensor:
    def drop(site: Site, a: torch.Tensor) -> torch.Tensor:
        fill = fills[site.layer]
        return torch.where(masks[site.layer], a, torch.zeros(()) if fill is None else fill)

    with tapped(sites, {SiteKind.NEURON: drop}), torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name not in FIXED_WIDTH + MIXTURES])
def test_the_reloaded_checkpoint_computes_the_masked_model(model_type: str, tmp_path: Path) -> None:
    model = make_model(model_type)
    sites = resolve(model)
    masks = drawn_masks(WIDTHS[model_type], 20)
    ids = token_ids(2, 12)
    before = model(input_ids=ids).logits
    made = smaller_model(sites, masks, [None] * LAYERS)
    save_smaller(made, make_tokenizer(), tmp_path)
    attention = model.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, masked_logits(model, sites, masks, [None] * LAYERS, ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path)("w1 w2").input_ids == make_tokenizer()("w1 w2").input_ids


@pytest.mark.parametrize("model_type", ["llama", *BIASED])
def test_what_dropped_neurons_usually_are_becomes_a_bias(model_type: str, tmp_path: Path) -> None:
    model = make_model(model_type)
    sites = resolve(model)
    masks = drawn_masks(WIDTHS[model_type], 20)
    fills = [torch.randn(WIDTHS[model_type], generator=torch.Generator().manual_seed(i)) for i in range(LAYERS)]
    ids = token_ids(1, 9)
    save_smaller(smaller_model(sites, masks, fills), make_tokenizer(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(input_ids=ids).logits
    torch.testing.assert_close(found, masked_logits(model, sites, masks, fills, ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", FIXED_WIDTH)
def test_a_family_of_fixed_width_is_refused_with_the_reason(model_type: str) -> None:
    sites = resolve(make_model(model_type))
    with pytest.raises(ModelError, match=f"'{model_type}' cannot be exported smaller") as caught:
        smaller_model(sites, drawn_masks(WIDTHS[model_type], 20), [None] * LAYERS)
    assert "sparsify" in caught.value.hint


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_mixture_of_experts_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(ModelError, match="is a mixture of experts"):
        smaller_model(resolve(make_model(model_type)), drawn_masks(48, 20), [None] * LAYERS)


def test_a_family_without_biases_cannot_hold_a_compensation() -> None:
    sites = resolve(make_model("gemma"))
    with pytest.raises(ModelError, match="no bias in the down projection"):
        smaller_model(sites, drawn_masks(48, 20), [torch.zeros(48)] * LAYERS)


def test_layers_of_different_widths_are_refused() -> None:
    sites = resolve(make_model("llama"))
    masks = [torch.arange(48) < 20, torch.arange(48) < 21]
    with pytest.raises(PlanError, match="from 20 to 21 neurons a layer"):
        smaller_model(sites, masks, [None, None])
