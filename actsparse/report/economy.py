"""What a page leaves out when its runs are too many or too large for one file, from nothing to most.

Lines lose points evenly, maps rows and columns, tables of numbers rows; then samples and the figures of later runs go.
Sentences, verdicts, tables of plans of the first runs, warnings and provenance stay.
"""

import base64
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actsparse.report.notices import Notice
from actsparse.report.samples import Sample
from actsparse.report.view import ReportView, SampleView, SectionView, StudyView
from actsparse.report.wording import count

ALL = sys.maxsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Economy:
    """At most so many rows of numbers a figure, points a line, places a side of a map, samples an evaluation,
    characters a prompt, and runs of each kind with figures and tables."""

    rows: int = ALL
    points: int = ALL
    side: int = ALL
    samples: int = ALL
    characters: int = ALL
    panels: int = ALL

    def thinned(self, data: list[Any], layout: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Plotly's traces and layout with the points that are kept; the choices of a menu lose the same ones."""
        if self.points == ALL:
            return data, layout
        kept = [_kept(trace, self) for trace in data]
        thin = [trace if lengths is None else _pick(trace, lengths) for trace, lengths in zip(data, kept, strict=True)]
        meta = layout.get("meta") or {}
        if "variants" not in meta:
            return thin, layout
        choices = [
            {name: _by_trace(value, kept) if name in ("values", "errors") else value for name, value in choice.items()}
            for choice in meta["variants"]["choices"]
        ]
        return thin, {**layout, "meta": {**meta, "variants": {**meta["variants"], "choices": choices}}}

    def reduced(self, view: ReportView) -> ReportView:
        """The view with the samples, figures and tables that are kept, and the notice that says so."""
        if self.points == ALL:
            return view
        return replace(
            view,
            notices=(*view.notices, Notice(letter="", text=self.said)),
            plan_grids=view.plan_grids[: self.panels],
            worst=view.worst[: self.panels],
            sections=tuple(self._section(section) for section in view.sections),
            samples=tuple(self._sampled(group) for group in view.samples[: self.panels]),
            studies=tuple(self._study(study, place) for place, study in enumerate(view.studies)),
        )

    @property
    def said(self) -> str:
        """What was left out, and where all of it is."""
        text = (
            f"These runs hold more than one page should: figures keep at most {count(self.points)} points a line and "
            f"{count(self.rows)} rows of numbers, evaluations at most {self.samples} samples"
        )
        if self.panels < ALL:
            text += f", and only the first {self.panels} runs of each kind have figures and tables"
        return f"{text}. Everything: report on fewer runs, or add --figures DIR."

    def _section(self, section: SectionView) -> SectionView:
        return replace(section, figures=tuple(row[: self.panels] for row in section.figures))

    def _sampled(self, group: SampleView) -> SampleView:
        return replace(group, samples=tuple(self._clipped(sample) for sample in group.samples[: self.samples]))

    def _clipped(self, sample: Sample) -> Sample:
        if len(sample.prompt) <= self.characters:
            return sample
        return replace(sample, prompt=f"… {sample.prompt[-self.characters :]}")

    def _study(self, study: StudyView, place: int) -> StudyView:
        if place < self.panels:
            return study
        return replace(study, experiments=tuple(replace(one, panels=()) for one in study.experiments))


ECONOMIES = (
    Economy(),
    Economy(rows=2000, points=400, side=128, samples=6, characters=4000),
    Economy(rows=400, points=120, side=64, samples=3, characters=1500, panels=12),
    Economy(rows=150, points=60, side=40, samples=2, characters=600, panels=5),
    Economy(rows=60, points=40, side=24, samples=1, characters=300, panels=2),
)

Places = np.ndarray


def places(length: int, most: int) -> Places:
    """At most `most` places of `length`, evenly, first and last included."""
    return np.arange(length) if length <= most else np.unique(np.linspace(0, length - 1, most).round().astype(int))


def _kept(trace: dict[str, Any], economy: Economy) -> dict[int, Places] | None:
    """The places to keep of an axis of each length; None where the trace is small enough."""
    if trace.get("type") == "heatmap":
        shape = np.shape(array_of(trace.get("z", [])))
        found = {length: places(length, economy.side) for length in shape if length > economy.side}
        return found or None
    length = max(len(array_of(trace[axis])) if axis in trace else 0 for axis in ("x", "y"))
    return {length: places(length, economy.points)} if length > economy.points and "fill" not in trace else None


def _pick(value: Any, kept: dict[int, Places]) -> Any:
    """Every array at any depth with the kept places of each of its axes that has a known length."""
    if isinstance(value, dict) and "bdata" in value:
        return _encoded(_pick_array(array_of(value), kept))
    if isinstance(value, dict):
        return {key: _pick(part, kept) for key, part in value.items()}
    if isinstance(value, list):
        rows = [value[place] for place in kept[len(value)]] if len(value) in kept else value
        return [_pick(row, kept) if isinstance(row, (list, dict)) else row for row in rows]
    return value


def _pick_array(array: np.ndarray, kept: dict[int, Places]) -> np.ndarray:
    for axis, length in enumerate(array.shape):
        if length in kept:
            array = array.take(kept[length], axis=axis)
    return array


def _by_trace(parts: list[Any], kept: list[dict[int, Places] | None]) -> list[Any]:
    return [
        part if lengths is None or part is None else _pick(part, lengths)
        for part, lengths in zip(parts, kept, strict=False)
    ]


def array_of(value: Any) -> np.ndarray:
    """A list, or plotly's typed array, as an array."""
    if not (isinstance(value, dict) and "bdata" in value):
        return np.asarray(value, dtype=object)
    found = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
    shape = value.get("shape")
    return found.reshape([int(length) for length in shape.split(",")]) if shape else found


def _encoded(array: np.ndarray) -> dict[str, Any]:
    """An array as plotly's typed array."""
    kind = f"{array.dtype.kind}{array.dtype.itemsize}"
    found: dict[str, Any] = {"dtype": kind, "bdata": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()}
    return found | ({"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {})
