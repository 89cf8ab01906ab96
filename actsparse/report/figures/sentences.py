"""The 2x2: kappas between the masks of sentences, {real, random words} x {each alone, all in one stream}."""

import numpy as np
import plotly.graph_objects as go
import polars as pl

from actsparse.report.figures.canvas import canvas, colour_bar, floats, set_variants, shares_scale
from actsparse.report.figures.columns import as_float, measured
from actsparse.report.looks import Looks
from actsparse.report.panels import ProfilePanel
from actsparse.report.wording import between, number

BANDS = ("early", "middle", "late")
ARMS = (("real", "parallel"), ("real", "sequential"), ("random", "parallel"), ("random", "sequential"))
TITLES = {"real": "real sentences", "random": "random words", "parallel": "each alone", "sequential": "in one stream"}
DENSITY = "0.2"
UNIFORM, POPULARITY = "uniform chance", "popularity"
CHANCES = ((UNIFORM, None), (POPULARITY, "nat"))


def matrices(panel: ProfilePanel) -> pl.DataFrame:
    """`chance, text, feed, band, one, other, kappa, n, mean, low, high`: each pair of sentences, the arm's mean, above
    both chance levels."""
    means = measured(panel.measures, "matrix_2x2", numbers=("r",), texts=("text", "feed", "band", "pop"))
    return pl.concat([_above(panel, means, chance, pop) for chance, pop in CHANCES])


def _above(panel: ProfilePanel, means: pl.DataFrame, chance: str, pop: str | None) -> pl.DataFrame:
    level = pl.col("pop").is_null() if pop is None else pl.col("pop") == pop
    means = means.filter((pl.col("r") == float(DENSITY)) & level & pl.col("layer").is_null())
    means = means.select("text", "feed", "band", "low", "high", mean="value").drop_nulls("band")
    rows = [row for text, feed in ARMS for row in _arm(panel, text, feed, pop)]
    schema = dict.fromkeys(("text", "feed", "band"), pl.String) | {"one": pl.Int64, "other": pl.Int64}
    frame = pl.DataFrame(rows, schema=schema | {"kappa": pl.Float64, "n": pl.Int64}, orient="row")
    frame = frame.join(means, on=["text", "feed", "band"], how="left", maintain_order="left")
    return frame.select(pl.lit(chance).alias("chance"), pl.all())


def _arm(panel: ProfilePanel, text: str, feed: str, pop: str | None) -> list[tuple[object, ...]]:
    found = panel.probes.get(f"matrix_2x2.{text}.{feed}.r{DENSITY}" + ("" if pop is None else f".{pop}"))
    if found is None or found.ndim != 3:
        return []
    return [
        (text, feed, band, one, other, _finite(matrix[one, other]), matrix.shape[0])
        for band, matrix in zip(BANDS, np.asarray(found, dtype=np.float64), strict=False)
        for one in range(matrix.shape[0])
        for other in range(matrix.shape[1])
        if one != other
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def draw(frame: pl.DataFrame, looks: Looks) -> go.Figure:
    """Four matrices on one colour scale; the menu changes the band of layers and the chance level."""
    count = int(as_float(frame["one"].max())) + 1
    top = max(0.1, min(1.0, as_float(frame["kappa"].quantile(0.98))))
    figure = canvas(x="sentence", y="sentence", height=620)
    bands = [
        (chance, band)
        for chance, _ in CHANCES
        for band in ("middle", "early", "late")
        if frame.filter((pl.col("chance") == chance) & (pl.col("band") == band)).height
    ]
    arms = [arm for arm in ARMS if frame.filter((pl.col("text") == arm[0]) & (pl.col("feed") == arm[1])).height]
    values: dict[tuple[str, str], list[list[list[float | None]]]] = {band: [] for band in bands}
    for place, (text, feed) in enumerate(arms):
        grids = {band: _grid(frame.filter(pl.col("chance") == band[0]), text, feed, band[1], count) for band in bands}
        for band, grid in grids.items():
            values[band].append([[_finite(value) for value in row] for row in grid])
        number_ = "" if place == 0 else str(place + 1)
        figure.add_heatmap(
            z=grids[bands[0]],
            x=list(range(1, count + 1)),
            y=list(range(1, count + 1)),
            zmin=0,
            zmax=top,
            colorscale=shares_scale(),
            showscale=place == 0,
            colorbar=colour_bar("kappa (0: chance, 1: same mask)", tickformat=".2f") if place == 0 else None,
            xaxis=f"x{number_}",
            yaxis=f"y{number_}",
            hovertemplate=f"sentences %{{x}} and %{{y}}: kappa %{{z:.3f}}<extra>{TITLES[text]}, {TITLES[feed]}</extra>",
        )
        _place(figure, number_, column=place % 2, row=place // 2, title=f"{TITLES[text]}, {TITLES[feed]}")
    if len(bands) > 1:
        choices = [
            {"label": f"{band} layers, above {chance}", "axis": "z", "title": "", "values": values[chance, band]}
            for chance, band in bands
        ]
        set_variants(figure, name="shown", variants=choices)
    return figure


def _grid(frame: pl.DataFrame, text: str, feed: str, band: str, count: int) -> np.ndarray:
    rows = frame.filter((pl.col("text") == text) & (pl.col("feed") == feed) & (pl.col("band") == band))
    grid = np.full((count, count), np.nan)
    for one, other, kappa in rows.select("one", "other", "kappa").iter_rows():
        grid[one, other] = np.nan if kappa is None else kappa
    return np.stack([floats(row) for row in grid])


def _place(figure: go.Figure, number_: str, *, column: int, row: int, title: str) -> None:
    left, low = (0.0, 0.56)[column], (0.56, 0.0)[row]
    axis = {"domain": [left, left + 0.42], "anchor": f"y{number_}", "showgrid": False, "title": {"text": "sentence"}}
    # beside and under another matrix a title would only stand in its way
    upright = {"text": "sentence" if column == 0 else ""}
    figure.update_layout(
        {
            f"xaxis{number_}": {**axis, "dtick": 2, "tick0": 1},
            f"yaxis{number_}": {
                "domain": [low, low + 0.38],
                "anchor": f"x{number_}",
                "showgrid": False,
                "autorange": "reversed",
                "title": upright,
                "dtick": 2,
                "tick0": 1,
            },
        }
    )
    figure.add_annotation(
        text=title, x=left + 0.21, y=low + 0.40, xref="paper", yref="paper", showarrow=False, xanchor="center",
        yanchor="bottom",
        font={"size": 12.5},
    )  # fmt: skip


def caption(frame: pl.DataFrame) -> str:
    """What feeding in one stream adds for real sentences and for random words, in the middle layers."""
    band = "middle" if "middle" in set(frame["band"]) else str(frame["band"][0])
    popular = frame.filter((pl.col("chance") == POPULARITY) & (pl.col("band") == band))["kappa"].mean()
    frame = frame.filter(pl.col("chance") == UNIFORM)
    static = f" Above popularity they are {number(popular, 2)} on average." if isinstance(popular, float) else ""
    rows = (
        frame.filter(pl.col("band") == band)
        .group_by("text", "feed", maintain_order=True)
        .agg(pl.col("mean", "low", "high").first(), seen=pl.col("kappa").mean(), n=pl.col("n").first())
    )
    arms = {(row["text"], row["feed"]): row for row in rows.iter_rows(named=True)}
    said = []
    for text in ("real", "random"):
        alone, stream = (arms.get((text, feed)) for feed in ("parallel", "sequential"))
        if alone and stream:
            said.append(f"{TITLES[text]} {_shown(alone)} alone and {_shown(stream)} in one stream")
    verdict = _verdict(arms)
    return (
        f"Kappa between sentences, {band} layers: {'; '.join(said)}{verdict}.{static}"
        f" n = {frame['n'].max()} sentences an arm."
    )


def _shown(row: dict[str, float | None]) -> str:
    value = row["mean"] if row["mean"] is not None else row["seen"]
    span = between(row["low"], row["high"])
    return number(value, 2) + (f" ({span})" if span else "")


def _verdict(arms: dict[tuple[str, str], dict[str, float | None]]) -> str:
    """Whether the stream makes the masks of random words more alike, by the intervals of the two arms."""
    alone, stream = arms.get(("random", "parallel")), arms.get(("random", "sequential"))
    if alone is None or stream is None or alone["high"] is None or stream["low"] is None:
        return ""
    if stream["low"] > alone["high"]:
        return ". One stream makes even the masks of random words more alike: inertia"
    return ". One stream does not make the masks of random words more alike: no sign of inertia"
