"""`actsparse evaluate`."""

from dataclasses import replace
from typing import Annotated

from actsparse.cli.options import (
    RUN,
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    counts,
    grouped,
    option,
    share,
)
from actsparse.cli.output import Output
from actsparse.data.tasks import parse_dense_upto
from actsparse.errors import ActsparseError
from actsparse.specs import EvalSpec, StudySpec

TASKS, STUDY, THROUGHPUT = "Tasks", "Study", "Throughput"
HELP = "Quality and real speed of plans against dense, in the decode regime."
EPILOG = "Example: actsparse evaluate --model smollm2 --plan griffin@0.5 --plan cats@0.5 --corpus text.txt -n 4"


@grouped
def command(
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    show: OutputOptions,
    *,
    plan: Annotated[
        list[str] | None,
        option("--plan", help="A plan directory, griffin@0.5, or a sweep griffin@0.1:0.9:0.1. Repeatable.", panel=RUN),
    ] = None,
    controls: Annotated[
        bool, option("--controls/--no-controls", help="Random and static pruning at equal density.", panel=RUN)
    ] = True,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="Tokens of a sample.", panel=RUN)] = 48,
    generations: Annotated[int, option("--generations", help="Prompts continued as samples.", panel=RUN)] = 3,
    temperature: Annotated[
        float, option("--temperature", help="Draw the samples at this temperature; 0 is greedy.", panel=RUN)
    ] = 0.0,
    top_p: Annotated[
        float, option("--top-p", help="Draw from the fewest tokens that hold this probability.", panel=RUN)
    ] = 1.0,
    timing_pairs: Annotated[
        int, option("--timing-pairs", help="Pairs of dense and sparse laps; 0 leaves timing out.", panel=RUN)
    ] = 7,
    timing_tokens: Annotated[int, option("--timing-tokens", help="Decoded tokens of a lap.", panel=RUN)] = 12,
    timing_prompts: Annotated[int, option("--timing-prompts", help="Prompts that are timed.", panel=RUN)] = 1,
    task: Annotated[
        list[str] | None,
        option("--task", help="JSON lines: query, choices, gold; or question, answer. Repeatable.", panel=TASKS),
    ] = None,
    tasks: Annotated[
        str | None, option("--tasks", help="Tasks of lm-eval by name: piqa,gsm8k (extra `eval`).", panel=TASKS)
    ] = None,
    include_path: Annotated[
        str | None, option("--include-path", help="Folder with lm-eval tasks of your own.", panel=TASKS)
    ] = None,
    task_limit: Annotated[int | None, option("--task-limit", help="Items of each task. [all]", panel=TASKS)] = None,
    task_tokens: Annotated[int, option("--task-tokens", help="Tokens of an answer, at most.", panel=TASKS)] = 256,
    shots: Annotated[int, option("--shots", help="Items shown as examples first.", panel=TASKS)] = 0,
    dense_upto: Annotated[
        str, option("--dense-upto", help="P: the whole context is dense; P-1: its last token is sparse.", panel=TASKS)
    ] = "P",
    study: Annotated[
        str | None,
        option(
            "--study", help="A paper's experiments instead: pitfalls, moyu, tda, frontier, window, union.", panel=STUDY
        ),
    ] = None,
    quick: Annotated[bool, option("--quick", help="Small sizes, minutes on two cores.", panel=STUDY)] = False,
    only: Annotated[str | None, option("--only", help="Some experiments of the study: T1,T4.", panel=STUDY)] = None,
    counterpart: Annotated[
        str | None, option("--counterpart", help="The model with the other activation, for P1 and P5.", panel=STUDY)
    ] = None,
    throughput: Annotated[
        bool, option("--throughput", help="Time dense and plans at the sizes below.", panel=THROUGHPUT)
    ] = False,
    batch_sizes: Annotated[
        str, option("--batch-sizes", help="Sequences decoded together, up to 8 on a CPU.", panel=THROUGHPUT)
    ] = "1,2,4,8",
    prompt_lengths: Annotated[
        str, option("--prompt-lengths", help="Tokens of a prompt.", panel=THROUGHPUT)
    ] = "128,512,2048",
    gen_lengths: Annotated[
        str, option("--gen-lengths", help="Tokens generated after it.", panel=THROUGHPUT)
    ] = "32,128,512",
    max_ppl_increase: Annotated[
        str | None, option("--max-ppl-increase", help="Exit with 3 when a plan is worse: 5% or 0.05.", panel=RUN)
    ] = None,
    min_top1: Annotated[
        str | None, option("--min-top1", help="Exit with 3 when a plan agrees less: 0.9.", panel=RUN)
    ] = None,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    if study is not None:
        for name, value in (("--plan", plan), ("--task", task), ("--tasks", tasks)):
            if value:
                raise ActsparseError(f"{name} does not go with --study", "a study names its own plans; leave it out")
        run_study(study, model, data, run, output, quick=quick, only=only, counterpart=counterpart)
        return
    for name, value in (("--quick", quick), ("--only", only), ("--counterpart", counterpart)):
        if value:
            raise ActsparseError(f"{name} belongs to a study", "name one with --study pitfalls")
    for name, value in (
        ("--max-new-tokens", max_new_tokens),
        ("--timing-tokens", timing_tokens),
        ("--timing-prompts", timing_prompts),
        ("--task-tokens", task_tokens),
        ("--task-limit", 1 if task_limit is None else task_limit),
    ):
        if value < 1:
            raise ActsparseError(f"{name} must be at least 1, not {value}", "correct the value")
    for name, value in (("--generations", generations), ("--timing-pairs", timing_pairs), ("--shots", shots)):
        if value < 0:
            raise ActsparseError(f"{name} must be at least 0, not {value}", "correct the value")
    if temperature < 0:
        raise ActsparseError(f"--temperature must be at least 0, not {temperature:g}", "0 decodes greedily")
    if not 0 < top_p <= 1:
        raise ActsparseError(f"--top-p is {top_p:g}, and must be above 0 and at most 1", "leave it out for all tokens")
    if top_p < 1 and not temperature:
        raise ActsparseError("--top-p draws nothing without a temperature", f"add --temperature 1 --top-p {top_p:g}")
    spec = EvalSpec(
        model=model.spec(),
        data=data.spec(),
        plans=tuple(plan or ("griffin@0.5",)),
        controls=controls,
        max_new_tokens=max_new_tokens,
        generations=generations,
        temperature=temperature,
        top_p=top_p,
        timing_pairs=timing_pairs,
        timing_tokens=timing_tokens,
        timing_prompts=timing_prompts,
        task_files=tuple(task or ()),
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        include_path=include_path,
        task_limit=task_limit,
        task_tokens=task_tokens,
        shots=shots,
        dense_upto=parse_dense_upto(dense_upto),
        throughput=throughput,
        batch_sizes=counts(batch_sizes, "--batch-sizes"),
        prompt_lengths=counts(prompt_lengths, "--prompt-lengths"),
        gen_lengths=counts(gen_lengths, "--gen-lengths"),
        max_ppl_increase=None if max_ppl_increase is None else share(max_ppl_increase, "--max-ppl-increase"),
        min_top1=None if min_top1 is None else share(min_top1, "--min-top1"),
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown import check_gate, show_eval
    from actsparse.pipelines.evaluate import evaluate

    found = evaluate(spec, output)
    show_eval(found, output)
    check_gate(found, spec)


def run_study(
    name: str,
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    output: Output,
    *,
    quick: bool,
    only: str | None,
    counterpart: str | None,
) -> None:
    """`evaluate --study`."""
    asked = model.spec()
    spec = StudySpec(
        study=name,
        model=asked,
        counterpart=None if counterpart is None else replace(asked, name=counterpart, revision=None),
        data=data.spec(),
        only=tuple(part.strip() for part in (only or "").split(",") if part.strip()),
        quick=quick,
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown import show_study
    from actsparse.pipelines.studies.run import study

    show_study(study(spec, output), output)
