"""Trains the twins side by side: each batch goes through the SiLU model, then through the ReLU model.

Both start from one seed and share data, order, optimiser and schedule by construction.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from actsparse.twins.train import corpus

ACTIVATIONS = ("silu", "relu")
EVALUATED_ROWS = 512
EVALUATED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    steps: int
    rows: int
    length: int
    rate: float
    final_rate: float
    warmup: int
    decay: float
    clip: float
    seed: int
    report_every: int
    evaluate_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """Mean losses in nats a token; `step` counts the batches seen by then."""

    step: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    held_out_step: list[int] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)


class Twin:
    """One model in training."""

    def __init__(self, config: LlamaConfig, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        with device:
            self.model = LlamaForCausalLM(config)
        self.curves = Curves()
        self._settings, self._device = settings, device
        matrices = [weight for weight in self.model.parameters() if weight.ndim == 2]
        vectors = [weight for weight in self.model.parameters() if weight.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": settings.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=device.type == "cuda")
        self._loss = torch.compile(loss, dynamic=False) if device.type == "cuda" else loss
        self._losses: list[Tensor] = []

    def step(self, batch: Int[Tensor, "rows length"], rate: float) -> None:
        """One update."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self._device.type, torch.bfloat16):
            value = self._loss(self.model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(value.detach())

    def report(self, step: int) -> float:
        """The mean training loss since the last report."""
        mean = float(torch.stack(self._losses).mean())
        self._losses.clear()
        self.curves.step.append(step)
        self.curves.train.append(mean)
        return mean

    @torch.no_grad()
    def evaluate(self, rows: NDArray[np.uint16]) -> float:
        """The mean loss over `rows`."""
        batches = _whole_batches(rows, EVALUATED_AT_ONCE)
        with torch.autocast(self._device.type, torch.bfloat16):
            values = [loss(self.model, _to(batch, self._device)) for batch in batches]
        return float(torch.stack(values).mean())

    def save(self, folder: Path) -> None:
        """Writes the weights in bfloat16, and the configurations."""
        state = {name: weight.bfloat16() for name, weight in self.model.state_dict().items()}
        shipped = LlamaForCausalLM(self.model.config).bfloat16()
        shipped.load_state_dict(state)
        shipped.generation_config = _generation(self.model.config)
        shipped.save_pretrained(folder)


def loss(model: LlamaForCausalLM, batch: Int[Tensor, "rows length"]) -> Float[Tensor, ""]:
    """The mean next-token loss; layer by layer, so that attention stays causal without a mask."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    hidden = model.model.embed_tokens(inputs)
    position = torch.arange(inputs.shape[1], device=batch.device)[None]
    rotary = model.model.rotary_emb(hidden, position)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def config(activation: str, tokenizer_folder: Path) -> LlamaConfig:
    """The twins' architecture: 7 M parameters."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_act=activation,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def rate(step: int, settings: Settings) -> float:
    """The learning rate: linear warm-up, then a cosine down to `final_rate`."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    span = settings.rate - settings.final_rate
    return settings.final_rate + span * 0.5 * (1 + math.cos(math.pi * share))


def run(settings: Settings, text: corpus.Corpus, tokenizer_folder: Path, output: Path) -> None:
    """Trains both and writes weights and `training.json` at every evaluation."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twins = {name: Twin(config(name, tokenizer_folder), settings, device) for name in ACTIVATIONS}
    length = settings.length + 1
    held_out = corpus.pack(text.held_out, length)[:EVALUATED_ROWS]
    stream = corpus.batches(text.train, length, settings.rows, settings.seed)
    start = time.perf_counter()
    for step, batch in zip(range(settings.steps), _ahead(stream, device), strict=False):
        for twin in twins.values():
            twin.step(batch, rate(step, settings))
        done = step + 1
        if done % settings.report_every == 0:
            means = {name: round(twin.report(done), 4) for name, twin in twins.items()}
            print(f"{time.perf_counter() - start:6.1f} s  step {done}  {means}", flush=True)
        if done % settings.evaluate_every == 0 or done == settings.steps:
            _checkpoint(settings, text, twins, held_out, output, done, time.perf_counter() - start)
    _finish(text, twins, settings, output)


def _checkpoint(
    settings: Settings,
    text: corpus.Corpus,
    twins: dict[str, Twin],
    held_out: NDArray[np.uint16],
    output: Path,
    done: int,
    seconds: float,
) -> None:
    for name, twin in twins.items():
        twin.curves.held_out_step.append(done)
        twin.curves.held_out.append(twin.evaluate(held_out))
        twin.save(output / name)
    trained = done * settings.rows * settings.length
    record = {
        "settings": asdict(settings),
        "train_documents": len(text.train),
        "train_tokens": sum(map(len, text.train)),
        "held_out_documents": len(text.held_out),
        "held_out_tokens": sum(map(len, text.held_out)),
        "epoch_tokens": len(corpus.pack(text.train, settings.length + 1)) * settings.length,
        "seconds": seconds,
        "tokens_per_model": trained,
        "tokens_per_second_both": len(twins) * trained / seconds,
        "curves": {name: asdict(twin.curves) for name, twin in twins.items()},
    }
    print({name: twin.curves.held_out[-1] for name, twin in twins.items()}, flush=True)
    (output / "training.json").write_text(json.dumps(record))


def _finish(text: corpus.Corpus, twins: dict[str, Twin], settings: Settings, output: Path) -> None:
    """Adds the final losses on equally many rows of either side to the record."""
    length = settings.length + 1
    held_out = corpus.pack(text.held_out, length)
    train = corpus.pack(text.train[: 2 * len(text.held_out)], length)[: len(held_out)]
    path = output / "training.json"
    record = json.loads(path.read_text())
    record["final"] = {
        name: {"train": twin.evaluate(train), "held_out": twin.evaluate(held_out)} for name, twin in twins.items()
    }
    record["final_rows"] = len(held_out)
    path.write_text(json.dumps(record))
    print(json.dumps(record["final"]), flush=True)


def _ahead(stream: Iterator[NDArray[np.uint16]], device: torch.device) -> Iterator[Int[Tensor, "rows length"]]:
    for batch in stream:
        yield _to(batch, device)


def _to(batch: NDArray[np.uint16], device: torch.device) -> Int[Tensor, "rows length"]:
    return torch.from_numpy(batch.astype(np.int16)).to(device, non_blocking=True).long()


def _whole_batches(rows: NDArray[np.uint16], size: int) -> list[NDArray[np.uint16]]:
    return [rows[first : first + size] for first in range(0, len(rows) - size + 1, size)]


def _generation(config: LlamaConfig) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="corpus.npz, which corpus.py wrote")
    parser.add_argument("tokenizer", type=Path, help="what tokenizer.py wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2340)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--final-rate", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--evaluate-every", type=int, default=500)
    arguments = vars(parser.parse_args())
    text, folder, output = corpus.load(arguments.pop("corpus")), arguments.pop("tokenizer"), arguments.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    run(Settings(**arguments), text, folder, output)


if __name__ == "__main__":
    main()
