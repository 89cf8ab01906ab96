"""Names of models, and what is wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny import (
    CONFIGS,
    EXPERTS,
    FFN,
    FFN_WIDTHS,
    HEADS,
    HIDDEN,
    LAYERS,
    TOP_K,
    VOCAB,
    WIDTHS,
    make_model,
    make_tokenizer,
    save_tiny,
)  # fmt: skip

from actsparse.errors import ModelError
from actsparse.models.load import load
from actsparse.specs import ModelSpec

Folder = Callable[[str], Path]


def refused(name: object, **options: object) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(ModelSpec(name=str(name), **options))
    assert caught.value.hint
    return caught.value


@pytest.fixture
def copied(tiny_folder: Folder, tmp_path: Path) -> Path:
    """A tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "llama"))


def changed(folder: Path, **values: object) -> None:
    """The configuration with other values."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def hub_error(kind: type[Exception]) -> Exception:
    """An error of the hub's client, without the HTTP answer that its constructor wants."""
    error = kind.__new__(kind)
    Exception.__init__(error, "refused by the hub")
    return error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | Exception], list[tuple[str, dict]]]:
    """Replace the hub's client by one that answers with a folder or an error; the calls that it got."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def answer(found: Path | Exception) -> list[tuple[str, dict]]:
        calls: list[tuple[str, dict]] = []

        def snapshot_download(name: str, **options: object) -> str:
            calls.append((name, options))
            if isinstance(found, Exception):
                raise found
            return str(found)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return calls

    return answer


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_directory_of_every_family_loads_with_its_record(family: str, tiny_loaded: Callable) -> None:
    loaded = tiny_loaded(family)
    record = loaded.record
    assert (record.model_type, record.layers, record.hidden_size) == (family, LAYERS, HIDDEN)
    assert (record.intermediate_size, record.heads, record.vocab_size) == (WIDTHS[family], HEADS, VOCAB)
    # widths from the matrices themselves, not from the configuration
    layer = loaded.sites.layers[0]
    width = layer.output_matrix(record.heads * record.head_dim).shape[1]
    assert width == record.heads * record.head_dim
    matrices = 3 if record.gated else 2
    read = sum(FFN_WIDTHS[family])
    if record.experts is not None:
        assert (record.experts.count, record.experts.top_k, record.experts.width) == (EXPERTS, TOP_K, FFN)
        read -= (EXPERTS - TOP_K) * FFN
    assert record.step.mlp_total == LAYERS * matrices * read * HIDDEN * 4
    parameters = {id(p): p.numel() for p in loaded.model.parameters()}
    embedding = loaded.model.get_input_embeddings().weight
    tied = embedding is loaded.model.get_output_embeddings().weight
    assert record.parameters == sum(parameters.values())
    idle = LAYERS * matrices * (sum(FFN_WIDTHS[family]) - read) * HIDDEN
    assert record.step.total == 4 * (sum(parameters.values()) - (0 if tied else embedding.numel()) - idle)
    assert record.tied_embeddings == tied
    assert record.dtype == "float32"
    assert record.bytes_per_weight == pytest.approx(4, abs=0.5)
    assert not loaded.model.training


def test_the_tokenizer_comes_from_the_directory(tiny_loaded: Callable) -> None:
    assert tiny_loaded("llama").tokenizer("w0 w1").input_ids == [1, 4, 5]


def test_grouped_heads_are_counted(tiny_loaded: Callable) -> None:
    assert tiny_loaded("llama").record.kv_heads == 2
    assert tiny_loaded("gpt2").record.kv_heads == HEADS


def test_multi_query_falcon_has_one_group(tmp_path: Path) -> None:
    from tiny import save_tiny

    changes = {"multi_query": True, "new_decoder_architecture": False}
    base = CONFIGS["falcon"]
    CONFIGS["falcon"] = {key: value for key, value in base.items() if key != "multi_query"}
    try:
        folder = save_tiny("falcon", tmp_path / "falcon", **changes)
    finally:
        CONFIGS["falcon"] = base
    loaded = load(ModelSpec(name=str(folder)))
    head_dim = HIDDEN // HEADS
    fused = loaded.sites.layers[0].qkv[0].weight.shape[0]
    assert fused == HIDDEN + 2 * head_dim
    assert loaded.record.kv_heads == 1


def test_the_hash_follows_the_content_of_weights(copied: Path, tiny_loaded: Callable) -> None:
    same = load(ModelSpec(name=str(copied))).record
    assert same.weights_sha256 == tiny_loaded("llama").record.weights_sha256
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert load(ModelSpec(name=str(copied))).record.weights_sha256 != same.weights_sha256


def test_dtype_is_as_asked(copied: Path) -> None:
    loaded = load(ModelSpec(name=str(copied), dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.record.dtype == "bfloat16"
    assert loaded.record.step.mlp_total == LAYERS * 3 * FFN * HIDDEN * 2


def test_directory_without_config(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(tmp_path).what


def test_directory_with_a_gguf_only(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert str(tmp_path / "m.gguf") in refused(tmp_path).hint


def test_metas_original_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    error = refused(tmp_path)
    assert "consolidated" in error.what
    assert "meta-llama/Llama-2-7b-hf" in error.hint


def test_a_model_that_is_not_a_causal_lm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert "'t5' is not a causal language model" in refused(tmp_path).what


def test_an_unsupported_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "codegen"}))
    assert "'codegen' is not supported" in refused(tmp_path).what


def test_a_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    assert "no_such_type" in refused(tmp_path).what


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{nonsense")
    assert "config.json" in refused(tmp_path).what


def test_unknown_dtype(tiny_folder: Folder) -> None:
    error = refused(tiny_folder("llama"), dtype="float13")
    assert "'float13'" in error.what
    assert "bfloat16" in error.hint


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_unknown_device(tiny_folder: Folder, device: str) -> None:
    assert f"'{device}'" in refused(tiny_folder("llama"), device=device).what


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Token ids beyond the embeddings: the files of two models in one directory."""
    make_model("llama", vocab_size=VOCAB - 20).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    error = refused(tmp_path)
    assert f"token ids up to {VOCAB - 1}" in error.what
    assert f"{VOCAB - 20} embeddings" in error.what
    assert "tokenizer" in error.hint


def test_missing_gguf(tmp_path: Path) -> None:
    assert str(tmp_path / "none.gguf") in refused(tmp_path / "none.gguf").what


def test_damaged_gguf_leaves_no_half_converted_directory(tmp_path: Path, own_home: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf file at all")
    assert str(tmp_path / "bad.gguf") in refused(tmp_path / "bad.gguf").what
    assert not list((own_home / "models").glob("bad*")) + list((own_home / "models").glob("tmp*"))


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt" in refused(tmp_path / "notes.txt").what


def test_missing_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "the weights of llama" in refused(copied).what


def test_damaged_weights(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "the weights of llama" in refused(copied).what


def test_truncated_weights(copied: Path) -> None:
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "the weights of llama" in refused(copied).what


def test_weights_of_another_shape(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * FFN}))
    assert "the weights of llama" in refused(copied).what


def test_weights_that_lack_a_matrix(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    # transformers would draw the missing matrix at random and go on
    assert "model.layers.1.mlp.down_proj.weight" in refused(copied).what


def test_missing_tokenizer(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert "the tokenizer of llama" in refused(copied).what


def test_a_name_that_cannot_be_a_hub_id() -> None:
    assert "'no such model!'" in refused("no such model!").what


def test_llama_2_7b_becomes_hf_with_one_note(hub: Callable, tiny_folder: Folder) -> None:
    calls = hub(tiny_folder("llama"))
    notes: list[str] = []
    loaded = load(ModelSpec(name="meta-llama/Llama-2-7b"), notes.append)
    assert [name for name, _ in calls] == ["meta-llama/Llama-2-7b-hf"]
    assert len(notes) == 1
    assert "meta-llama/Llama-2-7b-hf" in notes[0]
    assert (loaded.record.requested, loaded.record.resolved) == ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b-hf")


def test_a_hub_id_passes_revision_and_leaves_pickles_out(hub: Callable, tiny_folder: Folder) -> None:
    calls = hub(tiny_folder("llama"))
    notes: list[str] = []
    load(ModelSpec(name="meta-llama/Llama-2-7b-hf", revision="abc"), notes.append)
    name, options = calls[0]
    assert (name, options["revision"], options["local_files_only"]) == ("meta-llama/Llama-2-7b-hf", "abc", False)
    assert not any(pattern.endswith((".bin", ".pth", ".py")) for pattern in options["allow_patterns"])
    assert notes == []


def test_unknown_repository(hub: Callable) -> None:
    hub(hub_error(RepositoryNotFoundError))
    assert "'someone/nothing'" in refused("someone/nothing").what


def test_gated_repository(hub: Callable) -> None:
    hub(hub_error(GatedRepoError))
    error = refused("meta-llama/Llama-2-7b-hf")
    assert "gated" in error.what
    assert "HF_TOKEN" in error.hint


def test_offline_without_a_copy(hub: Callable) -> None:
    calls = hub(LocalEntryNotFoundError("not in the cache"))
    error = refused("someone/model", offline=True)
    assert calls[0][1]["local_files_only"] is True
    assert "offline" in error.what


def test_no_network(hub: Callable) -> None:
    hub(OSError("name resolution failed"))
    assert "'someone/model'" in refused("someone/model").what


def test_a_repository_with_pickles_only(hub: Callable, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub(tmp_path)
    assert "safetensors" in refused("someone/model").what


def test_a_device_map_that_does_not_fit_is_said(tiny_folder: Callable) -> None:
    name = str(tiny_folder("llama"))
    with pytest.raises(ModelError, match="no device map 'sideways'"):
        load(ModelSpec(name=name, device_map="sideways"))
    with pytest.raises(ModelError, match="both --device cpu and --device-map auto"):
        load(ModelSpec(name=name, device="cpu", device_map="auto"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_spread_or_offloaded_model_records_what_it_does_in_one_place(
    family: str, tiny_folder: Callable, tiny_loaded: Callable, tmp_path: Path
) -> None:
    from accelerate import cpu_offload
    from tiny import FFN, token_ids

    from actsparse.pipelines.batches import padded
    from actsparse.pipelines.profile_state import ProfileState
    from actsparse.pipelines.recording import Recorder

    plain = tiny_loaded(family)
    spread = load(ModelSpec(name=str(tiny_folder(family)), device_map="auto"))
    offloaded = load(ModelSpec(name=str(tiny_folder(family)), device="cpu"))
    cpu_offload(offloaded.model, execution_device=torch.device("cpu"))
    down = offloaded.sites.layers[1].down.weight
    assert down.is_meta
    for other in (spread, offloaded):
        layers = zip(plain.sites.layers, other.sites.layers, strict=True)
        for one, same in layers:
            torch.testing.assert_close(one.down_matrix(FFN).cpu(), same.down_matrix(FFN).cpu(), rtol=1e-4, atol=1e-6)
    batch = padded(tuple(token_ids(3, 20)), [4, 4, 4])
    states = []
    for loaded in (plain, spread, offloaded):
        state = ProfileState.empty(loaded, (0, 1), 8)
        Recorder(loaded, state, seed=0).record(batch)
        states.append(state.on_host())
    for site, moments in states[0].moments.items():
        for other in states[1:]:
            torch.testing.assert_close(other.moments[site].sums, moments.sums, rtol=1e-4, atol=1e-3)
            assert other.moments[site].count == moments.count


def test_a_type_that_transformers_does_not_know_names_a_row_and_how_to_bring_it(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "odd")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"model_type": "llama"', '"model_type": "qwen22"'))
    with pytest.raises(ModelError, match="'qwen22' is not supported") as caught:
        load(ModelSpec(name=str(folder), device="cpu"))
    assert "`actsparse models qwen2 > row.toml`" in caught.value.hint
    assert "--family row.toml" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "tensor", "shapes"),
    [
        ("vocab_size", "lm_head.weight",
         f"[{VOCAB}, {HIDDEN}] in the file, and [200, {HIDDEN}] by config.json (and 1 more)"),
        ("intermediate_size", "model.layers.0.mlp.down_proj.weight",
         f"[{HIDDEN}, {FFN}] in the file, and [{HIDDEN}, 200] by config.json (and 5 more)"),
    ],
)  # fmt: skip
def test_weights_of_another_shape_are_named_with_both_shapes(
    key: str, tensor: str, shapes: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(copied, **{key: 200})
    error = refused(copied)
    assert f"{tensor} is {shapes}" in error.what
    assert "ignore_mismatched_sizes" not in error.what
    assert capsys.readouterr().err == "", "transformers says nothing of its own"


def test_weights_without_a_place_are_told(copied: Path) -> None:
    held = load_file(copied / "model.safetensors")
    save_file(held | {"model.extra": torch.zeros(2)}, copied / "model.safetensors", {"format": "pt"})
    told: list[str] = []
    load(ModelSpec(name=str(copied), device="cpu"), told.append)
    assert told == ["the model has no place for some weights of llama, left out: model.extra"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", "x", "Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int"),
        ("hidden_act", "nope", "'nope' is not known"),
    ],
)
def test_the_fault_of_a_configuration_is_told_whole(key: str, value: str, said: str, copied: Path) -> None:
    changed(copied, **{key: value})
    assert said in refused(copied).what
