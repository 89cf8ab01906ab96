"""Records and requests that the tests of the store share."""

from pathlib import Path
from typing import Any

from actsparse.results import ModelRecord, RunKind, StepBytes, TextRecord
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.run import RunRequest

MODEL = ModelRecord(
    requested="demo",
    resolved="tiny/model",
    revision=None,
    model_type="llama",
    activation="silu",
    gated=True,
    layers=2,
    hidden_size=8,
    intermediate_size=16,
    heads=2,
    kv_heads=1,
    head_dim=4,
    vocab_size=32,
    parameters=1000,
    tied_embeddings=True,
    max_positions=None,
    dtype="float32",
    bytes_per_weight=4.5,
    step=StepBytes(
        layers=2,
        mlp={"gate": 512, "up": 512, "down": 512},
        projections={"q": 80, "k": 80, "v": 80, "o": 80},
        attention=640,
        head=1024,
        total=4800,
    ),
    quantization="Q4_1",
    weights_sha256="aa",
    config_sha256="bb",
    tokenizer_sha256="cc",
)
TEXT = TextRecord(
    role="quality", source="a.txt", sha256="dd", sequences=2, tokens=20, block_length=10, prompt_length=5, blocks=(0, 2)
)
SPEC = ProfileSpec(model=ModelSpec(name="demo"), data=DataSpec(limit=4))


def request(path: Path, *, kind: RunKind = RunKind.PROFILE, asked: Any = "griffin", **changes: Any) -> RunRequest:
    """A run at `path` whose identity is `asked`."""
    given: dict[str, Any] = {
        "kind": kind,
        "identity": {"asked": {"plan": asked, "data": {"limit": 4}}, "text": "dd"},
        "spec": SPEC,
        "model": MODEL,
        "texts": (TEXT,),
        "output": path,
        "root": Path("runs"),
        "device": "cpu",
        "threads": 1,
    }
    return RunRequest(**given | changes)
