"""What recording costs: a profile's pass over a plain forward pass of the same tokens, in wall and CPU time.

    python benchmarks/profile_overhead.py --model smollm2
    python benchmarks/profile_overhead.py --shape llama-2-7b --device cuda --dtype bfloat16 --batch 8 --length 512

Plain and recorded passes run in turn (A B A B ...), `--batches` of them after one another, as a profile does it; the
ratio is the median over pairs. `layers` is the model without
its head, which is all that a profile runs; `model` is what people call a forward pass, head and logits included.
`memory` is what recording holds beyond the model and the plain pass: the peak on a GPU, the growth of the process on a
CPU. `held` is counted tensor by tensor: the sums of all statistics, constants of the weights, and the sample, which
`--reservoir-mb` bounds; with fewer `--layers` than a shape has, also for all of them. A shape has random weights.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from actsparse.core.reservoir import capacity
from actsparse.models.load import DTYPES, LoadedModel, load, resolve_device
from actsparse.models.sites import resolve
from actsparse.pipelines.batches import padded
from actsparse.pipelines.profile_state import ProfileState
from actsparse.pipelines.recording import Recorder
from actsparse.specs import ModelSpec

SHAPES = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip


def random_model(shape: str, dtype: torch.dtype, device: torch.device, layers: int | None) -> LoadedModel:
    """A Llama of this shape with random weights, dressed as a loaded model."""
    settings = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(**settings, max_position_embeddings=4096)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    dressed = load(ModelSpec(name="demo", device="cpu"))
    record = replace(
        dressed.record,
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
    )
    return LoadedModel(model, dressed.tokenizer, resolve(model), record)


def timed(work: Callable[[], object], times: int, device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of `work`, done so many times."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def held(state: ProfileState, recorder: Recorder, layers: int, bound: int) -> str:
    """What recording holds, in MB, for `layers` layers: sums and constants grow with them, the sample to its bound."""
    tensors = state.tensors()
    sample = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith("reservoir")) / 2**20
    sums = sum(tensor.nbytes for tensor in tensors.values()) / 2**20 - sample
    constants, factor = recorder.constant_bytes / 2**20, layers / len(state.layers)
    whole = min(sample * factor, max(sample, bound))
    parts = f"{sums * factor:.0f} MB sums, {constants * factor:.0f} MB constants, {whole:.0f} MB sample"
    return f"{(sums + constants) * factor + whole:.0f} MB ({parts}) in {layers} layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="layers of a shape, fewer than it has")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=4, help="sequences in a pass")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batches", type=int, default=1, help="passes in a row that are timed together")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--reservoir-mb", type=int, default=512)
    asked = parser.parse_args()
    device = resolve_device(asked.device)
    if asked.model:
        loaded = load(ModelSpec(name=asked.model, device=str(device), dtype=asked.dtype))
    else:
        loaded = random_model(asked.shape or "smollm2-135m", DTYPES[asked.dtype], device, asked.layers)
    shape, layers = loaded.record, tuple(range(loaded.record.layers))
    seed = torch.Generator().manual_seed(0)
    sequences = tuple(torch.randint(shape.vocab_size, (asked.batch, asked.length), generator=seed))
    batch = padded(sequences, [4] * asked.batch)
    ids = batch.input_ids.to(device)

    @torch.no_grad()
    def layers_alone() -> None:
        loaded.model.base_model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def whole_model() -> None:
        loaded.model(input_ids=ids, use_cache=False)

    layers_alone(), whole_model()
    before = peak_mb(device)
    slots = capacity(4096, asked.reservoir_mb, len(layers), shape.intermediate_size, loaded.model.dtype.itemsize)
    state = ProfileState.empty(loaded, layers, slots)
    recorder = Recorder(loaded, state, seed=0)
    recorder.record(batch)
    arms = {"layers": layers_alone, "model": whole_model, "recorded": lambda: recorder.record(batch)}
    laps = [{name: timed(work, asked.batches, device) for name, work in arms.items()} for _ in range(asked.pairs)]
    tokens = asked.batches * asked.batch * asked.length
    name = asked.model or f"{asked.shape or 'smollm2-135m'} ({len(layers)} layers)"
    passes = f"{asked.batches} x {asked.batch} x {asked.length} tokens"
    print(f"{name}, {asked.dtype} on {device}, {passes}, {torch.get_num_threads()} threads")
    print(f"{'':10}{'wall us/token':>15}{'CPU us/token':>15}")
    for arm in arms:
        wall, cpu = (statistics.median(lap[arm][place] for lap in laps) / tokens * 1e6 for place in (0, 1))
        print(f"{arm:10}{wall:15.1f}{cpu:15.1f}")
    for arm in ("layers", "model"):
        wall, cpu = (statistics.median(lap["recorded"][i] / lap[arm][i] for lap in laps) for i in (0, 1))
        print(f"recorded / {arm}: {wall:.2f}x wall, {cpu:.2f}x CPU")
    print(f"memory beyond the model and the plain pass: {peak_mb(device) - before:.0f} MB")
    print(f"held: {held(state, recorder, len(layers), asked.reservoir_mb)}")
    whole = SHAPES[asked.shape]["num_hidden_layers"] if asked.shape else len(layers)
    if whole != len(layers):
        print(f"held: {held(state, recorder, whole, asked.reservoir_mb)}")


if __name__ == "__main__":
    main()
