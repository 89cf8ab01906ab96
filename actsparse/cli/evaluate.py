"""`actsparse evaluate`."""

from dataclasses import replace

from actsparse.cli.evaluate_options import (
    GateOptions,
    PlanOptions,
    SampleOptions,
    StudyOptions,
    TaskOptions,
    ThroughputOptions,
)
from actsparse.cli.options import DataOptions, ModelOptions, OutputOptions, RunOptions, grouped
from actsparse.cli.output import Output
from actsparse.data.tasks import parse_dense_upto
from actsparse.specs import EvalSpec, StudySpec

HELP = "Quality and real speed of plans against dense, in the decode regime."
EPILOG = "Example: actsparse evaluate --model smollm2 --plan griffin@0.5 --plan cats@0.5 --corpus text.txt -n 4"


@grouped
def command(
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    show: OutputOptions,
    *,
    plans: PlanOptions,
    samples: SampleOptions,
    task: TaskOptions,
    study: StudyOptions,
    throughput: ThroughputOptions,
    gate: GateOptions,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    study.check({"--plan": plans.plan, "--task": task.task, "--tasks": task.tasks})
    if study.study is not None:
        run_study(study.study, study, model, data, run, output)
        return
    samples.check()
    task.check()
    spec = EvalSpec(
        model=model.spec(),
        data=data.spec(),
        plans=plans.names,
        controls=plans.controls,
        max_new_tokens=samples.max_new_tokens,
        generations=samples.generations,
        temperature=samples.temperature,
        top_p=samples.top_p,
        timing_pairs=samples.timing_pairs,
        timing_tokens=samples.timing_tokens,
        timing_prompts=samples.timing_prompts,
        fast_atomics=samples.fast_atomics,
        task_files=tuple(task.task or ()),
        tasks=task.names,
        include_path=task.include_path,
        task_limit=task.task_limit,
        task_tokens=task.task_tokens,
        shots=task.shots,
        dense_upto=parse_dense_upto(task.dense_upto),
        throughput=throughput.throughput,
        batch_sizes=throughput.batches,
        prompt_lengths=throughput.prompts,
        gen_lengths=throughput.lengths,
        max_ppl_increase=gate.ppl,
        min_top1=gate.top1,
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
    name: str, study: StudyOptions, model: ModelOptions, data: DataOptions, run: RunOptions, output: Output
) -> None:
    """`evaluate --study`."""
    asked, other = model.spec(), study.counterpart
    spec = StudySpec(
        study=name,
        model=asked,
        counterpart=None if other is None else replace(asked, name=other, revision=None),
        data=data.spec(),
        only=study.names,
        quick=study.quick,
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown import show_study
    from actsparse.pipelines.studies.run import study as run_experiments

    show_study(run_experiments(spec, output), output)
