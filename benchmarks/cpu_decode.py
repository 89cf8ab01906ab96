"""Decode speed on the CPU, dense and sparse of one engine in turn, against transformers and the machine's memory.

    OMP_NUM_THREADS=2 python benchmarks/cpu_decode.py --model smollm2 --parts eager,dense,sliced,cats,teal,profile

Thresholds are quantiles over the prompt's own tokens. All arms are teacher-forced over the same tokens from the same
cache, A B A B; intervals are bootstrapped over pairs. Prints one table.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from gpu_timing import paired
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from actsparse.engine.cpu import build
from actsparse.engine.cpu.engine import CpuEngine, as_gate_plan
from actsparse.engine.cpu.ops import Columns, Gated, NeuronSparse, Op, Rows
from actsparse.engine.cpu.program import Program
from actsparse.engine.cpu.step import StepBuilder
from actsparse.engine.decode import new_cache, prefill
from actsparse.engine.decode import step as model_step
from actsparse.engine.step import sliced
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, NeuronPlan, Plan
from actsparse.engine.step.weights import input_rows, transpose_rows
from actsparse.models.load import load
from actsparse.models.sites import ModelSites, resolve
from actsparse.models.taps import tapped
from actsparse.results import Site, SiteKind
from actsparse.specs import ModelSpec

SINK = 4
PARTS = ("eager", "dense", "sliced", "cats", "teal", "profile")
TARGETS = {"dense over eager": 1.5, "sliced 50 %": 1.25, "index list 50 %": 1.25, "cats 50 %": 1.0, "teal 50 %": 1.0}


def activations(sites: ModelSites, ids: Tensor, kinds: tuple[SiteKind, ...]) -> dict[tuple[int, SiteKind], Tensor]:
    """What passes each site of each layer over a prompt, sink tokens left out."""
    found: dict[tuple[int, SiteKind], Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        found[site.layer, site.kind] = x[0, SINK:].float()

    with torch.no_grad(), tapped(sites, dict.fromkeys(kinds, see)):
        sites.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return found


def read_gbps(megabytes: int = 1024, repeats: int = 7) -> float:
    """GB/s of a reduction that only reads, by all threads."""
    data = torch.ones(megabytes << 18)
    handle = build.library()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        handle.actsparse_read(data.data_ptr(), data.numel())
        seconds.append(time.perf_counter() - began)
    return data.numel() * 4 / statistics.median(seconds[1:]) / 1e9


def random_model(dtype: str) -> PreTrainedModel:
    """SmolLM2-135M's shape with random weights, for machines without the real ones: speed does not see the values."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


class Bench:
    """One model, one prompt, and the time of a few teacher-forced tokens under any plan."""

    def __init__(self, model: str, text: Path, prompt: int, tokens: int, dtype: str) -> None:
        if model == "random":
            self.model, self.ids = random_model(dtype), torch.randint(0, 49152, (1, prompt + tokens + 1))
        else:
            loaded = load(ModelSpec(name=model, device="cpu", dtype=dtype), print)
            words = text.read_text()[: 12 * (prompt + tokens)]
            self.model = loaded.model
            self.ids = torch.tensor(loaded.tokenizer(words).input_ids)[None, : prompt + tokens + 1]
        self.prompt, self.tokens = prompt, tokens
        self.sites = resolve(self.model)
        self.cache = new_cache(self.model, prompt + tokens + 1)
        prefill(self.model, self.ids[:, :prompt], self.cache)
        self.engine = CpuEngine(note=print)
        self.decoder = Decoder.from_model(self.model, max_length=prompt + tokens + 2, engine=self.engine)
        grown = DynamicCache(config=self.model.config)
        prefill(self.model, self.ids[:, :prompt], grown)
        self.decoder.load_prefill(grown, self.ids[:, prompt])
        self.decoder.force(self.ids[:, prompt + 1 :])

    def run(self, plan: Plan) -> float:
        """Milliseconds a token."""
        self.decoder.set_plan(plan)
        self.decoder.start(self.ids[:, self.prompt], self.prompt)
        began = time.perf_counter()
        self.decoder.decode(self.tokens)
        return (time.perf_counter() - began) * 1e3 / self.tokens

    def eager(self) -> float:
        """Milliseconds a token of the model's own forward with a static cache."""
        cache = deepcopy(self.cache)
        position = torch.full((1, 1), self.prompt)
        began = time.perf_counter()
        for index in range(self.tokens):
            at = self.prompt + index
            model_step(self.model, self.ids[:, at : at + 1], position, cache)
            position = position + 1
        return (time.perf_counter() - began) * 1e3 / self.tokens

    def generate(self) -> float:
        """Milliseconds a token of the model's own `generate`, prefill taken off."""

        def timed(tokens: int) -> float:
            began = time.perf_counter()
            ids = self.ids[:, : self.prompt]
            self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens,
                max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip
            return (time.perf_counter() - began) * 1e3

        return (timed(self.tokens + 1) - timed(1)) / self.tokens

    def density(self, plan: Plan) -> float:
        """The share of the last products' rows that were read: neurons of down, or inputs of every projection."""
        self.run(plan)
        counters = self.engine.counters[id(plan)]
        for one in counters:
            one.read.zero_()
        self.run(plan)
        return sum(int(one.read) for one in counters) / (self.tokens * sum(one.total for one in counters))


def profile(bench: Bench, name: str, plan: Plan) -> None:
    """Where a token's time goes under a plan, by operator; with the rate of products that read every row."""
    state, weights = bench.decoder.state, bench.decoder.weights
    ops = StepBuilder(weights, state, as_gate_plan(plan, weights)).layers()
    bench.run(plan)
    seconds: dict[str, list[float]] = {}
    bytes_: dict[str, float] = {}
    programs = [(operator_name(op), op, Program([op], build.library())) for op in ops]
    for repetition in range(9):
        total = dict.fromkeys((kind for kind, _, _ in programs), 0.0)
        for kind, op, program in programs:
            began = time.perf_counter()
            program.run()
            total[kind] += time.perf_counter() - began
            if isinstance(op, Rows | Gated) and op.index is None and not repetition:
                size = (1 + isinstance(op, Gated)) * op.rows * op.width * weights.gate_up.element_size()
                bytes_[kind] = bytes_.get(kind, 0.0) + size
        for kind, value in total.items():
            seconds.setdefault(kind, []).append(value)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    print(f"  where a token's time goes, {name}: {sum(medians.values()) * 1e3:.2f} ms in all")
    for kind, value in sorted(medians.items(), key=lambda pair: -pair[1]):
        rate = f"{bytes_[kind] / value / 1e9:6.1f} GB/s" if kind in bytes_ else ""
        print(f"    {kind:24s} {value * 1e3:8.2f} ms {rate}")


def operator_name(op: Op) -> str:
    """The kind of an operator, with the size of its matrix."""
    match op:
        case Rows() | Gated() | NeuronSparse():
            return f"{type(op).__name__} {op.rows}x{op.width}"
        case Columns():
            return f"Columns {op.inputs}x{op.outputs}"
        case _:
            return type(op).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="any that actsparse loads, or random: the same shape")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, default=Path("shared/data/wikitext2-test.txt"))
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--share", type=float, default=0.5)
    asked = parser.parse_args()
    parts, share = asked.parts.split(","), asked.share
    bench = Bench(asked.model, asked.text, asked.prompt, asked.tokens, asked.dtype)
    weights, shape = bench.decoder.weights, bench.decoder.weights.shape
    gbps = read_gbps()
    size = weights.gate_up.element_size()
    dense_bytes = shape.step_bytes(position=asked.prompt, itemsize=size)
    print(
        f"{asked.model} {asked.dtype}, {torch.get_num_threads()} threads, prompt {asked.prompt}, {asked.tokens} tokens"
    )
    print(f"a read-only reduction: {gbps:.1f} GB/s; a dense step reads {dense_bytes / 1e6:.0f} MB")
    dense = DensePlan()
    profiled: dict[str, Plan] = {"dense": dense}

    def line(name: str, baseline: Callable[[], float], contender: Callable[[], float], note: str = "") -> None:
        found = paired(baseline, contender, pairs=asked.pairs)
        target = TARGETS.get(name)
        verdict = (
            "" if target is None else ("reached" if found.low > target or found.speedup >= target > 1 else "MISSED")
        )
        print(
            f"  {name:22s} {found.contender_ms:7.2f} ms against {found.baseline_ms:7.2f}"
            f"  {found.speedup:5.2f}x [{found.low:.2f}, {found.high:.2f}] {verdict} {note}",
            flush=True,
        )

    if "eager" in parts:
        line("dense over eager", bench.eager, lambda: bench.run(dense))
        print(f"  the model's own generate: {statistics.median(bench.generate() for _ in range(3)):.2f} ms a token")
    if "dense" in parts:
        ms = statistics.median(bench.run(dense) for _ in range(7))
        rate = dense_bytes / ms / 1e6
        print(f"  dense {ms:.2f} ms, {rate:.1f} GB/s, {rate / gbps:.0%} of the ceiling")
    kinds = (SiteKind.GATE, SiteKind.ATTN_IN, SiteKind.ATTN_OUT, SiteKind.MLP_IN, SiteKind.NEURON)
    seen = activations(bench.sites, bench.ids[:, : asked.prompt], kinds)
    down_rows = transpose_rows(weights.down)
    layers = range(shape.layers)

    def cut(layer: int, kind: SiteKind) -> float:
        return seen[layer, kind].abs().flatten().quantile(share).item()

    if "sliced" in parts:
        scores = torch.stack([seen[i, SiteKind.NEURON].square().mean(0) for i in layers])
        keep = round((1 - share) * shape.neurons)
        plan = sliced.empty_plan(weights, sliced.capacity_for(keep))
        began = time.perf_counter()
        sliced.select_top(plan.selection, scores, keep)
        chosen = time.perf_counter()
        sliced.fill(plan, weights, down_rows)
        print(f"  selection {(chosen - began) * 1e3:.1f} ms, gathering {(time.perf_counter() - chosen) * 1e3:.1f} ms")
        line(f"sliced {share * 100:.0f} %", lambda: bench.run(dense), lambda: bench.run(plan))
        profiled["index list"] = listed = IndexedPlan(down_rows=down_rows, selection=plan.selection)
        line(f"index list {share * 100:.0f} %", lambda: bench.run(dense), lambda: bench.run(listed))
    if "cats" in parts:
        threshold = torch.tensor([[cut(i, SiteKind.GATE)] for i in layers])
        profiled["cats"] = cats = NeuronPlan(threshold=threshold, down_rows=down_rows)
        line(
            f"cats {share * 100:.0f} %",
            lambda: bench.run(dense),
            lambda: bench.run(cats),
            f"density {bench.density(cats):.2f}",
        )
    if "teal" in parts:
        places = (SiteKind.ATTN_IN,) * 3 + (SiteKind.ATTN_OUT,) + (SiteKind.MLP_IN,) * 2 + (SiteKind.NEURON,)
        profiled["teal"] = teal = InputPlan(
            weights=input_rows(weights, down_rows),
            threshold=torch.tensor([[cut(i, k) for k in places] for i in layers]),
        )
        line(
            f"teal {share * 100:.0f} %",
            lambda: bench.run(dense),
            lambda: bench.run(teal),
            f"density {bench.density(teal):.2f}",
        )
    if "profile" in parts:
        for name, plan in profiled.items():
            profile(bench, name, plan)


if __name__ == "__main__":
    main()
