"""`actsparse doctor`."""

from typing import Annotated

import typer

from actsparse.cli.options import MODEL, OutputOptions, grouped, option
from actsparse.cli.output import Output

HELP = "Versions, devices, compilers, places and a small self-test of this machine; 1 when something is broken."
EPILOG = "Example: actsparse doctor --json > machine.json"


@grouped
def command(
    show: OutputOptions,
    *,
    device: Annotated[
        str, option("--device", help="Where the self-test runs: auto, cpu, cuda, cuda:N.", panel=MODEL)
    ] = "auto",
) -> None:
    from dataclasses import asdict

    from actsparse.pipelines.doctor import Health, doctor
    from actsparse.store.codec import pretty

    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    found = doctor(device, output)
    if output.json:
        document = {
            "ok": found.ok,
            "bandwidth_gb_per_s": found.bandwidth_gb_per_s,
            "checks": [asdict(check) for check in found.checks],
        }
        output.document(pretty(document))
    else:
        for group in dict.fromkeys(check.group for check in found.checks):
            output.line(f"{group}")
            for check in (one for one in found.checks if one.group == group):
                mark = "" if check.health is Health.OK else f"  [{check.health.value}: {check.hint}]"
                output.line(f"  {check.name:<24}{check.value}{mark}")
        output.line("everything works" if found.ok else "something is broken: see above")
    if not found.ok:
        raise typer.Exit(1)
