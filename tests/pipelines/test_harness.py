"""lm-eval through the model class `actsparse`, on tasks of our own, offline."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra actsparse[eval]")

from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from actsparse.cli.app import main
from actsparse.errors import ActsparseError, DataError, PlanError
from actsparse.models.load import LoadedModel, load
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.harness import ActsparseLM, PlanLM, check_tasks
from actsparse.specs import DataSpec, EvalSpec, ModelSpec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "tasks"
SHARED = ROOT / "shared" / "data"
TASKS = ["actsparse_places", "actsparse_letters", "actsparse_sums"]


@pytest.fixture(scope="module")
def twin() -> LoadedModel:
    return load(ModelSpec(name="demo", device="cpu"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks name their items by paths from the repository."""
    monkeypatch.chdir(ROOT)


def run(lm: object, tasks: list[str] = TASKS) -> dict:
    found = simple_evaluate(model=lm, tasks=tasks, task_manager=check_tasks(tasks, str(FOLDER)), bootstrap_iters=0)  # pyright: ignore
    assert found is not None
    return found


def likelihoods(found: dict, task: str) -> list[float]:
    return [answer[0] for sample in found["samples"][task] for answer in sample["filtered_resps"]]


@pytest.fixture(scope="module")
def reference(twin: LoadedModel) -> dict:
    """What lm-eval's own `hf` model finds."""
    lm = HFLM(pretrained=twin.model, tokenizer=twin.tokenizer, batch_size=4)  # pyright: ignore
    return simple_evaluate(model=lm, tasks=TASKS, task_manager=check_tasks(TASKS, str(FOLDER)), bootstrap_iters=0)  # pyright: ignore


@pytest.mark.parametrize("plan", ["dense", "griffin@0"])
def test_dense_equals_the_hf_model_of_lm_eval(plan: str, reference: dict) -> None:
    found = run(ActsparseLM("demo", plan, device="cpu"))
    for task in TASKS[:2]:
        ours, theirs = likelihoods(found, task), likelihoods(reference, task)
        assert len(ours) == len(theirs) > 4
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert found["results"][task]["acc,none"] == reference["results"][task]["acc,none"]
    texts = [[sample["resps"] for sample in one["samples"]["actsparse_sums"]] for one in (found, reference)]
    assert texts[0] == texts[1]


def test_a_plan_runs_continuations_sparse_and_contexts_dense(twin: LoadedModel, reference: dict) -> None:
    lm = ActsparseLM("demo", "griffin@0.7", device="cpu")
    found = run(lm)
    ours, theirs = (likelihoods(one, "actsparse_places") for one in (found, reference))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > 0.5
    # answers of one token are predicted from the dense context, unless its last token is sparse too
    assert likelihoods(found, "actsparse_letters") == pytest.approx(
        likelihoods(reference, "actsparse_letters"), abs=1e-3
    )
    upto = run(ActsparseLM("demo", "griffin@0.7", device="cpu", dense_upto="P-1"), ["actsparse_letters"])
    assert likelihoods(upto, "actsparse_letters") != pytest.approx(
        likelihoods(reference, "actsparse_letters"), abs=1e-2
    )
    sample = found["samples"]["actsparse_letters"][0]
    assert lm.counted(sample["arguments"]) == (2, 0)
    assert found["samples"]["actsparse_sums"][0]["resps"] != reference["samples"]["actsparse_sums"][0]["resps"]


def test_evaluate_runs_both_kinds_of_tasks_and_they_agree(tmp_path: Path) -> None:
    spec = EvalSpec(
        model=ModelSpec(name="demo", device="cpu"), data=DataSpec(limit=1, block_length=64, prompt_length=32),
        plans=("griffin@0.5",), controls=False, timing_pairs=0, generations=0, path_check_tokens=0,
        task_files=(str(FOLDER / "places.jsonl"),), tasks=("actsparse_places", "actsparse_sums"),
        include_path=str(FOLDER), task_limit=6, output=tmp_path / "e",
    )  # fmt: skip
    found = evaluate(spec)
    for plan in ("dense", "griffin@0.5"):
        mine, theirs = (
            found.items.filter(plan=plan, task=task, metric="acc").sort("item")
            for task in ("places", "actsparse_places")
        )
        assert mine["value"].to_list() == theirs["value"].to_list()
        assert mine.height == 6
        assert mine["sparse_tokens"].to_list() == theirs["sparse_tokens"].to_list()
    sums = found.items.filter(task="actsparse_sums")
    assert set(sums["filter"]) == {"last-number"}
    document = next(plan for plan in found.summary["plans"] if plan["plan"] == "griffin@0.5")["tasks"]
    assert document["actsparse_places"]["acc"]["n"] == 6
    assert document["actsparse_sums"]["exact_match,last-number"]["n"] == 4


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the public evaluation data is not beside the checkout")
def test_public_tasks_agree_with_local_ones(tmp_path: Path) -> None:
    files = {"shared_piqa": SHARED / "piqa.jsonl", "shared_arc_easy": SHARED / "ARC-Easy.jsonl"}
    spec = EvalSpec(
        model=ModelSpec(name="demo", device="cpu"), data=DataSpec(limit=1, block_length=64, prompt_length=32),
        plans=("griffin@0.6",), controls=False, timing_pairs=0, generations=0, path_check_tokens=0,
        task_files=tuple(map(str, files.values())), tasks=tuple(files), include_path=str(FOLDER), task_limit=4,
        output=tmp_path / "e",
    )  # fmt: skip
    items = evaluate(spec).items
    for (task, file), plan, metric in product(files.items(), ("dense", "griffin@0.6"), ("acc", "acc_norm")):
        mine, theirs = (items.filter(plan=plan, metric=metric, task=name).sort("item") for name in (file.stem, task))
        assert mine["value"].to_list() == theirs["value"].to_list()
        assert mine.height == 4
        assert mine["sparse_tokens"].to_list() == theirs["sparse_tokens"].to_list()
        assert (mine["sparse_tokens"] > 0).all() == (plan != "dense")


def test_requests_that_share_a_pass_equal_requests_that_do_not(twin: LoadedModel) -> None:
    lm = ActsparseLM("demo", "griffin@0.5", device="cpu", dense_upto="P-1")
    tokens = twin.tokenizer("The cat sat on the mat and looked at the dog.").input_ids
    context, rest = tokens[:8], tokens[8:]
    requests = [(("a", "x"), context, rest), (("a", "y"), context, [*rest[:-1], 7]), (("b", ""), context[1:], rest)]
    together = lm._loglikelihood_tokens(requests)
    alone = [lm._loglikelihood_tokens([request])[0] for request in requests]
    assert together == alone
    assert together[0] != together[1]


def test_unknown_tasks_and_plans_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no task 'actsparse_place'") as error:
        check_tasks(["actsparse_place"], str(FOLDER))
    assert "actsparse_places" in error.value.hint
    with pytest.raises(DataError, match="no folder"):
        check_tasks(["actsparse_places"], str(tmp_path / "none"))
    with pytest.raises(PlanError, match="mean of 3 seeds") as plan:
        ActsparseLM("demo", "random@0.5", device="cpu")
    assert "random:seed=0@0.5" in plan.value.hint
    with pytest.raises(ActsparseError, match="batch_size"):
        ActsparseLM("demo", device="cpu", batch_size="auto")


def test_the_command_names_the_nearest_tasks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = ["evaluate", "-m", "demo", "--tasks", "actsparse_place", "--include-path", str(FOLDER)]
    assert main([*line, "-o", str(tmp_path / "e")]) == 1
    found = capsys.readouterr()
    assert "no task 'actsparse_place'" in found.err
    assert "actsparse_places" in found.err
    assert found.out == ""
    assert not (tmp_path / "e").exists()


def at_start(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a Python that started with what the wheel carries."""
    start = (
        "import site, sys, json\n"
        "there = any('Actsparse' in getattr(one, '__name__', '') for one in sys.meta_path)\n"
        f"there or site.addsitedir({str(ROOT / 'packaging')!r})\n"
    )
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_lm_eval_finds_the_model_by_its_name() -> None:
    done = at_start(
        "early = [name for name in sys.modules if name == 'actsparse' or name.startswith(('actsparse.', 'lm_eval'))]\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "names = [one.__name__ for one in sys.meta_path if 'Actsparse' in getattr(one, '__name__', '')]\n"
        "print(json.dumps([early, 'actsparse' in model_registry, names, 'torch' in sys.modules]))"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], True, [], False]
    from lm_eval.api.registry import get_model

    assert get_model("actsparse") is ActsparseLM
    assert issubclass(ActsparseLM, PlanLM)


def test_a_broken_installation_leaves_lm_eval_alone() -> None:
    done = at_start(
        "sys.modules['actsparse.lm_eval_plugin'] = None\n"
        "import lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "print('actsparse' in model_registry, 'hf' in model_registry)"
    )
    assert done.stdout.split()[-2:] == ["False", "True"], done.stderr
    assert "its model was not added to lm-eval" in done.stderr
