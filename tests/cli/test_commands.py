"""The command line through `main(argv)`: its answers, its exit codes, and every bad input of the list."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import CONTEXT, FFN, LAYERS, save_tiny, words

from actsparse.cli.app import main
from actsparse.pipelines import profile as profile_module
from actsparse.pipelines import quality
from actsparse.store.runs import EvalRun


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def actsparse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Done]:
    """Run a command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Done:
        line = [str(part) for part in argv]
        monkeypatch.setattr(sys, "argv", ["actsparse", *line])
        capsys.readouterr()
        code = main(line)
        found = capsys.readouterr()
        return Done(code, found.out, found.err)

    return run


@pytest.fixture(scope="module")
def profiled(tiny_folder: Callable, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished profile of the tiny llama."""
    out = tmp_path_factory.mktemp("runs") / "profile"
    assert main(["profile", "-m", str(tiny_folder("llama")), "--prompts", str(prompts_file), "-o", str(out), "-q"]) == 0
    return out


def short(corpus: Path) -> list[object]:
    """Options that make an evaluation small."""
    return ["--corpus", corpus, "-n", 2, "--block-length", 32, "--prompt-length", 12, "--timing-pairs", 0,
            "--generations", 1, "--max-new-tokens", 3, "--no-controls"]  # fmt: skip


def assert_refused(done: Done, *named: object, out: Path | None = None) -> None:
    """Exit code 1, the object named, a hint, no stack trace, no answer, nothing half-written."""
    assert done.code == 1, done.err
    for name in named:
        assert str(name) in done.err.replace("\n", " "), done.err
    assert "hint:" in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    if out is not None and out.exists():
        assert [path.name for path in out.rglob("*") if path.is_file() and path.name != ".lock"] == []


def test_profile_json_is_one_document_on_stdout(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "-o", tmp_path / "p", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert {"model", "data", "measures", "warnings", "run"} <= document.keys()
    assert document["model"]["intermediate_size"] == FFN
    targets = {row["param"] for row in document["measures"] if row["metric"] == "cett_sparsity"}
    assert targets == {"target=0.1", "target=0.2", "target=0.3"}
    assert all({"value", "unit", "n", "stderr"} <= row.keys() for row in document["measures"])
    assert Path(document["run"]) == tmp_path / "p"


def test_profile_shows_a_table_and_the_next_command(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    done = actsparse("profile", "-m", tiny_folder("gpt2"), "--prompts", prompts_file, "-o", tmp_path / "p")
    assert done.code == 0
    assert sum(line.startswith("layer ") for line in done.out.splitlines()) == LAYERS
    assert "written to" in done.out
    assert "next: actsparse threshold" in done.err
    assert "next:" not in done.out


def test_quiet_says_nothing_on_stderr(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    done = actsparse(
        "profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "-o", tmp_path / "p", "--probes", "none", "-q"
    )
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_verbose_tells_the_models_shape_and_how_long_each_step_took(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    line = ["profile", "-m", tiny_folder("llama"), "--device", "cpu", "--prompts", prompts_file, "--json"]
    plain = actsparse(*line, "-o", tmp_path / "plain")
    verbose = actsparse(*line, "-o", tmp_path / "verbose", "-v")
    extra = [text for text in verbose.err.splitlines() if text not in plain.err.splitlines()]
    assert any("llama" in text and "2 layers" in text and "float32 on cpu" in text for text in extra)
    assert any(text.startswith("recording:") and text.endswith(" s") for text in extra)
    assert json.loads(plain.out)["measures"] == json.loads(verbose.out)["measures"]


@pytest.mark.parametrize("method", ["static:stat=griffin@0.5", "random@0.5", "griffin@0.5", "tda@0.5", "cats@0.5"])
def test_threshold_then_evaluate_the_plan(
    method: str, actsparse: Callable, profiled: Path, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    done = actsparse("threshold", profiled, "--method", method, "-o", tmp_path / "plan", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["plan"]["short"] == method
    assert document["predicted"]["neuron_frac"] == pytest.approx(0.5, abs=0.02)
    assert {"realised", "calibration", "warnings", "run"} <= document.keys()
    done = actsparse(
        "evaluate", "-m", tiny_folder("llama"), "--plan", tmp_path / "plan", *short(corpus_file), "-o", tmp_path / "e",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads(done.out)["plans"][0]
    assert plan["method"] == method.split(":")[0].split("@")[0]
    assert plan["sparsity"]["realised"]["neuron_frac"] == pytest.approx(0.5, abs=0.15)


def test_sparsity_and_set_build_the_short_form(actsparse: Callable, profiled: Path, tmp_path: Path) -> None:
    done = actsparse("threshold", profiled, "--method", "static", "--set", "stat=griffin", "--sparsity", "25%",
                     "-o", tmp_path / "p", "--json")  # fmt: skip
    assert done.code == 0, done.err
    plan = json.loads(done.out)["plan"]
    assert (plan["options"], plan["amount"]) == ({"stat": "griffin"}, 0.25)


def test_evaluate_json_has_the_documented_keys(
    actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    done = actsparse("evaluate", "-m", tiny_folder("llama"), "--plan", "griffin@0.5", "--plan", "oracle-a@0.5",
                     *short(corpus_file), "--timing-pairs", 2, "--timing-tokens", 3, "--fast-atomics",
                     "-o", tmp_path / "e", "--json")  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert {"model", "data", "device", "dense", "plans", "warnings", "run"} <= document.keys()
    assert [plan["plan"] for plan in document["plans"]] == ["griffin@0.5", "oracle-a@0.5"]
    assert sum("fast atomics change nothing here" in text for text in document["warnings"]) == 1
    assert EvalRun.open(tmp_path / "e").manifest.spec["fast_atomics"] is True
    griffin, oracle = document["plans"]
    for key in ("ms_per_token", "speedup", "speedup_low", "speedup_high", "ceiling", "ttft_ms"):
        assert griffin["speed"][key]["value"] > 0
    # two pairs are too few for any other
    assert griffin["speed"]["verdict"] == "not significant"
    assert oracle["speed"] is None
    assert "no engine" in oracle["speed_reason"]
    assert document["dense"]["speed"]["generate_ms_per_token"]["value"] is not None
    assert griffin["quality"]["kl"]["value"] > 0


def test_samples_are_drawn_by_the_same_numbers_under_every_plan(
    actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    def texts(folder: str, *options: object) -> dict[str, list[int]]:
        out = tmp_path / folder
        done = actsparse("evaluate", "-m", tiny_folder("llama"), *short(corpus_file), "--plan", "griffin@0",
                         "--plan", "oracle-a@0", "--max-new-tokens", 12, *options, "-o", out)  # fmt: skip
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
        return {line["plan"]: line["token_ids"] for line in lines}

    greedy, drawn = texts("greedy"), texts("drawn", "--temperature", 1.5, "--top-p", 0.9)
    assert drawn["dense"] != greedy["dense"]
    # plans that drop nothing: by the engine, and in the masked path
    assert drawn["griffin@0"] == drawn["oracle-a@0"] == drawn["dense"]
    assert texts("again", "--temperature", 1.5, "--top-p", 0.9) == drawn
    assert texts("other", "--temperature", 1.5, "--top-p", 0.9, "--seed", 1) != drawn


def test_throughput_is_a_table_over_batch_prompt_and_generated_lengths(
    actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    sizes = ("--batch-sizes", "1,2", "--prompt-lengths", "8,4000", "--gen-lengths", "3,5")
    done = actsparse("evaluate", "-m", tiny_folder("llama"), "--plan", "griffin@0.5", *short(corpus_file),
                     "--timing-pairs", 0, "--throughput", *sizes, "-o", tmp_path / "e")  # fmt: skip
    assert done.code == 0, done.err
    assert "no throughput at prompt 4000" in done.err
    table = done.out[done.out.index("Throughput") :]
    assert len([line for line in table.splitlines() if " griffin@0.5 " in line]) == 4
    rows = EvalRun.open(tmp_path / "e").throughput
    assert set(rows["plan"]) == {"dense", "griffin@0.5"}
    places = rows.select("batch_size", "prompt_length", "gen_length").unique()
    assert sorted(places.rows()) == [(1, 8, 3), (1, 8, 5), (2, 8, 3), (2, 8, 5)]
    assert rows.filter(metric="speedup").height == 4
    for metric in ("tokens_per_s", "ms_p50", "ms_p99", "ttft_ms", "memory_mb", "gb_per_s", "ceiling_share"):
        values = rows.filter(metric=metric)["value"]
        assert len(values) == 8
        assert (values > 0).all()


@pytest.mark.parametrize("sizes", ["0", "1,x", "", "2,-1"])
def test_throughput_sizes_that_are_no_counts_are_refused(actsparse: Callable, tmp_path: Path, sizes: str) -> None:
    done = actsparse("evaluate", "-m", "demo", "--throughput", "--batch-sizes", sizes, "-o", tmp_path / "e")
    assert done.code == 1
    assert "--batch-sizes must be numbers from 1 on" in done.err


def test_run_goes_from_prompts_to_a_report_and_reuses_it(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    argv = ["run", "-m", tiny_folder("llama"), "--device", "cpu", "--prompts", prompts_file, "--block-length", 32,
            "--prompt-length", 12, "--timing-pairs", 2, "-o", tmp_path / "runs",
            "--report", tmp_path / "r.html"]  # fmt: skip
    done = actsparse(*argv)
    assert done.code == 0, done.err
    assert [step in done.err for step in ("1/4", "2/4", "3/4", "4/4")] == [True] * 4
    kinds = sorted(path.name.split("-")[0] for path in (tmp_path / "runs" / "tiny-llama").iterdir())
    assert kinds == ["eval", "plan", "profile"]
    assert "griffin@0.5" in (tmp_path / "r.html").read_text()
    again = actsparse(*argv, "--json")
    assert again.code == 0, again.err
    assert again.err.count("up to date") == 3
    document = json.loads(again.out)
    assert {"profile", "plan", "evaluation", "report"} <= document.keys()
    # even prompts were fitted on, odd ones judged
    assert document["evaluation"]["warnings"] == []


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["profil"], "Did you mean 'profile'"),
        (["profile"], "Missing option '--model'"),
        (["profile", "--model"], "'--model' requires an argument"),
        (["profile", "-m", "x", "--no-such-option"], "--no-such-option"),
        (["profile", "-m", "x", "--limit", "many"], "'--limit' / '-n'"),
        (["threshold", "--method", "tda"], "Missing argument 'RUN'"),
        (["evaluate", "-m", "x", "--timing-pairs", "2.5"], "'--timing-pairs'"),
    ],
)
def test_what_the_parser_refuses_is_2(argv: list[str], named: str, actsparse: Callable) -> None:
    done = actsparse(*argv)
    assert done.code == 2
    assert named in done.err
    assert done.out == ""
    assert "Traceback" not in done.err


def test_version_is_0(actsparse: Callable) -> None:
    from actsparse import __version__

    assert actsparse("--version") == Done(0, f"actsparse {__version__}\n", "")


@pytest.mark.parametrize("gate", [["--max-ppl-increase", "0"], ["--min-top1", "99.9%"]])
def test_a_missed_gate_is_3_and_the_run_is_kept(
    gate: list[str], actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    argv = ["evaluate", "-m", tiny_folder("llama"), "--plan", "random:seed=0@0.9", *short(corpus_file), "-o",
            tmp_path / "e"]  # fmt: skip
    done = actsparse(*argv, *gate)
    assert done.code == 3
    assert "random:seed=0@0.9" in done.err
    assert (tmp_path / "e" / "manifest.json").exists()
    assert actsparse(*argv).code == 0


def test_a_gate_that_is_met_is_0(actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path) -> None:
    done = actsparse("evaluate", "-m", tiny_folder("llama"), "--plan", "griffin@0", *short(corpus_file), "-o",
                     tmp_path / "e", "--max-ppl-increase", "1%", "--min-top1", "0.99")  # fmt: skip
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["profile", "evaluate"])
def test_ctrl_c_is_130_and_prints_what_resumes(
    command: str, actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "my run"
    argv = [command, "-m", tiny_folder("llama"), "-o", out]
    argv += short(corpus_file) if command == "evaluate" else ["--corpus", corpus_file, "--block-length", 32]
    with monkeypatch.context() as patch:
        patch.setattr(profile_module.Phase, "solved", stop)
        patch.setattr(quality, "_scores", stop)
        done = actsparse(*argv)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert "interrupted" in done.err
    assert f"actsparse {command} -m {tiny_folder('llama')} -o '{out}'" in done.err.replace("\n", "")
    assert not (out / "manifest.json").exists()
    assert actsparse(*argv).code == 0


def test_unknown_model(actsparse: Callable, tmp_path: Path) -> None:
    assert_refused(
        actsparse("profile", "-m", "someone/nothing", "-o", tmp_path / "o"), "someone/nothing", out=tmp_path / "o"
    )


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (None, "no config.json"),
        ({"model_type": "t5"}, "'t5' is not a causal language model"),
        ({"model_type": "codegen"}, "'codegen' is not supported"),
    ],
)
def test_directories_that_are_no_model_for_us(
    config: dict | None, named: str, actsparse: Callable, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    if config is not None:
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert_refused(actsparse("profile", "-m", tmp_path / "model", "-o", tmp_path / "o"), named, out=tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("empty.txt", b"", "empty.txt is empty"),
        ("blank.jsonl", b" \n\n", "blank.jsonl is empty"),
        ("latin.txt", b"caf\xe9", "latin.txt is not UTF-8 text (byte 3)"),
        ("lines.jsonl", b'{"text": "w1 w2"}\n\n{"title": "w3"}\n', "lines.jsonl:3 has no text"),
        ("cut.jsonl", b'{"text": "w1"}\n{"text": ', "cut.jsonl:2 is not JSON"),
        ("list.jsonl", b"[1, 2]\n", "list.jsonl:1 is not a JSON object"),
        ("short.txt", b"w1 w2", "no token is left after the first 4"),
    ],
)
def test_prompts_that_cannot_be_used(
    name: str, content: bytes, named: str, actsparse: Callable, tiny_folder: Callable, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", tmp_path / name, "-o", tmp_path / "o")
    assert_refused(done, named, out=tmp_path / "o")


def test_prompts_that_are_not_there(actsparse: Callable, tiny_folder: Callable, tmp_path: Path) -> None:
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", tmp_path / "none.txt", "-o", tmp_path / "o")
    assert_refused(done, tmp_path / "none.txt", out=tmp_path / "o")


def test_a_data_set_without_the_column(actsparse: Callable, tiny_folder: Callable, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("title,body\na,b\n")
    done = actsparse("profile", "-m", tiny_folder("llama"), "--dataset", tmp_path / "rows.csv", "-o", tmp_path / "o")
    assert_refused(done, "no column 'text'", "--text-column title", out=tmp_path / "o")


def test_a_prompt_longer_than_the_context_is_split_and_said(
    actsparse: Callable, tiny_folder: Callable, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text(words(2 * CONTEXT, seed=2))
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", tmp_path / "long.txt", "-o", tmp_path / "o",
                     "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert f"long.txt: {2 * CONTEXT + 1} tokens, over the model's {CONTEXT}; split into 3" in done.err
    assert json.loads(done.out)["data"]["sequences"] == 3


def test_a_plan_of_another_model(
    actsparse: Callable, profiled: Path, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    assert actsparse("threshold", profiled, "--method", "griffin@0.5", "-o", tmp_path / "plan").code == 0
    done = actsparse("evaluate", "-m", tiny_folder("gpt2"), "--plan", tmp_path / "plan", *short(corpus_file), "-o",
                     tmp_path / "o")  # fmt: skip
    assert_refused(done, "was fitted to tiny-llama, not to tiny-gpt2", out=tmp_path / "o")


def test_an_incomplete_profile(actsparse: Callable, profiled: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(profiled, tmp_path / "broken"))
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").unlink()
    (broken / "unfinished.json").write_text(json.dumps(manifest | {"status": "unfinished"}))
    done = actsparse("threshold", broken, "--method", "griffin@0.5", "-o", tmp_path / "o")
    assert_refused(done, "is incomplete", "resume it with: actsparse", out=tmp_path / "o")


def test_a_damaged_profile(actsparse: Callable, profiled: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(profiled, tmp_path / "broken"))
    (broken / "neurons.parquet").write_bytes(b"PAR1")
    done = actsparse("threshold", broken, "--method", "griffin@0.5", "-o", tmp_path / "o")
    assert_refused(done, broken / "neurons.parquet", "damaged", out=tmp_path / "o")


def test_a_profile_too_short_to_fit_on_says_how_to_profile_again(
    actsparse: Callable, tiny_folder: Callable, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text(words(30, seed=5))
    profile = ["profile", "-m", tiny_folder("llama"), "--prompts", tmp_path / "few.txt", "--probes", "none", "-q"]
    assert actsparse(*profile, "-o", tmp_path / "p").code == 0
    done = actsparse("threshold", tmp_path / "p", "--method", "tda@0.5", "-o", tmp_path / "o")
    assert_refused(done, "few.txt has 30 tokens", "hint: profile again", "--block-length 15", out=tmp_path / "o")
    assert actsparse(*profile, "--block-length", 15, "-o", tmp_path / "q").code == 0
    assert actsparse("threshold", tmp_path / "q", "--method", "tda@0.5", "-o", tmp_path / "o").code == 0


def test_a_profile_that_is_not_there(actsparse: Callable, tmp_path: Path) -> None:
    assert_refused(actsparse("threshold", tmp_path / "none", "--method", "griffin@0.5"), tmp_path / "none")


def test_the_directory_of_another_spec(actsparse: Callable, profiled: Path, tiny_folder: Callable,
                                       prompts_file: Path) -> None:  # fmt: skip
    before = {path.name: path.read_bytes() for path in profiled.iterdir()}
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "--cett", "0.4", "-o", profiled)
    assert_refused(done, profiled, "cett_targets", "--force")
    assert {path.name: path.read_bytes() for path in profiled.iterdir()} == before


def test_foreign_files_are_never_touched(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("years")
    argv = ["profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "-o", tmp_path / "o"]
    assert_refused(actsparse(*argv), "thesis.tex")
    assert [p.name for p in (tmp_path / "o").iterdir() if p.name != ".lock"] == ["thesis.tex"]
    assert actsparse(*argv, "--force").code == 0
    assert (tmp_path / "o" / "thesis.tex").read_text() == "years"


def test_no_disk_space(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "-o", tmp_path / "o")
    assert_refused(done, "no disk space left", tmp_path / "o", out=tmp_path / "o")


def test_a_failed_fit_does_not_claim_its_directory(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, profiled: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    assert (
        actsparse("profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, "--layers", 0, "-o", part).code == 0
    )
    assert_refused(
        actsparse("threshold", part, "--method", "static@0.5", "-o", tmp_path / "o"), "recorded 1 layers only"
    )
    done = actsparse("threshold", profiled, "--method", "static@0.5", "-o", tmp_path / "o")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "grifin@0.5"], "'grifin'"),
        (["--method", "griffin"], "how much to drop"),
        (["--method", "griffin", "--sparsity", "1.5"], "1.5"),
        (["--method", "griffin", "--sparsity", "much"], "'much'"),
        (["--method", "tda@0.5", "--sparsity", "0.5"], "names a share already"),
        (["--method", "static@0.5", "--set", "stta=griffin"], "'stta'"),
    ],
)
def test_methods_that_cannot_be_fitted(
    options: list[str], named: str, actsparse: Callable, profiled: Path, tmp_path: Path
) -> None:
    assert_refused(actsparse("threshold", profiled, *options, "-o", tmp_path / "o"), named, out=tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--layers", "9"], "there is no layer 9"),
        (["--layers", "0-99"], "there are no layers 2 to 99: the model has layers 0 to 1"),
        (["--layers", "first"], "'first'"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "0"], "--batch-size"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--decode", "-3"], "--decode must be at least 0"),
        (["--probes", "none,union"], "'none' and others: union"),
        (["--cett", "1.5"], "1.5"),
        (["--reservoir-tokens", "0"], "--reservoir-tokens"),
        (["--dtype", "int3"], "'int3'"),
        (["--device", "tpu9"], "'tpu9'"),
        (["--sink-tokens", "-1"], "--sink-tokens"),
    ],
)
def test_options_out_of_range(
    options: list[str], named: str, actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    done = actsparse("profile", "-m", tiny_folder("llama"), "--prompts", prompts_file, *options, "-o", tmp_path / "o")
    assert_refused(done, named, out=tmp_path / "o")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--plan", "griffin"], "how much to drop"),
        (["--plan", "./none"], "./none"),
        (["--plan", "griffin@0.5", "--block-length", 4 * CONTEXT], "do not fit the model's context"),
        (["--plan", "griffin@0.5", "-n", "500"], "blocks of 32 tokens"),
        (["--plan", "griffin@0.5", "--calib-blocks", "4"], "--calib-blocks must be A:B"),
        (["--plan", "griffin@0.5", "--calib-blocks", "90:95"], "90:95"),
        (["--plan", "griffin@0.5", "--prompt-length", "3"], "a prompt of 3 tokens"),
        (["--plan", "griffin@0.5", "--timing-prompts", "0"], "--timing-prompts"),
        (["--plan", "griffin@0.5", "--timing-pairs", "-1"], "--timing-pairs"),
        (["--plan", "griffin@0.5", "--temperature", "-1"], "--temperature"),
        (["--plan", "griffin@0.5", "--temperature", "1", "--top-p", "0"], "--top-p"),
        (["--plan", "griffin@0.5", "--top-p", "0.9"], "--temperature 1"),
    ],
)
def test_evaluations_that_cannot_be(
    options: list[object], named: str, actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    done = actsparse("evaluate", "-m", tiny_folder("llama"), *short(corpus_file), *options, "-o", tmp_path / "o")
    assert_refused(done, named, out=tmp_path / "o")


def test_config_gives_defaults_and_its_faults_are_named(
    actsparse: Callable, tiny_folder: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    config = tmp_path / "a.toml"
    config.write_text(f"[profile]\nmodel = {json.dumps(str(tiny_folder('llama')))}\nlayers = '1'\n")
    done = actsparse("--config", config, "profile", "--prompts", prompts_file, "-o", tmp_path / "p", "--json")
    assert done.code == 0, done.err
    assert {row["layer"] for row in json.loads(done.out)["measures"]} == {1, None}
    config.write_text("[profil]\n")
    assert_refused(actsparse("--config", config, "profile", "-m", "x"), "'profil' is not a command")
    config.write_text("nonsense")
    assert_refused(actsparse("--config", config, "profile", "-m", "x"), "is not TOML")
    assert_refused(actsparse("--config", tmp_path / "none.toml", "profile", "-m", "x"), "none.toml")


def test_a_context_without_limit_splits_no_prompt(actsparse: Callable, tmp_path: Path) -> None:
    folder = save_tiny("bloom", tmp_path / "bloom")
    (tmp_path / "long.txt").write_text(words(2 * CONTEXT, seed=2))
    done = actsparse("profile", "-m", folder, "--prompts", tmp_path / "long.txt", "-o", tmp_path / "p", "--json")
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["model"]["max_positions"] is None
    assert document["data"]["sequences"] == 1


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"query": "w1", "choices": ["w2", "w3"', "own.jsonl:2"),
        ('{"query": "w1", "choices": ["w2", "w3"], "gold": 5}', "numbered 0 to 1"),
        ('{"question": "w1", "answer": "no number"}', "own.jsonl:2"),
        ('{"query": "<s>", "choices": ["w2", "w3"], "gold": 0}', None),
    ],
)
def test_a_bad_task_file_is_refused_before_a_model_is_loaded(
    line: str, named: str | None, actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "own.jsonl").write_text('{"query": "w1 w2", "choices": ["w3", "w4"], "gold": 1}\n' + line + "\n")
    command = ["evaluate", "-m", tiny_folder("llama"), "--task", tmp_path / "own.jsonl", *short(corpus_file)]
    command += ["-o", tmp_path / "e"]
    if named is None:
        assert actsparse(*command).code == 0
        return
    from actsparse.pipelines import evaluate as module

    monkeypatch.setattr(module, "load", lambda *_: pytest.fail("the model was loaded"))
    assert_refused(actsparse(*command), named, out=tmp_path / "e")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--plan", "griffin@0.9:0.1:0.1"], "empty sweep"),
        (["--plan", "griffin@0.1:0.9"], "first:last:step"),
        (["--plan", "griffin@0.1:0.9:0.001"], "more than 99"),
        (["--dense-upto", "3"], "--dense-upto"),
        (["--task-limit", "0"], "--task-limit"),
        (["--prompt-frac", "1.5"], "--prompt-frac"),
        (["--only", "T1"], "belongs to a study"),
        (["--study", "tda", "--plan", "griffin@0.5"], "does not go with --study"),
    ],
)
def test_options_of_quality_that_make_no_sense_are_refused(
    options: list[str], named: str, actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    given = [one for one in short(corpus_file) if one not in ("--prompt-length", 12)]
    done = actsparse("evaluate", "-m", tiny_folder("llama"), *given, *options, "-o", tmp_path / "e")
    assert_refused(done, named, out=tmp_path / "e")


def test_a_prompt_share_of_zero_leaves_the_sink_tokens_dense(
    actsparse: Callable, tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    given = [one for one in short(corpus_file) if one not in ("--prompt-length", 12)]
    done = actsparse("evaluate", "-m", tiny_folder("llama"), *given, "--prompt-frac", "0", "--plan", "static@0.5",
                     "--plan", "griffin@0.5", "-o", tmp_path / "e", "--json")  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    static, griffin = document["plans"]
    assert static["quality"]["ppl"]["n"] == 2 * (32 - 4)
    assert griffin["quality"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert static["quality"]["kl"]["value"] > 0.01
    assert any("griffin@0.5" in text and "prompt" in text for text in document["warnings"])


def test_methods_says_what_to_know_of_a_methods_speed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "teal"]) == 0
    assert "speed: 25 % barely pays" in capsys.readouterr().out
    assert main(["methods", "griffin"]) == 0
    assert "speed:" not in capsys.readouterr().out
