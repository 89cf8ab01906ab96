"""The terminal twin: the summary of a report as a rich renderable, for those on a server. Printing is the CLI's."""

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from actsparse.report.cards import Card
from actsparse.report.grids import Cell, Grid
from actsparse.report.looks import BAD, GOOD
from actsparse.report.view import FigureView, ReportView, VerdictView
from actsparse.report.wording import one_line, percent
from actsparse.results import ClaimVerdict

SPARKS = "▁▂▃▄▅▆▇█"
COLUMNS = ("plan", "perplexity", "change", "same token", "bytes", "speed-up", "ceiling", "decode")


def summary(view: ReportView) -> RenderableType:
    """Warnings, verdicts, cards, studies, plans, sparsity by layer, the mechanisms and what was not measured.

    All text from outside stands in `Text`, where markup and control characters mean nothing.
    """
    return Group(
        Text(view.title, style="bold"),
        *(_warnings(view) if view.notices else ()),
        *(line for group in view.verdicts for line in _verdicts(group)),
        *([Text(), _cards(view)] if view.cards else []),
        *_studies(view),
        *(part for grid in view.plan_grids for part in (Text(), _plans(grid))),
        *_sparsity(view),
        *_mechanisms(view),
        *_unmeasured(view),
    )


def sparkline(values: list[float]) -> str:
    """One character a value, from the lowest to the highest of them."""
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def _warnings(view: ReportView) -> list[RenderableType]:
    lines = [Text(f"{notice.letter} {one_line(notice.text)}".strip()) for notice in view.notices]
    return [
        Panel(
            Group(*lines),
            title=f"{len(lines)} warning{'s' * (len(lines) > 1)}",
            title_align="left",
            border_style="yellow",
            box=box.SQUARE,
        )
    ]


def _verdicts(group: VerdictView) -> list[RenderableType]:
    lines: list[RenderableType] = [Text()]
    if group.panel:
        lines.append(Text(one_line(group.panel), style="bold"))
    advice = [sentence for sentence in group.sentences if sentence.role == "advice"]
    lines += [Text(sentence.text, style="bold") for sentence in advice]
    for sentence in group.sentences:
        if sentence.role != "advice":
            rest = sentence.text[len(sentence.title) :]
            lines.append(Text.assemble("  ", (sentence.title, "bold" if sentence.role == "method" else "dim"), rest))
    lines.append(Text(f"Measured on {group.context}.", style="dim"))
    return lines


def _cards(view: ReportView) -> Table:
    table = Table(
        title=Text(view.headline) if view.headline else None,
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    for card in view.cards:
        table.add_row(
            Text(card.title, style="dim"),
            _value(card),
            Text(card.change, style=_tone(card)),
            Text(card.note, style="dim"),
        )
    return table


def _value(card: Card) -> Text:
    return Text(f"{card.before} → {card.value}" if card.before else card.value, style="bold")


def _tone(card: Card) -> str:
    return {"good": GOOD, "bad": BAD}.get(card.tone, "")


def _studies(view: ReportView) -> list[RenderableType]:
    """What each study's experiments found, a line each."""
    lines: list[RenderableType] = []
    for study in view.studies:
        name = f"{study.title}, {study.label}" if study.label else study.title
        lines += [Text(), Text.assemble((name, "bold"), f": {study.tally}")]
        for one in study.experiments:
            colour = {ClaimVerdict.HOLDS: GOOD, ClaimVerdict.FAILS: BAD}.get(one.verdict, "")
            quick = " (quick)" if one.quick else ""
            lines.append(Text.assemble(f"  {one.name} ", (one.verdict.value, colour), f"{quick}: {one.conclusion}"))
    return lines


def _mechanisms(view: ReportView) -> list[RenderableType]:
    """The findings of the two mechanisms."""
    section = next((section for section in view.sections if section.id == "mechanisms"), None)
    figures = [figure for row in section.figures for figure in row] if section else []
    if not figures or section is None:
        return []
    lines: list[RenderableType] = [Text(), Text(section.title, style="bold")]
    for figure in figures:
        title = " ".join(part for part in (figure.row.title.split(":")[0], figure.panel) if part)
        lines.append(Text.assemble(f"  {title}: ", (figure.caption, "dim")))
    return lines


def _plans(grid: Grid) -> Table:
    table = Table(title=Text(grid.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    places = [place for place, column in enumerate(grid.columns) if column.name in COLUMNS]
    for place in places:
        column = grid.columns[place]
        heading = f"{column.name} ({column.unit})" if column.unit else column.name
        table.add_column(Text(heading), justify="right" if column.numeric else "left", overflow="fold")
    for row in grid.rows:
        table.add_row(*(_cell(row[place], grid.columns[place].name) for place in places))
    return table


def _cell(cell: Cell, column: str) -> Text:
    """A cell on one line; speed-ups keep their interval, which decides on them, and times the dense one beside them."""
    kept = column in ("speed-up", "decode") and cell.detail and cell.sort
    return Text(f"{cell.text} ({cell.detail})" if kept else cell.text)


def _sparsity(view: ReportView) -> list[RenderableType]:
    """A sparkline of CETT sparsity over layers for each profile and target."""
    lines: list[RenderableType] = []
    for figure in _figures(view, "cett-layers"):
        lines += [
            Text(),
            Text(" ".join(part for part in ("CETT sparsity by layer", figure.panel) if part), style="bold"),
        ]
        for (target,), rows in figure.frame.partition_by("target", as_dict=True, maintain_order=True).items():
            values = rows["sparsity"].to_list()
            span = f"{percent(min(values), 0)} to {percent(max(values), 0)}"
            lines.append(Text(f"  {target:<5g}{sparkline(values)}  {span}"))
        lines.append(Text(f"  {figure.caption}", style="dim"))
    return lines


def _figures(view: ReportView, row: str) -> list[FigureView]:
    return [
        figure for section in view.sections for figures in section.figures for figure in figures if figure.row.id == row
    ]


def _unmeasured(view: ReportView) -> list[RenderableType]:
    if not view.unmeasured:
        return []
    lines: list[RenderableType] = [Text(), Text("Not measured in these runs", style="bold")]
    for command in dict.fromkeys(row.command for row in view.unmeasured if row.command):
        what = ", ".join(row.what for row in view.unmeasured if row.command == command)
        lines += [Text(f"  {what}", style="dim"), Text(f"    {command}")]
    lines += [
        Text(f"  {row.what}: not drawn for mixtures of experts ({row.why})", style="dim")
        for row in view.unmeasured
        if row.why
    ]
    return lines
