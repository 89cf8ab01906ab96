"""A row of the family table as a file: what it may say, what is refused, and that a model runs with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from actsparse.cli.app import main
from actsparse.errors import ModelError
from actsparse.models.families import FAMILIES
from actsparse.models.family_file import as_toml, read_family
from actsparse.models.load import load
from actsparse.specs import ModelSpec


def row_file(folder: Path, text: str) -> Path:
    path = folder / "row.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_row_survives_being_written_and_read(family: str, tmp_path: Path) -> None:
    assert read_family(row_file(tmp_path, as_toml(FAMILIES[family]))).row == FAMILIES[family]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_row_says_what_transformers_says_of_its_type(family: str) -> None:
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model(family))]
    row = FAMILIES[family]
    assert row.static_cache == bool(cls._can_compile_fullgraph)
    assert row.attention_interface == cls._can_set_attn_implementation()
    assert (row.experts is not None) == cls._can_set_experts_implementation()


def test_the_hash_follows_what_a_row_says(tmp_path: Path) -> None:
    plain = read_family(row_file(tmp_path, as_toml(FAMILIES["llama"])))
    like = read_family(row_file(tmp_path, '# a comment\nlike = "llama"\nmodel_type = "llama"\n'))
    other = read_family(row_file(tmp_path, 'like = "llama"\nmodel_type = "llama"\ndown = "fc2"\n'))
    assert plain.sha256 == like.sha256 != other.sha256


@pytest.mark.parametrize(
    ("text", "named", "hint"),
    [
        ('model_type = "x"\ndwon = "w2"\n', "'dwon'", "'down'"),
        ('down = "w2"\n', "model_type", "model_type"),
        ('like = "llama"\n', "model_type", "model_type"),
        ('like = "lama"\nmodel_type = "x"\n', "'lama'", "'llama'"),
        ('model_type = "x"\ndown = 3\n', "down must be", "correct"),
        ('model_type = "x"\ntransposed = "yes"\n', "transposed must be true or false", "correct"),
        ('model_type = "x"\nqkv = "q"\n', "qkv must be a list", "qkv = "),
        ("model_type = \n", "is not TOML", "actsparse models"),
        ("#" * 70_000, "70000 bytes", "one row"),
    ],
)
def test_a_wrong_row_is_refused(text: str, named: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_family(row_file(tmp_path, text))
    assert named in caught.value.what
    assert hint in caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.toml cannot be read"):
        read_family(tmp_path / "none.toml")


def test_a_type_that_the_table_lacks_runs_with_its_row(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delitem(FAMILIES, "olmo2")
    spec = ModelSpec(name=str(tiny_folder("olmo2")), device="cpu")
    with pytest.raises(ModelError) as caught:
        load(spec)
    assert "--family row.toml" in caught.value.hint
    assert "actsparse models" in caught.value.hint
    row = row_file(tmp_path, 'like = "llama"\nmodel_type = "olmo2"\n')
    loaded = load(ModelSpec(name=spec.name, device="cpu", family=str(row)))
    assert loaded.record.family_sha256 == read_family(row).sha256


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('like = "llama"\nmodel_type = "llama"\ndown = "fc2"\n', "'fc2'"),
        ('like = "llama"\nmodel_type = "llama"\nlayers = "model.blocks"\n', "'model.blocks'"),
        ('like = "llama"\nmodel_type = "qwen9"\n', "'qwen9'"),
    ],
)
def test_a_row_that_does_not_fit_the_model_names_the_path(
    text: str, named: str, tiny_folder: Callable[[str], Path], prompts_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    row = row_file(tmp_path, text)
    line = ["profile", "-m", str(tiny_folder("llama")), "--prompts", str(prompts_file), "--family", str(row), "-q"]
    assert main([*line, "-o", str(tmp_path / "run")]) == 1
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_row_is_another_run(tiny_folder: Callable[[str], Path], prompts_file: Path, tmp_path: Path) -> None:
    line = ["profile", "-m", str(tiny_folder("llama")), "--prompts", str(prompts_file), "-n", "2", "-q"]
    row = row_file(tmp_path, 'like = "llama"\nmodel_type = "llama"\n')
    found = []
    for name, extra in (("a", []), ("b", ["--family", str(row)]), ("c", ["--family", str(row)])):
        assert main([*line, *extra, "-o", str(tmp_path / name)]) == 0
        found.append(json.loads((tmp_path / name / "manifest.json").read_text())["fingerprint"])
    assert found[0] != found[1] == found[2]


def test_models_lists_every_row_with_its_support(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["models", "--json"]) == 0
    found = {one["model_type"]: one for one in json.loads(capsys.readouterr().out)}
    assert set(found) == set(FAMILIES)
    assert [found[name]["engine_tier"] for name in ("llama", "gemma3_text", "gpt2", "mpt", "mixtral")] == [
        1,
        1,
        2,
        3,
        3,
    ]
    assert [found[name]["neurons"] for name in ("llama", "mixtral")] == ["yes", "per expert"]
    assert [found[name]["heads"] for name in ("llama", "bloom")] == ["masks and KV policies", "norms only"]
    assert main(["models"]) == 0
    assert "gpt_neox" in capsys.readouterr().out
    assert main(["models", "phi3"]) == 0
    assert read_family(row_file(tmp_path, capsys.readouterr().out)).row == FAMILIES["phi3"]
    assert main(["models", "lama"]) == 1
    assert "'llama'" in capsys.readouterr().err
