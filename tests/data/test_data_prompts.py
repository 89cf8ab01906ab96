import json
from pathlib import Path

import pytest

from actsparse.data.prompts import read_prompts, read_text, sample_prompts
from actsparse.errors import DataError


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(*paths: str) -> list[str]:
    return [prompt.text for prompt in read_prompts(paths)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one", ["one"]),
        ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
        ("\n\n\none\n\n\n\ntwo\n\n", ["one", "two"]),
        ("one\r\ntwo\r\n\r\nthree", ["one\ntwo", "three"]),
        ("  indented\n\n\ttoo", ["  indented", "\ttoo"]),
        ("one\n   \ntwo", ["one", "two"]),
        ("é\u2028ü\n\n日本", ["é\u2028ü", "日本"]),
    ],
)
def test_blank_lines_part_the_prompts_of_a_text_file(tmp_path, content, expected):
    assert texts(write(tmp_path, "p.txt", content)) == expected


def test_json_lines_give_text_prompt_or_messages(tmp_path):
    messages = [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "ho"}]
    lines = [{"text": "a"}, {"prompt": "b", "n": 1}, {"messages": messages}, {"text": " ", "prompt": "c"},
             {"text": 3, "prompt": "d"}]  # fmt: skip
    path = write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_prompts([path])
    assert [prompt.text for prompt in found] == ["a", "b", "", "c", "d"]
    assert found[2].messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"})
    assert [prompt.content for prompt in found] == ["a", "b", "hi\nho", "c", "d"]
    assert [prompt.source for prompt in found] == [f"{path}:{number}" for number in range(1, 6)]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_are_numbered_as_an_editor_shows_them(tmp_path, end):
    path = write(tmp_path, "p.jsonl", end.join(['{"text": "a"}', "", '{"text": "b"}', "{"]))
    with pytest.raises(DataError, match=r"p\.jsonl:4 is not JSON"):
        read_prompts([path])


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\u2029"])
def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path, separator):
    path = write(tmp_path, "p.jsonl", f'{{"text": "a{separator}b"}}\n{{"text": "c"}}\n')
    assert texts(path) == [f"a{separator}b", "c"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("plain words", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('["a"]', "is not a JSON object"),
        ('"a"', "is not a JSON object"),
        ("null", "is not a JSON object"),
        ("{}", "no text"),
        ('{"body": "a"}', "no text"),
        ('{"text": ""}', "no text"),
        ('{"text": null, "prompt": 7}', "no text"),
        ('{"messages": []}', "no text"),
        ('{"messages": [{"role": "user"}]}', "no text"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "no text"),
        ('{"messages": "hi"}', "no text"),
    ],
)
def test_a_line_at_fault_is_named_with_its_number(tmp_path, line, said):
    path = write(tmp_path, "p.jsonl", f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"p\.jsonl:2 .*{said}|p\.jsonl:2 {said}") as refused:
        read_prompts([path])
    assert refused.value.hint


def test_a_lone_surrogate_is_named_as_text_that_no_tokenizer_takes(tmp_path):
    path = write(tmp_path, "p.jsonl", '{"text": "a"}\n{"text": "b \\ud800"}\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2"):
        read_prompts([path])


def test_a_folder_is_read_in_the_order_of_its_file_names_and_of_its_suffixes_only(tmp_path):
    for name, content in (("b.txt", "b"), ("a.jsonl", '{"text": "a"}'), ("c.txt", "c"), ("README.md", "no"),
                          ("sub/d.txt", "no")):  # fmt: skip
        write(tmp_path, name, content)
    assert texts(str(tmp_path)) == ["a", "b", "c"]
    assert texts(str(tmp_path / "c.txt"), str(tmp_path / "b.txt")) == ["c", "b"]


def test_a_folder_with_no_prompt_file_and_a_path_that_is_not_there_are_said(tmp_path):
    write(tmp_path, "README.md", "x")
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl"):
        read_prompts([str(tmp_path)])
    with pytest.raises(DataError, match="no file or folder"):
        read_prompts([str(tmp_path / "absent.txt")])
    with pytest.raises(DataError, match="no prompt"):
        read_prompts([])


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n\t\r\n", "is empty"), (b"ok \xff\xfe", r"not UTF-8 text \(byte 3\)")]
)
def test_an_empty_or_undecodable_file_is_named(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=said) as refused:
        read_prompts([path])
    assert path in refused.value.what
    assert refused.value.hint


def test_a_folder_in_place_of_a_file_is_said(tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "x.txt")


def test_the_shipped_sample_prompts_are_at_least_sixty_and_all_different():
    found = read_prompts([str(sample_prompts())])
    contents = [prompt.content for prompt in found]
    assert len(contents) >= 60
    assert len(set(contents)) == len(contents)
    assert len({prompt.source.split(".")[0] for prompt in found}) >= 8


def test_the_mark_that_an_editor_begins_a_file_with_is_no_text(tmp_path):
    assert read_text(Path(write(tmp_path, "a.txt", "\ufeffone"))) == "one"
    found = read_prompts([write(tmp_path, "a.jsonl", '\ufeff{"text": "one"}\r\n{"text": "two"}\r\n')])
    assert [prompt.text for prompt in found] == ["one", "two"]
