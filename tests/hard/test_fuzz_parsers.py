"""Every parser of text that people or strangers write: whatever it is given, only errors of ours come out."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from fuzzing import VALUES, fuzzed, mutated_bytes, mutated_json, only_ours
from hypothesis import example, given
from hypothesis import strategies as st

from actsparse.cli.app import read_config
from actsparse.cli.options import block_range, counts, layer_list, share, shares
from actsparse.data.prompts import read_prompts
from actsparse.data.tasks import final_number, parse_dense_upto, read_task
from actsparse.methods.registry import all_methods
from actsparse.methods.short import expand, parse
from actsparse.models.families import FAMILIES
from actsparse.models.family_file import as_toml, read_family
from actsparse.models.gguf_header import read_header
from actsparse.store.codec import encode

PROMPT = {"text": "one two", "messages": [{"role": "user", "content": "three"}]}
CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 1}
QUESTION = {"question": "q", "answer": "#### 18"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def deep(depth: int) -> bytes:
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}"


@fuzzed(60)
@given(data=st.binary(max_size=60) | mutated_json(PROMPT) | mutated_bytes(json.dumps(PROMPT).encode()))
@example(data=deep(100_000))
@example(data=b'{"text": ' + b"9" * 5000 + b"}")
def test_prompts(folder: Path, data: bytes) -> None:
    for name in ("p.jsonl", "p.txt"):
        (folder / name).write_bytes(data)
        for prompt in only_ours(read_prompts, [str(folder / name)]) or ():
            assert prompt.content.strip()
            prompt.content.encode()


@fuzzed(60)
@given(data=mutated_json(CHOICE) | mutated_json(QUESTION) | mutated_bytes(json.dumps(CHOICE).encode()))
@example(data=b'{"question": "q", "answer": ' + b"9" * 5000 + b"}")
@example(data=b'{"question": "q", "answer": "#### 1e999999999"}')
@example(data=b'{"query": "q\\ud800", "choices": ["a", "b"], "gold": 0}')
def test_tasks(folder: Path, data: bytes) -> None:
    (folder / "task.jsonl").write_bytes(data)
    task = only_ours(read_task, str(folder / "task.jsonl"))
    for item in task.items if task else ():
        item.shown.encode()


@fuzzed(60)
@given(text=st.text(max_size=30))
def test_small_parsers(text: str) -> None:
    for parser in (block_range, layer_list, parse_dense_upto):
        only_ours(parser, text)
    for parser in (counts, shares, share):
        only_ours(parser, text, "--x")
    final_number(text)


@pytest.mark.parametrize(
    "text", ["²", "²:³", "1-²", "9" * 5000, f"0-{10**12}", f"1:{'9' * 5000}", "P-²", "nan", "1e-320"]
)
def test_small_parsers_on_numbers_that_are_none(text: str) -> None:
    for parser in (block_range, layer_list, parse_dense_upto):
        only_ours(parser, text)
    for parser in (counts, shares, share):
        only_ours(parser, text, "--x")


OPTION = st.tuples(
    st.sampled_from(["stat", "k", "seed", "protect", "target_error", "allocation", "rank", "refresh_every", "x"]),
    st.sampled_from(["0", "-1", "0.5", "nan", "inf", "1e999", "true", "²", "9" * 5000, "", "../x", "n", "griffin"])
    | st.text(max_size=6),
).map("=".join)
SHORT = st.tuples(
    st.sampled_from(sorted(all_methods())),
    st.lists(OPTION, max_size=3).map(",".join),
    st.sampled_from(["0.5", "50%", "1", "nan", "-0", "0.1:0.9:0.2", "0:0.9:1e-320", "", "1e999"]) | st.text(max_size=6),
).map(lambda parts: f"{parts[0]}:{parts[1]}@{parts[2]}")


@fuzzed(150)
@given(text=SHORT | st.text(max_size=30))
@example(text="griffin@0.1:0.9:1e-320")
@example(text="griffin@0:0.9:5e-324")
def test_short_forms(text: str) -> None:
    for one in only_ours(expand, text) or ():
        short = only_ours(parse, one)
        if short is not None:
            encode(short.method.options | short.add_ons.options)


@fuzzed(60)
@given(
    data=st.binary(max_size=60)
    | st.sampled_from(sorted(FAMILIES)).flatmap(lambda name: mutated_bytes(as_toml(FAMILIES[name]).encode()))
    | st.tuples(st.sampled_from(["like", "model_type", "qkv", "gate", "mlp", "experts"]), VALUES).map(
        lambda pair: f"like = 'llama'\nmodel_type = 'x'\n{pair[0]} = {json.dumps(pair[1])}".encode()
    )
)
@example(data=b"a = " + b"[" * 5_000 + b"]" * 5_000)
@example(data=b"[" + b"a." * 20_000 + b"a]")
def test_family_rows(folder: Path, data: bytes) -> None:
    (folder / "row.toml").write_bytes(data)
    only_ours(read_family, folder / "row.toml")


@fuzzed(40)
@given(
    data=st.binary(max_size=40) | mutated_bytes(b"[profile]\nlimit = 8\nprompts = ['a', 'b']\n[run]\nforce = true\n")
)
@example(data=b"a = " + b"[" * 50_000 + b"]" * 50_000)
@example(data=b"a = 1\n" * 1_000_000)
def test_configuration_files(folder: Path, data: bytes) -> None:
    (folder / "c.toml").write_bytes(data)
    only_ours(read_config, folder / "c.toml", {"profile": {"limit": "limit", "prompts": "prompts"}, "run": {}})


@pytest.fixture(scope="module")
def gguf(folder: Path) -> bytes:
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(folder / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (folder / "small.gguf").read_bytes()


@fuzzed(150)
@given(draws=st.data())
def test_gguf_headers(folder: Path, gguf: bytes, draws: st.DataObject) -> None:
    data = draws.draw(mutated_bytes(gguf) | st.binary(max_size=60).map(lambda tail: gguf[:8] + tail))
    (folder / "g.gguf").write_bytes(data)
    header = only_ours(read_header, folder / "g.gguf")
    with suppress(AttributeError):
        assert len(header.shapes) <= len(data)
