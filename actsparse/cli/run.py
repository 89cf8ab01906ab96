"""`actsparse run`: the four verbs in a row."""

from pathlib import Path
from typing import Annotated

from actsparse.cli.options import (
    RUN,
    DataOptions,
    ModelOptions,
    OutputOptions,
    grouped,
    option,
    share,
)
from actsparse.cli.output import Output
from actsparse.pipelines.probes.names import probe_names
from actsparse.specs import ReportSpec, RunSpec

HELP = "Profile, threshold, evaluate and report in a row; what is up to date is used again."
EPILOG = "Example: actsparse run --model smollm2 --prompts my_prompts.jsonl"


@grouped
def command(
    model: ModelOptions,
    data: DataOptions,
    show: OutputOptions,
    *,
    plan: Annotated[
        list[str] | None, option("--plan", help="Further plans to evaluate, in short form. Repeatable.", panel=RUN)
    ] = None,
    target_error: Annotated[
        str, option("--target-error", help="Error that the TDA plan may make in a layer's output.", panel=RUN)
    ] = "0.2",
    probes: Annotated[
        str, option("--probes", help="Mechanisms: as profile takes them. [default on small models]", panel=RUN)
    ] = "cheap",
    timing_pairs: Annotated[int, option("--timing-pairs", help="Pairs of dense and sparse laps.", panel=RUN)] = 7,
    output_dir: Annotated[Path, option("--output", "-o", help="Folder of the runs.", panel=RUN)] = Path("runs"),
    report_file: Annotated[
        Path, option("--report", help="The HTML file; an earlier one is replaced.", panel=RUN)
    ] = Path("report.html"),
    force: Annotated[bool, option("--force", help="Do everything again.", panel=RUN)] = False,
    open_it: Annotated[bool, option("--open", help="Open the report in a browser.", panel=RUN)] = False,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    spec = RunSpec(
        model=model.spec(),
        data=data.spec(),
        plans=tuple(plan or ("griffin@0.5", "cats@0.5")),
        probes=probe_names(probes.split(",")),
        target_error=share(target_error, "--target-error"),
        timing_pairs=timing_pairs,
        output=output_dir,
        force=force,
    )
    from actsparse.cli.browser import show_page
    from actsparse.cli.shown import show_run
    from actsparse.pipelines.run import measure
    from actsparse.report.build import report

    found = measure(spec, output)
    output.note("4/4 report")
    runs = (found.profile.path, found.plan.path, found.evaluation.path)
    written = report(ReportSpec(runs=runs, output=report_file, force=True))
    show_run(found, written, output)
    show_page(written, output, open_it=open_it)
