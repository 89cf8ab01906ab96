"""The view model: findings, notices and sections computed from runs."""

import json
from dataclasses import replace
from pathlib import Path

import example_runs as example
import polars as pl
import pytest
from example_evals import ExamplePlan

from actsparse.report.figures import speed
from actsparse.report.registry import ROWS, SECTIONS
from actsparse.report.samples import split_at_difference
from actsparse.report.view import FigureView, ReportView, build_view
from actsparse.results import EvalRow, ExpertsRecord, Measure, RunKind
from actsparse.specs import ReportSpec
from actsparse.store import tables

PROFILE_TABLES = ("measures", "neurons", "heads", "histograms", "probes", "coactivation")
EVAL_TABLES = ("results", "tokens", "timing", "throughput", "generations", "summary")


def figures(view: ReportView) -> dict[str, FigureView]:
    return {figure.id: figure for section in view.sections for row in section.figures for figure in row}


def caption(view: ReportView, name: str) -> str:
    return figures(view)[name].caption.replace("\u202f", " ").replace("\u00a0", " ")


def test_every_figure_of_the_registry_is_drawn_or_named_as_missing(view: ReportView) -> None:
    drawn = {figure.row.id for figure in figures(view).values()}
    missing = {row.what for row in view.unmeasured}
    assert all(row.id in drawn or row.optional or row.title in missing for row in ROWS)
    assert {row.section for row in ROWS} == set(SECTIONS)
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_what_experts_have_no_definition_for_is_said_with_the_reason(tmp_path: Path) -> None:
    """No command makes it, so none is named; one layer without experts is enough to have it."""

    def missing(layers: int) -> dict[str, tuple[str, str]]:
        experts = ExpertsRecord(layers=tuple(range(layers)), count=8, top_k=2, width=64, shared_width=None)
        model = replace(example.SMOLLM2, layers=4, experts=experts)
        run = example.profile_run(tmp_path / str(layers), model=model, leave_out=("probes",))
        found = build_view(ReportSpec(runs=(run,)))
        return {row.what: (row.command, row.why) for row in found.unmeasured}

    name = "HU4: does past salience tell the present one?"
    command, why = missing(4)[name]
    assert command == ""
    assert "some experts alone" in why
    assert missing(3)[name] == (f"actsparse profile --model {example.SMOLLM2.requested} --gradients", "")
    assert missing(4)["SI1: how soon the mask settles"][1] == ""


def test_a_warning_names_a_plan_and_not_its_folder(tmp_path: Path) -> None:
    plan = example.plan_run(tmp_path / "plan-aa")
    text = f"{plan} does not pay here: 0.78x of dense decode; run dense instead"
    found = build_view(ReportSpec(runs=(plan, example.eval_run(tmp_path / "eval", warnings=(text,)))))
    said = next(notice.text for notice in found.notices if "does not pay" in notice.text)
    assert said == text.replace(str(plan), "cats@0.5")


def test_captions_state_what_the_data_say(view: ReportView) -> None:
    frame = figures(view)["cett-layers-0"].frame
    at = frame.filter(target=0.2)["sparsity"]
    assert f"{100 * at.mean():.1f} % at CETT 0.2" in caption(view, "cett-layers-0")
    assert f"{100 * at.min():.1f} %" in caption(view, "cett-layers-0")
    assert "static:stat=griffin@0.5 most, 1.27× of at most 1.42×" in caption(view, "speed-0")
    assert "griffin@0.5 (88.5 against 73.2)" in caption(view, "quality-0")
    assert "Beyond the axis: random@0.5" in caption(view, "frontier-0")
    assert "n = 1 024 scored tokens" in caption(view, "kl-0")
    assert "Dense reads 538 MB a token, 59 % of it mlp" in caption(view, "bytes-0")
    assert "cats@0.5 (dashed) cuts off" in caption(view, "magnitudes-gate-0")
    assert "There are no exact zeros." in caption(view, "kind-sparsity-0")


def test_every_caption_says_on_how_much_it_rests(view: ReportView) -> None:
    without = [name for name in figures(view) if "n = " not in caption(view, name)]
    assert without == []


def test_captions_follow_the_numbers(tmp_path: Path) -> None:
    """The same figure of other runs says something else: nothing is canned."""
    worse = ExamplePlan(plan="griffin@0.5", ppl=30.0, speed=0.9)
    other = build_view(ReportSpec(runs=(example.eval_run(tmp_path / "eval", plans=(worse,)),)))
    assert "0 of 1 timed plans are faster" in caption(other, "speed-0")
    assert "No random, static and oracle baseline in these runs" in caption(other, "quality-0")


def test_frontier_marks_only_timed_plans_that_none_beats(view: ReportView) -> None:
    frame = figures(view)["frontier-0"].frame
    best = frame.filter(frame["best"])["plan"].to_list()
    assert best == ["dense", "tda:target_error=0.2", "static:stat=griffin@0.25", "static:stat=griffin@0.5"]
    hollow = frame.filter(~frame["timed"])["plan"].to_list()
    assert hollow == ["cats@0.25", "cats@0.5"]  # an oracle leaves no byte unread: it has no ceiling to stand at


def test_cards_are_at_most_six_and_show_dense_to_sparse(view: ReportView) -> None:
    assert 1 <= len(view.cards) <= 6
    speed = next(card for card in view.cards if card.title.startswith("Decode"))
    assert (speed.before, speed.value) == ("24.3\u202fms", "23.0\u202fms")
    assert speed.change == "1.05×, faster"  # beside the dense laps that it was paired with, not those of all plans
    assert "ceiling 1.11×" in speed.note


def test_warnings_of_the_runs_and_overlap_of_the_calibration_text(tmp_path: Path, view: ReportView) -> None:
    assert [(notice.letter, notice.text) for notice in view.notices] == [("C", "byte figures count 4 bytes a weight")]
    overlapping = replace(example.CALIBRATION, blocks=(3, 7))
    run = example.eval_run(tmp_path / "eval", texts=(example.CORPUS, overlapping))
    found = build_view(ReportSpec(runs=(run,))).notices
    assert "about 25\u202f% of what was scored in wikitext2-test.txt was also used to fit" in found[0].text


def test_a_plan_fitted_on_the_scored_text_is_warned_about(tmp_path: Path) -> None:
    plan = example.plan_run(tmp_path / "plan", calibration=replace(example.CORPUS, role="calibration"))
    run = example.eval_run(tmp_path / "eval", texts=(example.CORPUS,))
    assert "was also used to fit" in build_view(ReportSpec(runs=(run, plan))).notices[0].text


def test_windows_decide_over_block_numbers(tmp_path: Path) -> None:
    scored = replace(example.CORPUS, window_hashes=("a", "b"))
    fitted = replace(example.CALIBRATION, blocks=(0, 4), window_hashes=("c", "d"))
    run = example.eval_run(tmp_path / "eval", texts=(scored, fitted))
    assert build_view(ReportSpec(runs=(run,))).notices == ()


def test_an_unfinished_run_is_drawn_with_a_banner(tmp_path: Path) -> None:
    run = example.eval_run(tmp_path / "eval", finish=False, leave_out=("summary", "timing"))
    view = build_view(ReportSpec(runs=(run,)))
    assert "incomplete" in view.notices[0].text
    assert "actsparse evaluate --model" in view.notices[0].text
    assert "quality-0" in figures(view)
    assert "phases-0" not in figures(view)
    assert not view.origins[0].complete


def test_a_damaged_table_of_an_unfinished_run_is_left_out_and_said(tmp_path: Path) -> None:
    run = example.eval_run(tmp_path / "eval", finish=False)
    (run / "tokens.parquet").write_bytes(b"not parquet")
    view = build_view(ReportSpec(runs=(run,)))
    assert any("tokens.parquet is damaged" in notice.text for notice in view.notices)
    assert "drift-0" not in figures(view)


def test_two_models_stand_side_by_side(pair: tuple[Path, ...]) -> None:
    view = build_view(ReportSpec(runs=pair))
    panels = {figure.panel for figure in figures(view).values()}
    assert panels == {"SmolLM2-135M-Instruct", "relu", ""}  # "": the figures that hold both
    assert "kind-zeros-1" in figures(view)
    assert "kind-zeros-0" not in figures(view)
    assert sum("of another model (relu)" in notice.text for notice in view.notices) == 1
    assert view.compare is not None
    assert view.compare.rows[0][0].text == "CETT sparsity at 0.1, mean over layers"


def test_two_evaluations_of_one_model_share_a_panel(tmp_path: Path) -> None:
    first = example.eval_run(tmp_path / "a", plans=(ExamplePlan(plan="griffin@0.5", ppl=88.0),))
    second = example.eval_run(
        tmp_path / "b", plans=(ExamplePlan(plan="griffin@0.5", ppl=80.0), ExamplePlan(plan="cats@0.5", ppl=27.0))
    )
    view = build_view(ReportSpec(runs=(first, second)))
    frame = figures(view)["quality-0"].frame
    assert frame["plan"].to_list() == ["griffin@0.5", "griffin@0.5 (B)", "cats@0.5"]
    assert view.looks["griffin@0.5 (B)"].colour == view.looks["griffin@0.5"].colour
    assert view.looks["griffin@0.5 (B)"].symbol != view.looks["griffin@0.5"].symbol


def test_an_untimed_plan_of_a_second_run_is_drawn(tmp_path: Path) -> None:
    """Its symbol is open for both reasons, which plotly knows one name of."""
    plans = (ExamplePlan(plan="oracle-a@0.5", ppl=23.2),)
    view = build_view(
        ReportSpec(runs=tuple(example.eval_run(tmp_path / name, plans=plans) for name in ("a", "b", "c")))
    )
    assert {"oracle-a@0.5", "oracle-a@0.5 (B)", "oracle-a@0.5 (C)"} <= set(view.looks)
    for figure in view.figures:
        figure.row.draw(figure.frame, view.looks)
    assert view.looks["oracle-a@0.5 (B)"].opened() == view.looks["oracle-a@0.5 (B)"]


def test_the_same_run_twice_is_read_once(runs: tuple[Path, ...]) -> None:
    assert len(build_view(ReportSpec(runs=(runs[2], runs[2]))).origins) == 1


def test_runs_without_tables_still_make_a_report(tmp_path: Path) -> None:
    profile = example.profile_run(
        tmp_path / "p", leave_out=("measures", "neurons", "heads", "histograms", "probes", "coactivation")
    )
    run = example.eval_run(
        tmp_path / "e", leave_out=("results", "tokens", "timing", "generations", "summary", "throughput")
    )
    view = build_view(ReportSpec(runs=(profile, run)))
    assert not figures(view)
    assert {row.title for row in ROWS if not row.optional} <= {row.what for row in view.unmeasured}


def test_a_later_measurement_leaves_the_list_once_it_is_there(tmp_path: Path) -> None:
    def fill(_: object) -> None:
        row = Measure(metric="union", kind="neuron", param="b=8,r=0.2", value=0.4, unit="1", n=8)
        tables.write(tmp_path / "p" / "measures.parquet", tables.frame([row], Measure))

    run = example.write_run(tmp_path / "p", RunKind.PROFILE, fill)
    what = [row.what for row in build_view(ReportSpec(runs=(run,))).unmeasured]
    assert "Batch union" not in what
    assert any("HU1" in text for text in what)


def test_samples_mark_where_they_leave_dense(view: ReportView) -> None:
    first = view.samples[0].samples[0]
    by_plan = {text.plan: text for text in first.continuations}
    assert first.continuations[0].plan == "dense"
    assert by_plan["cats@0.5"].different == ""
    assert by_plan["cats@0.5"].note == "as dense for all 48 tokens"
    assert by_plan["griffin@0.5"].same.endswith("lit the lamp and ")
    assert by_plan["griffin@0.5"].note == "leaves dense at token 8; 41 % repeated"


@pytest.mark.parametrize(
    ("dense", "text", "parts"),
    [
        ("a b c", "a b c", ("a b c", "")),
        ("a bat c", "a bad c", ("a ", "bad c")),
        ("a b c", "x", ("", "x")),
        ("a b c d", "a b", ("a b", "")),
    ],
)
def test_split_at_difference(dense: str, text: str, parts: tuple[str, str]) -> None:
    assert split_at_difference(dense, text) == parts


def test_worst_tokens_are_text_where_the_run_kept_it(tmp_path: Path, view: ReportView) -> None:
    assert "ids" in view.worst[0].note
    words = {token: f" w{token}" for token in range(49152)}
    run = example.eval_run(tmp_path / "eval", plans=example.PLANS[:1], vocabulary=words)
    table = build_view(ReportSpec(runs=(run,))).worst[0]
    losses = [row[1].sort for row in table.rows]
    assert losses == sorted((loss for loss in losses if loss is not None), reverse=True)
    assert table.rows[0][6].text.startswith(" w")


def test_path_differences_are_warned_about_once(tmp_path: Path) -> None:
    row = EvalRow(plan="cats@0.5", metric="path_check", value=0.2, unit="nats", n=1)
    cats = (ExamplePlan(plan="cats@0.5", ppl=27.8),)
    silent = example.eval_run(tmp_path / "a", plans=cats, extra=(row,))
    said = "cats@0.5: engine and masked path differ by 0.2 nats on a token (tolerance 0.001)"
    warned = example.eval_run(tmp_path / "b", plans=cats, extra=(row,), warnings=(said,))
    for run in (silent, warned):
        notices = build_view(ReportSpec(runs=(run,))).notices
        assert sum("engine and masked path differ" in notice.text for notice in notices) == 1


def test_what_holds_at_several_batch_sizes_is_one_warning(tmp_path: Path) -> None:
    why = "no throughput (no engine runs this plan)"
    said = [f"oracle-n@0.5 at batch {batch}, prompt {prompt}: {why}" for batch in (1, 2, 4) for prompt in (128, 512)]
    run = example.eval_run(tmp_path / "e", plans=example.PLANS[:1], warnings=("first", *said, "last"))
    texts = [notice.text for notice in build_view(ReportSpec(runs=(run,))).notices]
    assert texts == ["first", f"oracle-n@0.5 at batch 1, 2 and 4, prompt 128 and 512: {why}", "last"]


def test_runs_of_one_kind_are_named_together(pair: tuple[Path, ...], tmp_path: Path) -> None:
    other = example.eval_run(tmp_path / "e", plans=example.PLANS[:1])
    said = build_view(ReportSpec(runs=(*pair, other))).runs_said
    assert ("C, E", "eval runs of SmolLM2-135M-Instruct") in said
    assert ("B", "profile run of relu") in said


def test_one_profile_beside_one_evaluation_is_no_comparison(runs: tuple[Path, ...], pair: tuple[Path, ...]) -> None:
    assert build_view(ReportSpec(runs=(runs[0], runs[2]))).compare is None
    mixed = build_view(ReportSpec(runs=(pair[2], pair[0], pair[1]))).compare
    assert mixed is not None
    assert all(column.name for column in mixed.columns)
    assert all(cell.text != "\u2013" for row in mixed.rows for cell in row)


def many(*amounts: float) -> tuple[ExamplePlan, ...]:
    names = ("griffin", "cats", "teal", "wina")
    return tuple(
        ExamplePlan(plan=f"{name}@{amount}", ppl=22.6 + 10 * amount + 20 * amount * place, neurons=amount)
        for place, name in enumerate(names)
        for amount in amounts
    )


def test_the_dense_model_of_several_evaluations_stands_there_once(tmp_path: Path) -> None:
    runs = tuple(
        example.eval_run(tmp_path / name, plans=(ExamplePlan(plan=f"cats@0.{name}", ppl=27.0),)) for name in "35"
    )
    view = build_view(ReportSpec(runs=runs))
    assert [row[0].text for row in view.plan_grids[0].rows] == ["dense", "cats@0.3", "cats@0.5"]
    assert figures(view)["bytes-0"].frame["plan"].to_list().count("dense") == 3  # its three components, once each
    other = example.eval_run(tmp_path / "7", plans=(ExamplePlan(plan="cats@0.7", ppl=27.0),), dense=25.0)
    labels = [row[0].text for row in build_view(ReportSpec(runs=(runs[0], other))).plan_grids[0].rows]
    assert labels == ["dense", "cats@0.3", "dense (B)", "cats@0.7"]


def test_many_plans_keep_figures_and_captions_readable(tmp_path: Path) -> None:
    run = example.eval_run(tmp_path / "e", plans=many(0.1, 0.2, 0.3, 0.4, 0.5))
    view = build_view(ReportSpec(runs=(run,)))
    drawn = figures(view)["rel-err-0"].row.draw(figures(view)["rel-err-0"].frame, view.looks)
    assert [trace.name for trace in drawn.data] == ["griffin@0.3", "cats@0.3", "teal@0.3", "wina@0.3"]
    assert figures(view)["rel-err-0"].frame["plan"].n_unique() == 20
    assert "and 14 more. n = 20 plans" in caption(view, "frontier-0")
    frontier = figures(view)["frontier-0"].row.draw(figures(view)["frontier-0"].frame, view.looks)
    assert 1 <= sum(trace.mode == "markers+text" for trace in frontier.data) <= 14
    methods = [sentence for sentence in view.verdicts[0].sentences if sentence.role == "method"]
    assert methods[0].grade == "usable"
    assert [one.grade for one in methods] == sorted(
        (one.grade for one in methods), key=("neutral", "usable", "costly", "unusable").index
    )


def test_the_way_on_from_an_incomplete_run_can_be_pasted_and_does_not_start_over(tmp_path: Path) -> None:
    run = example.eval_run(tmp_path / "eval", finish=False)
    draft = json.loads((run / "unfinished.json").read_text())
    draft["provenance"]["command"] = ["actsparse", "evaluate", "--model", "my model", "--force", "--no-resume"]
    (run / "unfinished.json").write_text(json.dumps(draft))
    text = build_view(ReportSpec(runs=(run,))).notices[0].text
    assert text.endswith("Resume it with: actsparse evaluate --model 'my model'")


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", False), ("float32", True)])
def test_how_far_engine_and_masked_path_may_differ_depends_on_the_dtype(
    tmp_path: Path, dtype: str, warned: bool
) -> None:
    row = EvalRow(plan="cats@0.5", metric="path_check", value=0.02, unit="nats", n=1)
    model = replace(example.SMOLLM2, dtype=dtype)
    plans = (ExamplePlan(plan="cats@0.5", ppl=27.8),)
    run = example.eval_run(tmp_path / "e", model=model, plans=plans, extra=(row,))
    said = [notice.text for notice in build_view(ReportSpec(runs=(run,))).notices]
    assert any("engine and masked path differ" in text for text in said) is warned


def test_a_speed_up_above_its_ceiling_is_said_and_told_from_noise(tmp_path: Path) -> None:
    ceiling = 1 / (1 - 0.5 * 0.59)
    plans = (
        ExamplePlan(plan="griffin@0.5", ppl=30.0, speed=ceiling + 0.2),
        ExamplePlan(plan="cats@0.5", ppl=27.0, speed=ceiling + 0.01),
        ExamplePlan(plan="tda@0.5", ppl=27.0, speed=1.2),
    )
    said = [one.text for one in build_view(ReportSpec(runs=(example.eval_run(tmp_path / "e", plans=plans),))).notices]
    assert len(said) == 2
    assert said[0].startswith("griffin@0.5 (1.62× of 1.42×): the speed-up is above the ceiling for sure")
    assert said[1].startswith("cats@0.5 (1.43× of 1.42×): the speed-up is above the ceiling, which the interval")


@pytest.mark.parametrize(("low", "said"), [(1.45, "for sure: weight bytes"), (1.4, "which its interval contains")])
def test_the_caption_of_speeds_tells_noise_as_the_notices_do(low: float, said: str) -> None:
    row = {
        "plan": "p",
        "speedup": 1.5,
        "low": low,
        "high": 1.6,
        "ceiling": 1.42,
        "reached": 1.2,
        "verdict": "faster",
        "n": 7,
    }
    assert f"above its ceiling of 1.42×{' ' if 'sure' in said else ', '}{said}" in speed.caption(pl.DataFrame([row]))


def test_each_plan_shows_the_dense_time_that_it_was_paired_with(view: ReportView) -> None:
    rows = {row[0].text: row for row in view.plan_grids[0].rows}
    place = [column.name for column in view.plan_grids[0].columns].index("decode")
    assert rows["tda:target_error=0.2"][place].detail == "dense 24.3"
    assert rows["dense"][place].detail == ""
    assert "timed against in turns" in view.plan_grids[0].note
