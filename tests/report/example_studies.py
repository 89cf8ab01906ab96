"""A study run with the experiments that the report must draw: lines, bars, tables, gaps, every verdict."""

import json
from collections.abc import Callable
from pathlib import Path

import example_runs as example

from actsparse.results import ClaimVerdict, ModelRecord, PanelKind, RunKind, StudyExperiment, StudyPanel, StudyRow
from actsparse.store import tables
from actsparse.store.codec import pretty

DONORS = {
    "own": 4.48, "near": 4.41, "far": 4.82, "random prompt": 6.59, "static": 4.29, "random": 9.9,
    "own continuation (leak)": 3.83, "oracle per token": 3.15,
}  # fmt: skip
COSTS = {"auto": 1.0, "teal": 1.6, "cats": 2.0, "griffin": 9.0, "static:stat=griffin": 7.0}
POLICIES = {"compute_all": 0.0, "drop": 0.004, "zero": 0.005, "lazy": 0.0002, "copy_prev": 0.002}
TRINITY = {"TDA": (0.71, 1.24, 24), "RODA": (0.55, 1.05, 12), "RIDA": (0.62, None, 12), "sRIDA": (0.66, 1.18, 12)}


def panel(name: str, kind: PanelKind, x: str, y: str, **flags: object) -> StudyPanel:
    return StudyPanel(name=name, title=name.capitalize(), kind=kind, x_title=x, y_title=y, **flags)  # pyright: ignore


def row(experiment: str, of: StudyPanel, series: str, value: float | None, *, study: str, half: float | None = None,
        x: float | None = None, label: str = "", unit: str = "1", n: int = 1024) -> StudyRow:  # fmt: skip
    known = value is not None and half is not None
    return StudyRow(
        study=study, experiment=experiment, panel=of.name, series=series, x=x, label=label, value=value, unit=unit, n=n,
        low=value - half if known else None, high=value + half if known else None,
    )  # fmt: skip


def donors() -> tuple[StudyExperiment, list[StudyRow]]:
    of = panel("NLL by donor", PanelKind.BAR, "mask from", "mean NLL (nats)", reference=3.11)
    rows = [
        row("M5", of, "griffin", nll, study="moyu", half=0.06, label=donor, unit="nats")
        for donor, nll in DONORS.items()
    ]
    return experiment("moyu", "M5", "Donor swap", ClaimVerdict.FAILS, (of,), quick=True), rows


def policies() -> tuple[StudyExperiment, list[StudyRow]]:
    of = panel("Perplexity over length", PanelKind.LINE, "generated tokens", "perplexity", log_y=True, reference=22.5)
    rows = [
        row("P3", of, policy, 23.0 * (1 + slope * tokens), study="pitfalls", half=0.8, x=tokens)
        for policy, slope in POLICIES.items()
        for tokens in (8, 32, 64, 128)
    ]
    rows.append(row("P3", of, "zero", None, study="pitfalls", x=256))
    return experiment("pitfalls", "P3", "KV policies", ClaimVerdict.HOLDS, (of,)), rows


def routers() -> tuple[StudyExperiment, list[StudyRow]]:
    of = panel("recall by layer", PanelKind.LINE, "layer", "corrected recall", layers=True, reference=0.0)
    rows = [
        row("P4", of, router, start - 0.01 * layer, study="pitfalls", half=0.02, x=layer)
        for router, start in (("sequential", 0.62), ("parallel", 0.55), ("lookahead", 0.48), ("static", 0.31))
        for layer in range(8)
    ]
    return experiment("pitfalls", "P4", "Router recall", ClaimVerdict.UNDECIDED, (of,)), rows


def trinity() -> tuple[StudyExperiment, list[StudyRow]]:
    of = panel("Trinity", PanelKind.TABLE, "kind", "quality kept is dense over sparse perplexity")
    rows = []
    for kind, (quality, speed, families) in TRINITY.items():
        rows.append(row("M1", of, kind, quality, study="moyu", half=0.03, label="quality kept", unit="share"))
        rows.append(row("M1", of, kind, speed, study="moyu", half=0.02, label="speed-up", unit="x"))
        rows.append(row("M1", of, kind, float(families), study="moyu", label="families", unit="families"))
    return experiment("moyu", "M1", "The trinity", ClaimVerdict.HOLDS, (of,)), rows


def frontier() -> tuple[StudyExperiment, list[StudyRow]]:
    ppl = panel("Perplexity at equal bytes", PanelKind.LINE, "model bytes not read (share)", "perplexity", log_y=True)
    alone = panel("One layer at a time", PanelKind.LINE, "layer", "NLL added (nats)", layers=True)
    rows = [
        row("S1", ppl, method, 22.5 * (1 + cost * share), study="frontier", half=0.5, x=share)
        for method, cost in (
            ("auto", 1.0),
            ("teal", 1.6),
            ("cats", 2.0),
            ("griffin", 9.0),
            ("static:stat=griffin", 7.0),
        )
        for share in (0.1, 0.2, 0.3, 0.4)
    ]
    rows += [
        row("S1", alone, "griffin@0.5", 0.02 + 0.01 * (layer == 0), study="frontier", half=0.004, x=layer)
        for layer in range(8)
    ]
    return experiment("frontier", "S1", "Frontier at equal bytes", ClaimVerdict.HOLDS, (ppl, alone)), rows


def experiment(
    study: str, name: str, title: str, verdict: ClaimVerdict, panels: tuple[StudyPanel, ...], *, quick: bool = False
) -> StudyExperiment:
    return StudyExperiment(
        study=study, experiment=name, title=title, source="arXiv 2406.12569",
        claim=f"{title} behave as the paper says.", verdict=verdict, value=0.42, low=0.36, high=0.48, unit="1",
        conclusion=f"{title}: 0.42 (0.36 to 0.48), so the claim {verdict.value}.",
        quick=quick, panels=panels, settings={"blocks": "4"}, notes=("One model of 135 M.",),
    )  # fmt: skip


ALL: tuple[Callable[[], tuple[StudyExperiment, list[StudyRow]]], ...] = (policies, routers, trinity, donors, frontier)


def study_run(
    path: Path,
    *,
    model: ModelRecord = example.SMOLLM2,
    made: tuple[tuple[StudyExperiment, list[StudyRow]], ...] | None = None,
    finish: bool = True,
) -> Path:
    """A study run of all example experiments, or of those in `made`."""
    found = made if made is not None else tuple(make() for make in ALL)

    def fill(_: object) -> None:
        tables.write(path / "studies.parquet", tables.frame([one for _, rows in found for one in rows], StudyRow))
        (path / "studies.json").write_text(json.dumps([json.loads(pretty(of)) for of, _ in found]))

    return example.write_run(path, RunKind.STUDY, fill, model=model, texts=(example.CORPUS,), finish=finish)
