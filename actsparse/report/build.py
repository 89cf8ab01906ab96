"""One offline HTML file from run directories, and the same findings as JSON, text or single figures."""

from pathlib import Path

from actsparse.errors import ActsparseError
from actsparse.report.export import export_figures, refuse_existing
from actsparse.report.page import render
from actsparse.report.view import build_view
from actsparse.specs import ReportSpec
from actsparse.store.files import write_bytes


def report(spec: ReportSpec, figures: Path | None = None) -> Path:
    """The path of the HTML file written for the runs of `spec`; with `figures` each figure is written there too.

    Raises RunError where a run cannot be read, ActsparseError where a file exists (without `force`) or cannot be
    written; nothing is written then.
    """
    output = spec.output
    if output.is_dir():
        raise ActsparseError(
            f"{output} is a directory, not a file", f"name the file: --output {output / 'report.html'}"
        )
    if output.exists() and not output.is_file():
        raise ActsparseError(f"{output} is a device or a pipe, not a file", "name a file with --output FILE")
    if output.exists() and not spec.force:
        raise ActsparseError(f"{output} exists", "overwrite it with --force, or write elsewhere with --output FILE")
    blocked = next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None)
    if blocked is not None:
        raise ActsparseError(f"{output} cannot be written: {blocked} is a file", "choose another place with --output")
    view = build_view(spec)
    if figures is not None:
        refuse_existing(view, figures, force=spec.force)
    page = render(view)
    write_bytes(output, page.encode("utf-8", errors="replace"))
    if figures is not None:
        export_figures(view, figures, force=spec.force)
    return output
