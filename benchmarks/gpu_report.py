"""What a benchmark run found: one line a number, its bounds, and the table that is printed last."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One measured number; `must` and `aim` bound it from below, or from above for times."""

    name: str
    value: float
    unit: str
    must: float | None = None
    aim: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        def reached(bound: float) -> bool:
            return self.value <= bound if self.unit in ("ms", "us") else self.value >= bound

        if self.must is None or self.aim is None:
            return ""
        return "aim" if reached(self.aim) else "must" if reached(self.must) else "MISSED"


@dataclass(slots=True)
class Report:
    """What the run found, and which parts failed."""

    lines: list[Line] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    bandwidth: float = 0.0

    def add(self, name: str, value: float, unit: str, **more) -> None:
        line = Line(name=name, value=value, unit=unit, **more)
        self.lines.append(line)
        print(f"  {line.name}: {line.value:.4g} {line.unit} {line.note}", flush=True)

    def table(self) -> str:
        head = ("measured", "value", "must", "aim", "", "note")
        rows = [
            (
                line.name,
                f"{line.value:.3f} {line.unit}",
                "" if line.must is None else f"{line.must:g}",
                "" if line.aim is None else f"{line.aim:g}",
                line.verdict,
                line.note,
            )
            for line in self.lines
        ]
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (head, *rows))
