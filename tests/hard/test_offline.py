"""`--offline`: nothing asks the network, what is cached is read, and what is not is said."""

import socket
from collections.abc import Callable
from pathlib import Path

import datasets
import datasets.config
import pytest
from huggingface_hub import constants

from actsparse.cli.app import main

NAME = "someone/wiki"
TASK = """
task: far_away
dataset_path: someone/wiki
output_type: multiple_choice
test_split: test
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The hosts that were asked for, on a machine whose network reaches none of them and whose caches are empty."""
    hosts = []

    def look_up(host: str, *_args: object, **_named: object) -> None:
        hosts.append(host)
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    return hosts


@pytest.fixture
def profiling(tiny_folder: Callable, tmp_path: Path) -> list[str]:
    return ["profile", "--model", str(tiny_folder("llama")), "--device", "cpu", "--dataset", NAME, "-n", "2",
            "--probes", "none", "-o", str(tmp_path / "run"), "-q"]  # fmt: skip


def test_without_it_the_hub_is_asked(
    profiling: list[str], asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(profiling) == 1
    assert set(asked) == {"huggingface.co"}
    assert f"data set '{NAME}' is not here, and the hub could not be asked" in capsys.readouterr().err


def test_a_data_set_that_is_not_cached_is_said(
    profiling: list[str], asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*profiling, "--offline"]) == 1
    said = capsys.readouterr().err
    assert asked == []
    assert f"data set '{NAME}' is not in the cache" in said
    assert f"hf download --repo-type dataset {NAME}" in said


def prepared(place: Path) -> None:
    """As `load_dataset` leaves a data set in its cache."""
    rows = datasets.Dataset.from_dict({"text": ["the cat sat on the mat"] * 3})
    builder = datasets.load_dataset_builder("parquet", data_files={"test": _parquet(rows, place)}, cache_dir=str(place))
    builder.download_and_prepare()
    folder = place / "someone___wiki" / "default" / "0.0.0" / "abc"
    folder.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(folder)
    (folder / "parquet-test.arrow").rename(folder / "wiki-test.arrow")


def downloaded(place: Path) -> None:
    """As `hf download --repo-type dataset` leaves one."""
    root = place / "datasets--someone--wiki"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    folder = root / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 3)


def _parquet(rows: datasets.Dataset, place: Path) -> str:
    place.mkdir(exist_ok=True)
    rows.to_parquet(place / "rows.parquet")
    return str(place / "rows.parquet")


@pytest.mark.parametrize("cache", [prepared, downloaded])
def test_a_data_set_that_is_cached_is_read(
    cache: Callable[[Path], None], profiling: list[str], asked: list[str], tmp_path: Path
) -> None:
    cache(tmp_path / ("prepared" if cache is prepared else "hub"))
    asked.clear()
    assert main([*profiling, "--offline"]) == 0
    assert asked == []


def test_tasks_of_the_harness_ask_nothing_either(
    tiny_folder: Callable, corpus_file: Path, asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "far_away.yaml").write_text(TASK)
    command = ["evaluate", "--model", str(tiny_folder("llama")), "--device", "cpu", "--corpus", str(corpus_file),
               "-n", "1", "--block-length", "32", "--prompt-length", "12", "--no-controls", "--timing-pairs", "0",
               "--generations", "0", "--tasks", "far_away", "--include-path", str(tmp_path / "tasks"), "-q",
               "-o", str(tmp_path / "run"), "--offline"]  # fmt: skip
    assert main(command) == 1
    assert asked == []
    said = capsys.readouterr().err
    assert "lm-eval could not run 'far_away'" in said
    assert "hint:" in said
