"""What `actsparse profile` shows when it has finished."""

import shlex
from math import log

import polars as pl

from actsparse.cli.output import Output
from actsparse.cli.wording import number, percent
from actsparse.pipelines.profiled import too_short
from actsparse.results import SiteKind
from actsparse.store.runs import ProfileRun


def show_profile(run: ProfileRun, output: Output) -> None:
    """A profile: CETT sparsity by layer and in the mean, and where the tables are."""
    if output.json:
        output.document((run.path / "summary.json").read_text())
        return
    _show_cett(run, output)
    _show_routers(run, output)
    output.line(_counted(run.measures))
    if not run.decode_measures.is_empty():
        output.line(f"written by the model itself: {_counted(run.decode_measures)}")
    output.line(f"written to {run.path}")
    model = run.manifest.model
    mixed = model is not None and model.experts is not None
    # both need nothing but the tables: experts have no error target, and short texts no block to replay
    mixed = mixed or too_short(run) is not None
    asked = "--method static --sparsity 0.5" if mixed else "--method tda --target-error 0.2"
    output.note(f"next: actsparse threshold {shlex.quote(str(run.path))} {asked}")


def _show_cett(run: ProfileRun, output: Output) -> None:
    """One row a layer, and the means: over how many layers where some have no value, and while the model writes."""
    rows = run.measures.filter(pl.col("metric") == "cett_sparsity")
    targets = list(dict.fromkeys(rows["param"].to_list()))
    if not targets:
        return
    layers = rows["layer"].drop_nulls().unique(maintain_order=True).to_list()
    table = [[f"layer {layer}", *_by_target(rows.filter(layer=layer), targets)] for layer in layers]
    model = run.manifest.model
    depth = len(layers) if model is None else model.layers
    mean = "mean" if len(layers) == depth else f"mean of {len(layers)} of {depth} layers"
    table.append([mean, *_by_target(rows.filter(pl.col("layer").is_null()), targets)])
    decode = run.decode_measures.filter(pl.col("metric") == "cett_sparsity", pl.col("layer").is_null())
    if not decode.is_empty():
        table.append([f"{mean}, text that the model writes", *_by_target(_without_phase(decode), targets)])
    columns = ["", *(f"CETT {target.partition('=')[2]}" for target in targets)]
    output.table("Neurons that can be dropped at a given error (share of neurons)", columns, table)


def _by_target(rows: pl.DataFrame, targets: list[str]) -> list[str]:
    values = dict(rows.select("param", "value").iter_rows())
    return [percent(values.get(target)) for target in targets]


def _without_phase(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the second phase with the `param` that those of the first have."""
    return rows.with_columns(pl.col("param").str.replace("phase=decode,?", "").str.strip_chars(","))


def _counted(rows: pl.DataFrame) -> str:
    """How many tokens, and what of their activations is no number, zero, or unevenly spread."""
    tokens = rows.filter(pl.col("metric") == "tokens")["value"][0]
    lost = rows.filter(pl.col("metric") == "not_finite", pl.col("kind") == SiteKind.NEURON)
    said = f"{tokens:,.0f} tokens; exact zeros {percent(_mean(rows, 'zero_frac'))} of neuron activations"
    if not lost.is_empty():
        said += f" that are numbers ({lost['value'].sum():,.0f} are NaN or infinite)"
    return f"{said}; firing Gini {number(_mean(rows, 'neuron_gini'), 2)}"


def _mean(rows: pl.DataFrame, metric: str) -> float | None:
    """The mean over layers of a measure of neurons; None where none has it."""
    mean = rows.filter(pl.col("metric") == metric, pl.col("kind") == SiteKind.NEURON)["value"].mean()
    return float(mean) if isinstance(mean, float) else None


def _show_routers(run: ProfileRun, output: Output) -> None:
    """Of a mixture of experts: how spread its routers are, layer by layer."""
    model = run.manifest.model
    entropy = run.measures.filter(pl.col("metric") == "router_entropy")
    if model is None or model.experts is None or entropy.is_empty():
        return
    shares = run.measures.filter(pl.col("metric") == "expert_frac")
    rows = []
    for layer, nats in entropy.select("layer", "value").iter_rows():
        found = shares.filter(pl.col("layer") == layer)["value"].to_list()
        rows.append([f"layer {layer}", f"{nats:.2f}", percent(max(found)), percent(min(found))])
    count, top_k = model.experts.count, model.experts.top_k
    title = f"Routers: {top_k} of {count} experts a token; entropy at most {log(count):.2f} nats"
    output.table(title, ("", "entropy, nats", "most used expert", "least used expert"), rows)
