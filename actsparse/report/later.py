"""What these runs did not measure, and the command that measures it: one row each.

A row disappears from the report's list as soon as a run holds one of its metrics. To draw it, add a file in `figures/`
and a row in `registry.py`.
"""

from dataclasses import dataclass

from actsparse.report.panels import EvalPanel, ProfilePanel


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurable:
    """Something a run can hold: what it shows, the metrics that prove it is there, and what makes it."""

    what: str
    shows: str
    metrics: tuple[str, ...]
    command: str


PROFILE, EVALUATE = "actsparse profile --model {model}", "actsparse evaluate --model {model}"

ROWS = (
    Measurable(
        what="overlap against distance",
        shows="how alike the masks of tokens are, with both chance levels",
        metrics=("overlap_w", "overlap_b", "overlap_neighbour"),
        command=f"{PROFILE} --probes inertia",
    ),
    Measurable(
        what="input ladder and SI2",
        shows="whether overlap needs meaning: natural to random input",
        metrics=("si2_j", "sir", "e_pop"),
        command=f"{PROFILE} --probes inertia",
    ),
    Measurable(
        what="SI1 prefix curves",
        shows="how soon the prompt's mask settles",
        metrics=("si1",),
        command=f"{PROFILE} --probes inertia",
    ),
    Measurable(
        what="SI3 variance shares",
        shows="neuron, sequence, token and position shares of the variance",
        metrics=("si3",),
        command=f"{PROFILE} --probes inertia",
    ),
    Measurable(
        what="the 2x2 matrices",
        shows="real sentences or random words, parallel or sequential",
        metrics=("matrix_2x2",),
        command=f"{PROFILE} --probes inertia",
    ),
    Measurable(
        what="HU1 with controls, HU2 by layer",
        shows="how much history decides beside the token",
        metrics=("hu1", "hu2"),
        command=f"{PROFILE} --probes uncertainty",
    ),
    Measurable(
        what="batch union",
        shows="neurons active in any of B sequences",
        metrics=("union",),
        command=f"{PROFILE} --probes union",
    ),
)


def unmeasured(profiles: tuple[ProfilePanel, ...], evals: tuple[EvalPanel, ...], model: str) -> tuple[Measurable, ...]:
    """The rows of which no run holds a metric, with the model's name in the command."""
    present = {metric for panel in profiles for metric in panel.measures["metric"].unique()}
    present |= {metric for panel in evals for metric in panel.results["metric"].unique()}
    return tuple(
        Measurable(what=row.what, shows=row.shows, metrics=row.metrics, command=row.command.format(model=model))
        for row in ROWS
        if not present & set(row.metrics)
    )
