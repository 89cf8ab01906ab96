"""What a figure of the report is: where it stands, what it needs, and the functions that make it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
import polars as pl

from actsparse.report.looks import Looks
from actsparse.results import RunKind

_PROFILE = "actsparse profile --model {model}"
_EVALUATE = "actsparse evaluate --model {model} --plan griffin@0.5 --plan static:stat=griffin@0.5 --plan random@0.5"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A figure: `data` takes a panel of the kind it needs to its frame (empty: not measured), `draw` the frame to a
    figure, `caption` the frame to the finding. `metrics` name what was missing where there is no data. One that holds
    several panels `together` takes them all as a tuple, where there are two or more. `not_of_experts` says why layers
    that are mixtures of experts have none."""

    id: str
    section: str
    title: str
    needs: RunKind
    metrics: str
    data: Callable[[Any], pl.DataFrame]
    draw: Callable[[pl.DataFrame, Looks], go.Figure]
    caption: Callable[[pl.DataFrame], str]
    how_to_read: str
    made_by: str = ""
    wide: bool = True
    optional: bool = False
    together: bool = False
    not_of_experts: str = ""

    @property
    def command(self) -> str:
        """What makes the data, with a place for the model's name."""
        return self.made_by or (_PROFILE if self.needs is RunKind.PROFILE else _EVALUATE)
