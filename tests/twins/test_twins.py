"""The shipped twins: one file damaged or missing is said at once, and the two differ in their activation alone."""

import json
import shutil
from pathlib import Path

import pytest

from actsparse import twins
from actsparse.errors import ActsparseError
from actsparse.models.load import load
from actsparse.specs import ModelSpec

SHIPPED = Path(twins.__file__).parent


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped files in a folder that may be damaged."""
    for name in ("silu", "relu"):
        shutil.copytree(SHIPPED / name, tmp_path / name)
    shutil.copy(SHIPPED / "checksums.json", tmp_path)
    monkeypatch.setattr(twins, "_HERE", tmp_path)
    return tmp_path


def test_a_flipped_byte_of_the_weights_is_named(copied: Path) -> None:
    weights = copied / "relu" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(ActsparseError, match="is damaged") as caught:
        load(ModelSpec(name="demo:relu", device="cpu"))
    assert str(weights) in caught.value.what
    assert "pip install" in caught.value.hint
    assert twins.directory("silu") == copied / "silu"


def test_a_missing_file_is_named(copied: Path) -> None:
    (copied / "silu" / "tokenizer.json").unlink()
    with pytest.raises(ActsparseError, match=r"tokenizer\.json is missing"):
        twins.directory("silu")


def test_they_differ_in_their_activation_alone() -> None:
    configs = [json.loads((SHIPPED / name / "config.json").read_text()) for name in ("silu", "relu")]
    assert [one.pop("hidden_act") for one in configs] == ["silu", "relu"]
    assert configs[0] == configs[1]
    assert len({(SHIPPED / name / "tokenizer.json").read_bytes() for name in ("silu", "relu")}) == 1
    assert all((SHIPPED / name / "model.safetensors").stat().st_size < 16e6 for name in ("silu", "relu"))


def test_the_log_keeps_the_bar() -> None:
    """Held out within 0.15 nats of training; the two within 3 % of each other."""
    final = json.loads((SHIPPED / "train" / "log.json").read_text())["training"]["final"]
    assert all(one["held_out"] - one["train"] < 0.15 for one in final.values())
    assert abs(final["relu"]["held_out"] / final["silu"]["held_out"] - 1) < 0.03
