"""The memory of a profile does not grow with the number of tokens, once the reservoir is full."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

PROFILE = """
import json, resource, sys
from pathlib import Path
from actsparse import DataSpec, ModelSpec, ProfileSpec, profile
model, prompts, output = sys.argv[1:]
run = profile(ProfileSpec(model=ModelSpec(name=model), data=DataSpec(prompts=(prompts,)), reservoir_tokens=64,
                          output=Path(output)))
tokens = run.measures.filter(metric="tokens")["value"][0]
print(json.dumps([tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
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
