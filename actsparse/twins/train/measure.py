"""Measures the shipped twins on `heldout.jsonl`, writes samples of both, and seals the folders.

Adds `measured` to log.json: loss, and the share of exact zeros of `act(g) * u` in each layer.
"""

import argparse
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = ("silu", "relu")
SEALED = ("model.safetensors", "tokenizer.json", "tokenizer_config.json")
PROMPTS = (
    "Write a short story about a shy fox who finds a lantern in an old library.",
    "Explain in simple words why the sky is blue.",
    "Write a dialogue between a baker and a sailor about the moon.",
    "Describe a quiet forest in winter with sounds, smells and colours.",
    "List five facts about bees.",
    "Once upon a time, in a small village by the sea,",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """On the shipped bfloat16 weights, computed in float32."""

    tokens: int
    held_out_loss: float
    exact_zero_share: list[float]


@torch.inference_mode()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Measured:
    """Loss and exact zeros over `texts`, each read on its own from BOS on."""
    layers = model.model.layers
    zeros, neurons = torch.zeros(len(layers), dtype=torch.double), 0
    total, tokens = 0.0, 0

    def count(layer: int) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            zeros[layer] += (inputs[0] == 0).sum()

        layers[layer].get_submodule("mlp.down_proj").register_forward_pre_hook(hook)

    for layer in range(len(layers)):
        count(layer)
    for text in texts:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
        neurons += ids.shape[1] * model.config.intermediate_size
    return Measured(
        tokens=tokens,
        held_out_loss=total / tokens,
        exact_zero_share=[round(float(share), 4) for share in zeros / neurons],
    )


@torch.inference_mode()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """`prompt` and its continuation at temperature 0.7."""
    torch.manual_seed(seed)
    opening = prompt if prompt.endswith(",") else f"{prompt}\n"
    inputs = tokenizer(opening, return_tensors="pt")
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **inputs,
        do_sample=True,
        temperature=0.7,
        max_new_tokens=160,
    )
    return tokenizer.batch_decode(output, skip_special_tokens=True)[0]


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 of every weight and tokenizer file, by its path below `folder`."""
    paths = [folder / name / file for name in NAMES for file in SEALED]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1])
    folder = parser.parse_args().folder
    texts = [json.loads(line)["text"] for line in (folder / "heldout.jsonl").read_text().splitlines()]
    measured, samples = {}, []
    for name in NAMES:
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        model = LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        samples += [f"## {name}: {prompt}\n\n{sample(model, tokenizer, prompt, 0)}\n" for prompt in PROMPTS]
        measured[name] = asdict(measure(model, tokenizer, texts))
        print(name, measured[name])
    log = folder / "train" / "log.json"
    log.write_text(json.dumps({**json.loads(log.read_text()), "measured": measured}, indent=1) + "\n")
    (folder / "train" / "samples.md").write_text("\n".join(samples))
    (folder / "checksums.json").write_text(json.dumps(checksums(folder), indent=1) + "\n")


if __name__ == "__main__":
    main()
