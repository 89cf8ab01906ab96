"""`actsparse threshold`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from actsparse.cli.options import MODEL, RUN, OutputOptions, RunOptions, grouped, option, share
from actsparse.cli.output import Output
from actsparse.specs import ThresholdSpec

TARGET = "How much to drop"
HELP = "Derive a plan from a profile: which neurons a method keeps, or the threshold that it uses."
EPILOG = "Example: actsparse threshold runs/MODEL/profile-3f9c1e --method tda --target-error 0.2"


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """How much a plan is to drop."""

    sparsity: Annotated[
        str | None, option("--sparsity", help="Share to drop: 0.5 or 50%, of what --basis names.", panel=TARGET)
    ] = None
    basis: Annotated[
        str, option("--basis", help="unit (the method's own), neuron, mlp-bytes, model-bytes.", panel=TARGET)
    ] = "unit"
    target_error: Annotated[
        str | None,
        option("--target-error", help="Mean relative error of the FFN output to allow in each layer.", panel=TARGET),
    ] = None
    target_ppl_increase: Annotated[
        str | None,
        option("--target-ppl-increase", help="Rise of perplexity on the calibration text to allow: 1%.", panel=TARGET),
    ] = None
    target_speedup: Annotated[
        float | None,
        option("--target-speedup", help="Speed-up that the bytes not read shall allow: 1.3.", panel=TARGET),
    ] = None

    def share_of(self, name: Literal["sparsity", "target_error", "target_ppl_increase"]) -> float | None:
        """A target as a number; raises ActsparseError naming the option where it is no share."""
        given: str | None = getattr(self, name)
        return None if given is None else share(given, f"--{name.replace('_', '-')}")


@grouped
def command(
    profile: Annotated[Path, typer.Argument(help="A profile run directory.", metavar="RUN")],
    run: RunOptions,
    show: OutputOptions,
    *,
    method: Annotated[
        str,
        option("--method", help="A method (see `actsparse methods`), or method:key=value@x.", panel=RUN),
    ],
    settings: Annotated[
        list[str] | None, option("--set", help="An option of the method, name=value. Repeatable.", panel=RUN)
    ] = None,
    target: TargetOptions,
    transfer: Annotated[
        str | None,
        option("--transfer", help="Another text: sparsity and errors are measured there too.", panel=RUN),
    ] = None,
    export: Annotated[
        Path | None,
        option("--export", help="Folder for a smaller checkpoint of a static plan.", panel=RUN),
    ] = None,
    device: Annotated[str, option("--device", help="auto, cpu, cuda, cuda:N.", panel=MODEL)] = "auto",
    offline: Annotated[bool, option("--offline", help="Use no network.", panel=MODEL)] = False,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    spec = ThresholdSpec(
        run=profile,
        plan=_with_settings(method, settings or []),
        sparsity=target.share_of("sparsity"),
        basis=target.basis,
        target_error=target.share_of("target_error"),
        target_ppl_increase=target.share_of("target_ppl_increase"),
        target_speedup=target.target_speedup,
        transfer=transfer,
        export=export,
        device=device,
        offline=offline,
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown import show_plan
    from actsparse.pipelines.threshold import threshold

    show_plan(threshold(spec, output), output)


def _with_settings(method: str, settings: list[str]) -> str:
    """`--set` options written into the short form."""
    if not settings:
        return method
    head, at, amount = method.partition("@")
    return f"{head}{',' if ':' in head else ':'}{','.join(settings)}{at}{amount}"
