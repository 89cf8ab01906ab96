"""Where the name of each point goes in a scatter, so that names overlap neither points nor each other."""

from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER, LINE, GAP = 6.6, 15.0, 9.0
_PLACES = (
    "middle right",
    "top right",
    "bottom right",
    "middle left",
    "top left",
    "bottom left",
    "top center",
    "bottom center",
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with its label and the ends of its error bars, in pixels from the top left."""

    x: float
    y: float
    text: str
    left: float
    right: float
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: "Box") -> float:
        """The shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


def place_labels(marks: list[Mark], *, width: float, height: float, lines: Sequence["Box"] = ()) -> list[str]:
    """Plotly's `textposition` of each label in a frame of that size.

    Greedy: each point in turn takes the place that overlaps least with the frame's outside, the points, their bars,
    the lines, and the labels placed before it.
    """
    taken = [*lines, *(box for mark in marks for box in _occupied(mark))]
    positions = []
    for mark in marks:
        boxes = [_box(mark.x, mark.y, len(mark.text) * CHARACTER, place) for place in _PLACES]
        costs = [sum(box.overlap(other) for other in taken) + 4 * _outside(box, width, height) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        positions.append(_PLACES[best])
    return positions


def _occupied(mark: Mark) -> list[Box]:
    point = Box(mark.x - 6, mark.y - 6, mark.x + 6, mark.y + 6)
    return [
        point,
        Box(mark.left, mark.y - 1, mark.right, mark.y + 1),
        Box(mark.x - 1, mark.top, mark.x + 1, mark.bottom),
    ]


def _box(x: float, y: float, width: float, place: str) -> Box:
    vertical, horizontal = place.split()
    left = {"right": x + GAP, "left": x - GAP - width, "center": x - width / 2}[horizontal]
    top = {"middle": y - LINE / 2, "top": y - LINE - 4, "bottom": y + 4}[vertical]
    return Box(left, top, left + width, top + LINE)


def _outside(box: Box, width: float, height: float) -> float:
    inside = box.overlap(Box(0, 0, width, height))
    return (box.right - box.left) * (box.bottom - box.top) - inside
