"""What memory is held: a profile's does not grow with its tokens once the reservoir is full, and models are let go."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from actsparse import DataSpec, EvalSpec, ModelSpec, ProfileSpec, ThresholdSpec, evaluate, profile, sparsify, threshold
from actsparse.models.load import load

PROFILE = """
import json, resource, sys
from pathlib import Path
from actsparse import DataSpec, ModelSpec, ProfileSpec, profile
model, prompts, output = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = profile(ProfileSpec(model=ModelSpec(name=model), data=DataSpec(prompts=(prompts,)), reservoir_tokens=64,
                          output=Path(output)))
tokens = run.measures.filter(metric="tokens")["value"][0]
print(json.dumps([tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


def test_peak_memory_does_not_grow_with_ten_times_the_prompts(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "model")
    measured = []
    for count in (100, 1000):
        prompts = tmp_path / f"{count}.jsonl"
        words = ["the", "river", "runs", "under", "old", "bridge", "over", "grey", "stones"]
        texts = (" ".join(words[(i + j) % len(words)] for j in range(60)) for i in range(count))
        prompts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        command = [sys.executable, "-c", PROFILE, str(model), str(prompts), str(tmp_path / f"run{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    (few, small), (many, large) = measured
    assert many == pytest.approx(10 * few, rel=0.01)
    assert large <= 1.05 * small


@pytest.fixture
def nothing_cyclic() -> Iterator[None]:
    """Fails where the test leaves weights or activations for the garbage collector to find."""
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    # by type, since a dead weak proxy has no class to ask; the configuration lays every model out without memory first
    tensors = (one for one in gc.garbage if issubclass(type(one), torch.Tensor))
    found = [one for one in tensors if one.device.type != "meta"]
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()
    assert not [tuple(one.shape) for one in found]


@pytest.mark.parametrize("model", ["llama", "olmoe"])
@pytest.mark.usefixtures("nothing_cyclic")
def test_commands_leave_no_weights_in_cycles_of_references(
    model: str, tiny_folder: Callable, prompts_file: Path, corpus_file: Path, tmp_path: Path
) -> None:
    name = ModelSpec(name=str(tiny_folder(model)))
    probes = ("uncertainty", "inertia", "union", "gradients")
    prompts = DataSpec(prompts=(str(prompts_file),))
    run = profile(ProfileSpec(model=name, data=prompts, probes=probes, output=tmp_path / "profile"))
    threshold(ThresholdSpec(run=run.path, plan="griffin@0.5", output=tmp_path / "plan"))
    text = DataSpec(corpus=str(corpus_file), limit=2, block_length=24, prompt_length=12)
    plans = ("griffin@0.5", "cats@0.5", str(tmp_path / "plan"), *(("teal@0.3", "tda@0.5") if model == "llama" else ()))
    evaluate(
        EvalSpec(
            model=name, data=text, plans=plans, timing_pairs=1, timing_tokens=3, generations=1, max_new_tokens=3,
            output=tmp_path / "eval",
        )
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:this plan is not clearly")
@pytest.mark.usefixtures("nothing_cyclic")
def test_a_sparsified_model_is_let_go(tiny_folder: Callable) -> None:
    loaded = load(ModelSpec(name=str(tiny_folder("llama"))))
    ids = torch.arange(4, 12)[None]
    with sparsify(loaded.model, "griffin@0.5"):
        loaded.model.generate(ids, max_new_tokens=4, do_sample=False)
