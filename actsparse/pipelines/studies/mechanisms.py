"""M3 and M4: history-related activation uncertainty and semantic-irrelevant activation inertia (methods.md, sections 5
and 6), as the probes of a profile measure them. All definitions are ours, after MOYU and CLADA."""

from actsparse.core.bootstrap import Interval
from actsparse.core.ladder import Rung
from actsparse.pipelines.probes.gradients import gradients
from actsparse.pipelines.probes.inertia import inertia
from actsparse.pipelines.probes.names import GRADIENTS
from actsparse.pipelines.probes.popularity import measure_popularity
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.text import probe_texts
from actsparse.pipelines.probes.uncertainty import uncertainty
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, shown
from actsparse.results import ClaimVerdict, Measure, PanelKind, param

SOURCE = "after MOYU, arXiv 2406.12569; our definition"
DENSITY = 0.2
M2 = Experiment("moyu", "M2", "Root cause: gradients on active neurons, and the recursion HU4", SOURCE,
                "Active neurons are larger than the loss wants: sign(a) dL/da is positive on them")  # fmt: skip
M3 = Experiment("moyu", "M3", "History-related activation uncertainty", SOURCE,
                "The same token activates other neurons after another history")  # fmt: skip
M4 = Experiment("moyu", "M4", "Semantic-irrelevant activation inertia", SOURCE,
                "Masks hold together within a sequence even when its words mean nothing")  # fmt: skip


class Measured:
    """Rows of a probe by metric, layer and param."""

    def __init__(self, rows: list[Measure]) -> None:
        self._rows = {(row.metric, row.layer, row.param): row for row in rows}

    def at(self, metric: str, layer: int | None = None, **where: object) -> Interval:
        """One measurement with its interval; unknown where it was not taken."""
        name = param(**{key: value for key, value in where.items() if value is not None})
        found = [self._rows.get((metric + end, layer, name)) for end in ("", "_low", "_high")]
        value, low, high = (None if row is None else row.value for row in found)
        first = found[0]
        n, stderr = (0, None) if first is None else (first.n, first.stderr)
        return Interval(value=value, low=low, high=high, n=n, stderr=stderr)


def _setting(bench: Bench, names: tuple[str, ...], out: Outcome) -> Setting:
    texts = probe_texts(bench.reader_of_count, names, bench.loaded.record.vocab_size)
    out.notes += texts.warnings(names)
    reader = NeuronReader(bench.loaded, tuple(range(bench.layers)))
    popularity = measure_popularity(reader, texts.calibration, texts.sink_tokens, bench.progress)
    return Setting(reader, texts, popularity, bench.progress)


def root_cause(bench: Bench) -> Outcome:
    """M2: mean sign(a) dL/da over active neurons by layer; HU4 by layer, and against the diversity of the text."""
    out = Outcome(M2, bench.quick, settings={"density": f"{DENSITY:g}", "blocks": str(bench.count)})
    found = _measured(gradients(_setting(bench, (GRADIENTS,), out)))
    out.panel("m2", "Gradient on active neurons", PanelKind.LINE, "layer", "mean sign(a) dL/da (nats per unit)",
              layers=True, reference=0.0)  # fmt: skip
    out.panel("hu4", "HU4: how little the past says about what a token needs", PanelKind.LINE, "layer",
              "1 - rank correlation", layers=True)  # fmt: skip
    out.panel("diversity", "HU4 against the diversity of the tokens so far", PanelKind.LINE,
              "distinct / all tokens so far, lower end of the bin", "1 - rank correlation")  # fmt: skip
    for layer in range(bench.layers):
        out.add("m2", f"top {DENSITY:.0%}", found.at("m2", layer, r=DENSITY), "nats", x=layer)
        exact = found.at("m2", layer, exact="true")
        if exact.value is not None:
            out.add("m2", "exact non-zeros", exact, "nats", x=layer)
        out.add("hu4", "HU4", found.at("hu4", layer), "1", x=layer)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        point = found.at("hu4", bin=f"{low:g}")
        if point.value is not None:
            out.add("diversity", "HU4", point, "1", x=low)
    mean, hu4 = found.at("m2", r=DENSITY), found.at("hu4")
    out.conclude(
        f"sign(a) dL/da over the top {DENSITY:.0%} of the neurons is {shown(mean, decimals=6)} nats per unit, mean over"
        f" layers; HU4 is {shown(hu4)} (0: the past tells all, 1: nothing).",
        above(mean, 0.0),
        mean,
        "nats",
    )
    return out


def history_uncertainty(bench: Bench) -> Outcome:
    """M3: HU1 by layer with its controls, the share of the history, and HU2."""
    out = Outcome(M3, bench.quick, settings={"density": f"{DENSITY:g}", "contexts": "8 token types, 8 each"})
    found = _measured(uncertainty(_setting(bench, ("uncertainty",), out)))
    out.panel("layers", "The same token after two histories", PanelKind.LINE, "layer", "1 - kappa (0 same, 1 chance)",
              layers=True, reference=1.0)  # fmt: skip
    out.panel("controls", "Against the controls", PanelKind.BAR, "what differs", "1 - kappa")
    out.panel("token", "What the token id leaves open (HU2)", PanelKind.LINE, "layer", "H(mask | token) / H(mask)",
              layers=True, reference=1.0)  # fmt: skip
    for layer in range(bench.layers):
        out.add("layers", "HU1, uniform chance", found.at("hu1", layer, r=DENSITY), "1", x=layer)
        out.add("layers", "HU1, popularity", found.at("hu1", layer, r=DENSITY, pop="nat"), "1", x=layer)
        out.add("token", "HU2", found.at("hu2", layer, r=DENSITY), "1", x=layer)
    out.add("controls", "1 - kappa", found.at("hu1", r=DENSITY), "1", label="histories")
    for control in ("identical", "shuffled", "random", "none", "other-token"):
        out.add("controls", "1 - kappa", found.at("hu1", control=control, r=DENSITY), "1", label=control)
    hu1, share = found.at("hu1", r=DENSITY), found.at("history_share", r=DENSITY, pop="nat")
    out.conclude(
        f"after two histories the masks of a token differ by {shown(hu1)} (0 the same, 1 chance; our bar: 0.5); the"
        f" history makes {shown(share)} of what is specific to a mask; HU2 {shown(found.at('hu2', r=DENSITY))}.",
        above(hu1, 0.5),
        hu1,
    )
    return out


def inertia_without_meaning(bench: Bench) -> Outcome:
    """M4: overlap within and between sequences on the input ladder, the prefix curve, variance shares, and the 2x2."""
    out = Outcome(M4, bench.quick, settings={"density": f"{DENSITY:g}", "sequences": "8"})
    found = _measured(inertia(_setting(bench, ("inertia",), out)))
    out.panel("ladder", "Within a sequence less between sequences (J)", PanelKind.BAR, "input", "kappa", reference=0.0)
    out.panel("within", "Masks of one sequence, by chance level", PanelKind.BAR, "input", "kappa within", reference=0.0)
    out.panel("prefix", "A prefix's mask against later tokens", PanelKind.LINE, "tokens of the prefix", "kappa",
              log_x=True)  # fmt: skip
    out.panel("shares", "Variance of log-activations by cause", PanelKind.BAR, "cause", "share, mean over layers")
    out.panel("matrix", "The 2x2: real or random words, fed alone or in one stream", PanelKind.TABLE, "words",
              "mean kappa between sentences")  # fmt: skip
    for rung in Rung:
        for pop, name in ((None, "uniform chance"), ("nat", "popularity")):
            out.add("ladder", name, found.at("si2_j", r=DENSITY, rung=rung.value, pop=pop), "1", label=rung.value)
            kappa = "kappa_u" if pop is None else "kappa_p"
            within = found.at(kappa, pairs="within", pop=pop, r=DENSITY, rung=rung.value)
            out.add("within", name, within, "1", label=rung.value)
    for power in range(9):
        point = found.at("si1", p=2**power, r=DENSITY)
        if point.value is not None:
            out.add("prefix", "mean over layers", point, "1", x=2**power)
    for factor in ("neuron", "sequence", "token_type", "position", "residual"):
        out.add("shares", "share", found.at("si3", factor=factor), "share", label=factor)
    for text in ("real", "random"):
        for feed in ("parallel", "sequential"):
            for band in ("early", "middle", "late"):
                cell = found.at("matrix_2x2", band=band, feed=feed, r=DENSITY, text=text)
                out.add("matrix", f"{text} words", cell, "1", label=f"{feed}, {band} layers")
    _conclude_inertia(out, found)
    return out


def _conclude_inertia(out: Outcome, found: Measured) -> None:
    sir = found.at("sir", r=DENSITY)
    natural, random = (found.at("si2_j", r=DENSITY, rung=rung) for rung in ("natural", "uniform-random"))
    hot = found.at("kappa_p", pairs="within", pop="nat", r=DENSITY, rung="natural")
    told = (
        f"J is {shown(natural)} on natural and {shown(random)} on random tokens; what of the overlap within a sequence"
        f" a static hot set does not explain: {shown(hot)}"
    )
    if sir.value is None:
        out.conclude(f"no ratio, since J(natural) is not clearly above 0: {told}.", ClaimVerdict.UNDECIDED, natural)
        return
    out.conclude(
        f"SIR = J(random)/J(natural) is {shown(sir)} (1 or more: inertia needs no meaning; our bar: 0.5); {told}.",
        above(sir, 0.5),
        sir,
    )


def _measured(found: Found) -> Measured:
    return Measured(found.rows)
