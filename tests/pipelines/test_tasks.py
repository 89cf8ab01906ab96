"""Tasks in the decode regime against a loop of the test's own: two passes over a cache, pruned for the second."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from listening import Listener
from test_quality import neuron_inputs, spec_of, value
from tiny import FFN, words
from torch import Tensor
from transformers import DynamicCache

from actsparse.data.tasks import Choice, Task
from actsparse.errors import DataError
from actsparse.models.load import LoadedModel
from actsparse.pipelines.continuations import Continuations
from actsparse.pipelines.evaluate import evaluate
from actsparse.pipelines.task_scoring import encode_pair, score_choice, shorten

SINK = 4


def naive_log_probs(loaded: LoadedModel, context: list[int], continuation: list[int], dense: int) -> Tensor:
    """Log-probabilities of a continuation under GRIFFIN at density 0.5, positions from `dense` on sparse."""
    model = loaded.model
    ids = torch.tensor([[*context, *continuation][:-1]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first: list[Tensor] = []
        acts = neuron_inputs(
            model, lambda: first.append(model(input_ids=ids[:, :dense], past_key_values=cache, use_cache=True).logits)
        )
        pruned = copy.deepcopy(model)
        for layer, a in zip(pruned.model.layers, acts, strict=True):
            rows = a[SINK:].double()
            s = ((rows / rows.norm(dim=1, keepdim=True)) ** 2).mean(0).sqrt()
            kept = torch.zeros(FFN, dtype=torch.bool).index_fill_(0, s.topk(FFN // 2).indices, True)
            layer.mlp.down_proj.weight.data[:, ~kept] = 0
        logits = first[0][0]
        for position in range(dense, ids.shape[1]):
            out = pruned(
                input_ids=ids[:, position : position + 1],
                position_ids=torch.tensor([[position]]),
                past_key_values=cache,
                use_cache=True,
            )
            logits = torch.cat([logits, out.logits[0]])
    return logits[-len(continuation) :].log_softmax(-1)


@pytest.fixture
def griffin(tiny_loaded: Callable):
    """Gates of griffin@0.5 on the tiny llama."""
    from actsparse.methods.short import parse
    from actsparse.pipelines.calibration import TextCalibration

    short = parse("griffin@0.5")
    fit = short.method.fit(TextCalibration((FFN, FFN), pytest.fail, pytest.fail), short.budget)
    return [short.method.gates(layer, fit) for layer in range(2)]


@pytest.mark.parametrize("back", [0, 1, 2])
def test_a_continuation_runs_sparse_after_a_dense_context(back: int, tiny_loaded: Callable, griffin: list) -> None:
    loaded = tiny_loaded("llama")
    context = loaded.tokenizer(words(20, seed=3)).input_ids
    continuation = loaded.tokenizer(words(6, seed=4), add_special_tokens=False).input_ids
    found = Continuations(loaded, griffin, SINK, back).log_probs(context, continuation)
    naive = naive_log_probs(loaded, context, continuation, len(context) - back)
    assert found.log_probs.shape == naive.shape
    assert torch.allclose(found.log_probs, naive, atol=1e-4)
    assert found.sparse == min(6, 5 + back)
    dense = Continuations(loaded, None, SINK, back).log_probs(context, continuation)
    assert dense.sparse == 0
    changed = (dense.log_probs - found.log_probs).abs().amax(dim=1) > 1e-4
    assert changed.tolist() == ([True] * 6 if back else [False] + [True] * 5)


def test_sink_tokens_stay_dense_and_long_texts_lose_their_start(tiny_loaded: Callable, griffin: list) -> None:
    loaded = tiny_loaded("llama")
    ids = loaded.tokenizer(words(200, seed=5)).input_ids
    short = Continuations(loaded, griffin, SINK, 1).log_probs(ids[:2], ids[2:6])
    assert short.sparse == 1
    long = Continuations(loaded, None, SINK).log_probs(ids[:190], ids[190:195])
    with torch.no_grad():
        last = torch.tensor([ids[:194][-128:]])
        expected = loaded.model(input_ids=last).logits[0, -5:].log_softmax(-1)
    assert torch.allclose(long.log_probs, expected, atol=1e-4)


def items_file(folder: Path, choices: int, length: int) -> Path:
    path = folder / "own.jsonl"
    lines = [
        {"query": words(12 + i, seed=i), "choices": [words(length, seed=50 * i + c) for c in range(choices)],
         "gold": i % choices}
        for i in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_choices_are_scored_by_likelihood_with_paired_intervals(
    tiny_folder: Callable, tiny_loaded: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    file, loaded = items_file(tmp_path, 3, 4), tiny_loaded("llama")
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0.5", "random@0.5",
                   task_files=(str(file),), generations=0)  # fmt: skip
    run = evaluate(spec)
    right = []
    for line in map(json.loads, file.read_text().splitlines()):
        sums = []
        for choice in line["choices"]:
            context, continuation = encode_pair(loaded.tokenizer, line["query"], f" {choice}")
            rows = naive_log_probs(loaded, context, continuation, len(context))
            sums.append(float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()))
        right.append(float(max(range(3), key=sums.__getitem__) == line["gold"]))
    assert value(run, "griffin@0.5", "acc", "task=own") == pytest.approx(sum(right) / 8)
    items = run.items.filter(plan="griffin@0.5", metric="acc").sort("item")
    assert items["value"].to_list() == right
    assert (items["scored_tokens"].to_list(), items["sparse_tokens"].to_list()) == ([12] * 8, [9] * 8)
    assert value(run, "griffin@0.5", "exercised_frac", "task=own") == 0.75
    low, high = (value(run, "griffin@0.5", f"acc_{end}", "task=own") for end in ("low", "high"))
    assert 0 <= low <= sum(right) / 8 <= high <= 1
    difference = sum(right) / 8 - value(run, "dense", "acc", "task=own")
    assert value(run, "griffin@0.5", "delta_acc", "reference=dense,task=own") == pytest.approx(difference)
    assert run.items.filter(plan="random@0.5")["replica"].unique().sort().to_list() == [0, 1, 2]
    tasks = next(plan for plan in run.summary["plans"] if plan["plan"] == "griffin@0.5")["tasks"]
    assert tasks["own"]["acc"]["value"] == pytest.approx(sum(right) / 8)
    assert run.warnings == ()


def test_a_task_with_answers_of_one_token_is_not_exercised(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    file = items_file(tmp_path, 2, 1)
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "a", "griffin@0.5", task_files=(str(file),))
    run = evaluate(spec)
    assert value(run, "griffin@0.5", "exercised_frac", "task=own") == 0
    assert any("not exercised" in text for text in run.warnings)
    dense, sparse = (run.items.filter(plan=plan)["value"].to_list() for plan in ("dense", "griffin@0.5"))
    assert dense == sparse
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "b", "griffin@0.5", task_files=(str(file),),
                   dense_upto=1)  # fmt: skip
    run = evaluate(spec)
    assert value(run, "griffin@0.5", "exercised_frac", "task=own") == 1
    assert run.warnings == ()


def test_generation_continues_the_question_greedily(
    tiny_folder: Callable, tiny_loaded: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    loaded = tiny_loaded("llama")
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": words(10, seed=i), "answer": f"w{i}"}) + "\n" for i in range(3)))
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "e", "griffin@0", "griffin@0.9",
                   task_files=(str(file),), task_tokens=6)  # fmt: skip
    run = evaluate(spec)
    for place in range(3):
        ids = loaded.tokenizer(f"Question: {words(10, seed=place)}\nAnswer:", return_tensors="pt")
        out = loaded.model.generate(**ids, do_sample=False, max_new_tokens=6, pad_token_id=3)
        text = shorten(loaded.tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True))
        answers = {row["plan"]: row["answer"] for row in run.items.filter(item=place).to_dicts()}
        assert answers["dense"] == answers["griffin@0"] == text
    assert (
        run.items.filter(plan="griffin@0.9")["answer"].to_list() != run.items.filter(plan="dense")["answer"].to_list()
    )
    assert set(run.items["metric"]) == {"exact_match"}


def test_an_interrupted_task_goes_on_where_it_stopped(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    from actsparse.pipelines import task_scoring

    monkeypatch.setattr(task_scoring, "SHARD_ITEMS", 4)
    file = items_file(tmp_path, 2, 3)
    options = {"task_files": (str(file),)}
    whole = evaluate(spec_of(tiny_folder("llama"), corpus_file, tmp_path / "whole", "griffin@0.5", **options))
    spec = spec_of(tiny_folder("llama"), corpus_file, tmp_path / "cut", "griffin@0.5", **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(spec, Listener("tasks", 3))
    scored: list[tuple[str, range]] = []
    original = task_scoring._score
    monkeypatch.setattr(
        task_scoring,
        "_score",
        lambda s, t, arm, places: scored.append((arm.name, places)) or original(s, t, arm, places),
    )
    again = evaluate(spec)
    assert scored == [("griffin@0.5", range(4, 8))]
    assert again.items.equals(whole.items)
    assert again.results.filter(pl.col("metric") == "acc").equals(whole.results.filter(pl.col("metric") == "acc"))


@pytest.mark.parametrize(
    ("text", "kept"), [("  5 apples\n\nQuestion: next", "5 apples"), ("7\nQuestion: 8", "7"), ("9", "9")]
)
def test_an_answer_ends_where_another_question_begins(text: str, kept: str) -> None:
    assert shorten(text) == kept


def test_spaces_at_the_end_of_a_context_belong_to_its_continuation(tiny_loaded: Callable) -> None:
    tokenizer = tiny_loaded("llama").tokenizer
    context, continuation = encode_pair(tokenizer, "w1 w2  ", "w3 w4")
    assert context == tokenizer("w1 w2").input_ids
    assert continuation == tokenizer("w3 w4", add_special_tokens=False).input_ids


def test_a_choice_that_scores_no_token_is_refused(tiny_loaded: Callable) -> None:
    loaded = replace(tiny_loaded("llama"), tokenizer=lambda _text, verbose: SimpleNamespace(input_ids=[1, 2, 3]))
    item = Choice(query="w1 w2", choices=("w3", "w4"), gold=0)
    with pytest.raises(DataError, match="choice 0 of 'w1 w2' scores no token"):
        score_choice(Continuations(loaded, None, SINK, 0), Task("own", (item,)), item)
