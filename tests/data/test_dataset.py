"""Rows of data sets: local files, the hub, and what is read of it without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actsparse.data.dataset import read_dataset
from actsparse.data.network import is_offline, network
from actsparse.data.prompts import Prompt
from actsparse.errors import DataError


def test_rows_of_a_local_data_set_are_prompts(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("text,n\none,1\ntwo,2\nthree,3\n")
    found = read_dataset(str(path), "test", "text", 2)
    assert found == [Prompt(source=f"{path}[0]", text="one"), Prompt(source=f"{path}[1]", text="two")]
    with pytest.raises(DataError, match="no column 'body'") as refused:
        read_dataset(str(path), "test", "body", None)
    assert "--text-column text" in refused.value.hint


def test_a_data_set_that_names_a_file_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none\.csv") as refused:
        read_dataset(str(tmp_path / "none.csv"), "test", "text", None)
    assert "--dataset" in refused.value.hint


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "txt"])
def test_local_data_sets_of_every_kind_give_the_same_prompts(suffix: str, tmp_path: Path) -> None:
    import polars as pl

    rows = [{"text": f"prompt {i}", "id": i} for i in range(4)]
    path = tmp_path / f"data.{suffix}"
    match suffix:
        case "json":
            path.write_text(json.dumps(rows))
        case "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case "csv":
            pl.DataFrame(rows).write_csv(path)
        case "parquet":
            pl.DataFrame(rows).write_parquet(path)
        case _:
            path.write_text("\n".join(row["text"] for row in rows))
    assert [prompt.text for prompt in read_dataset(str(path), "test", "text", None)] == [row["text"] for row in rows]


def test_a_column_of_messages_becomes_chats(tmp_path: Path) -> None:
    import polars as pl

    path = tmp_path / "chat.parquet"
    pl.DataFrame([{"messages": [{"role": "user", "content": "hello"}]}]).write_parquet(path)
    found = read_dataset(str(path), "test", "messages", None)
    assert found[0].messages == ({"role": "user", "content": "hello"},)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process of a user begins, whatever the tests' own environment forbids."""
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_a_hub_id_may_name_a_part_and_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(*names: object, **options: object) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [prompt.text for prompt in read_dataset("someone/wiki:small", "train", "text", 1)] == ["one"]
    read_dataset("someone/wiki", "train", "text", 1)
    streamed = {"split": "train", "streaming": True}
    assert asked == [(("someone/wiki", "small"), streamed), (("someone/wiki", None), streamed)]


@pytest.mark.usefixtures("online")
def test_the_libraries_are_offline_for_as_long_as_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    with network(offline=False):
        assert not is_offline()
    with network(offline=True):
        assert (is_offline(), datasets.config.HF_HUB_OFFLINE, os.environ["HF_DATASETS_OFFLINE"]) == (True, True, "1")
    assert (is_offline(), datasets.config.HF_HUB_OFFLINE, os.environ["HF_DATASETS_OFFLINE"]) == (False, False, "0")


@pytest.mark.usefixtures("online")
def test_a_library_that_is_imported_offline_is_not_so_for_good() -> None:
    code = """
import os
os.environ.pop("HF_HUB_OFFLINE", None)
from actsparse.data.network import network
with network(offline=True):
    import datasets.config
    inside = datasets.config.HF_HUB_OFFLINE
print(inside, datasets.config.HF_HUB_OFFLINE)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


@pytest.mark.usefixtures("online")
def test_a_hub_that_cannot_be_asked_is_not_a_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(*_names: object, **_options: object) -> None:
        raise ConnectionError("Couldn't reach 'someone/wiki' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="the hub could not be asked: Couldn't reach") as refused:
        read_dataset("someone/wiki", "test", "text", 1)
    assert "--offline" in refused.value.hint
