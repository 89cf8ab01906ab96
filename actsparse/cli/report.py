"""`actsparse report`."""

from pathlib import Path
from typing import Annotated

import typer

from actsparse.cli.options import RUN, OutputOptions, grouped, option
from actsparse.cli.output import Output
from actsparse.errors import ActsparseError
from actsparse.specs import ReportSpec

HELP = "One offline HTML file from runs; the first is the reference."
DEFAULT = Path("report.html")
EPILOG = "Example: actsparse report runs/MODEL/profile-3f9c1e runs/MODEL/eval-77ab10"


@grouped
def command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", metavar="RUN...")],
    show: OutputOptions,
    *,
    file: Annotated[Path, option("--output", "-o", help="The HTML file.", panel=RUN)] = DEFAULT,
    title: Annotated[str | None, option("--title", help="Title of the page.", panel=RUN)] = None,
    force: Annotated[bool, option("--force", help="Overwrite an existing file.", panel=RUN)] = False,
    text: Annotated[bool, option("--text", help="Print the summary instead of writing a file.", panel=RUN)] = False,
    figures: Annotated[
        Path | None, option("--figures", help="Also write every figure as HTML and CSV into this folder.", panel=RUN)
    ] = None,
    open_it: Annotated[bool, option("--open", help="Open the file in a browser.", panel=RUN)] = False,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    spec = ReportSpec(runs=tuple(runs), output=file, title=title, force=force)
    if text or show.json:
        asked = "--text" if text else "--json"
        for name, given in (("--open", open_it), ("--output", file != DEFAULT), ("--figures", figures is not None)):
            if given:
                raise ActsparseError(f"{name} does not go with {asked}, which writes no file", f"leave out {asked}")
        from actsparse.cli.shown import show_report

        show_report(spec, output)
        return
    from actsparse.cli.browser import show_page
    from actsparse.report.build import report

    written = report(spec, figures)
    output.line(str(written))
    if figures is not None:
        output.line(f"every figure and its numbers: {figures}")
    show_page(written, output, open_it=open_it)
