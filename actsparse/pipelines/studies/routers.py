"""P4 and HU3: how well trained routers know beforehand which neurons a token will use (Pitfalls, arXiv 2405.09274;
MOYU, arXiv 2406.12569). The numerics are `pipelines/router_study.py`."""

from actsparse.core.bootstrap import Interval
from actsparse.data.prompts import sample_prompts
from actsparse.data.sequences import Sequences
from actsparse.methods.gates import LayerGates, TokenGate
from actsparse.methods.plan import Plan
from actsparse.methods.trained_method import TrainedMethod
from actsparse.pipelines.router_study import (
    INPUTS,
    ORACLE,
    PREVIOUS,
    STATIC,
    fit_plans,
    fit_series,
    predictability_gap,
    score_series,
    still_rising,
)
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, below, shown
from actsparse.pipelines.studies.pitfalls import PAPER
from actsparse.pipelines.studies.scores import difference, perplexity
from actsparse.results import ClaimVerdict, PanelKind

P4 = Experiment("pitfalls", "P4", "Routers that read the MLP's input, the block's, or the previous block's", PAPER,
                "Which neurons are active is hard to predict")  # fmt: skip
HU3 = Experiment("moyu", "HU3", "Predictability gap of a router on another domain",
                 "after MOYU, arXiv 2406.12569; our definition",
                 "History makes activation uncertain: a router fails on text unlike its training text")  # fmt: skip
DENSITY = 0.5
HARD = 0.5
"""Corrected recall under which we call neurons hard to predict: half of the way from chance to the oracle."""
OTHER_DOMAIN = "code.jsonl"
QUICK_LAYERS = 4


def routed_layers(bench: Bench) -> range:
    """The layers that routers are trained for: in a quick run the first four."""
    return range(min(QUICK_LAYERS, bench.layers) if bench.quick else bench.layers)


def options(bench: Bench) -> str:
    """How routers are trained: a little, in four layers, in a quick run. One epoch is some fifty steps, at which the
    usual rate of 1e-4 teaches next to nothing."""
    return f"epochs=1,tokens=4096,rate=0.003,layers=0-{len(routed_layers(bench)) - 1}" if bench.quick else ""


def router_inputs(bench: Bench) -> Outcome:
    """P4: recall and regret by layer of three routers, of the static mask and of the previous token's."""
    out = Outcome(P4, bench.quick, settings={"density": f"{DENSITY:g}", "training": options(bench) or "full",
                                             "blocks": str(bench.count)})  # fmt: skip
    plans = fit_plans(bench.loaded, bench.trainer, DENSITY, options=options(bench))
    series = {name: plan.gates() for name, plan in plans.items()}
    routed = [layer for layer, gates in enumerate(series["sequential"]) if _has_router(gates)]
    scored = score_series(bench.loaded, series, bench.scored_sequences, DENSITY, bench.prompt_length, bench.progress)
    found = {name: scores.within(routed) for name, scores in scored.items()}
    out.panel("recall", "Recall by layer, corrected for chance", PanelKind.LINE, "layer", "corrected recall",
              layers=True, reference=0.0)  # fmt: skip
    out.panel("means", "Recall and regret, mean over the layers with routers", PanelKind.TABLE, "predictor", "value")
    out.panel("regret", "Error above the oracle's, by layer", PanelKind.LINE, "layer", "relative error - oracle's",
              layers=True, reference=0.0)  # fmt: skip
    for name, scores in found.items():
        recalls, regrets = scores.corrected_recalls(), scores.regrets()
        for layer in range(bench.layers):
            if recalls.layers[layer].value is not None and name != ORACLE:
                out.add("recall", name, recalls.layers[layer], "1", x=layer)
                out.add("regret", name, regrets.layers[layer], "1", x=layer)
        out.add("means", name, scores.recalls().mean, "share", label="recall")
        out.add("means", name, recalls.mean, "1", label="corrected recall")
        out.add("means", name, regrets.mean, "1", label="regret")
    _add_quality(out, bench, {name: series[name] for name in (*INPUTS, STATIC)})
    means = {name: found[name].corrected_recalls().mean for name in (*INPUTS, STATIC, PREVIOUS)}
    told = ", ".join(f"{name} {mean.value or 0.0:.2f}" for name, mean in means.items())
    rising = still_rising(plans["sequential"])
    out.conclude(
        f"at density {DENSITY:g} the sequential router's corrected recall is {shown(means['sequential'])} (0 chance, 1"
        f" oracle; our bar for hard: {HARD:g}); {told}. {_training(plans['sequential'], len(rising), len(routed))}",
        hard_to_predict(means["sequential"], trained=not rising and not bench.quick),
        means["sequential"],
    )
    return out


def hard_to_predict(recall: Interval, *, trained: bool) -> ClaimVerdict:
    """The verdict on P4: a recall under the bar says that neurons are hard to predict only where training was done."""
    found = below(recall, HARD)
    return ClaimVerdict.UNDECIDED if found is ClaimVerdict.HOLDS and not trained else found


def _training(plan: Plan, rising: int, routed: int) -> str:
    """How long the routers learned, and whether they were done."""
    method = plan.method
    assert isinstance(method, TrainedMethod)
    epochs = "one epoch" if method.epochs == 1 else f"at most {method.epochs} epochs"
    text = f"Routers learned for {epochs} from at most {method.tokens:,} tokens"
    if not rising:
        return f"{text}, until their held-out recall rose no more."
    return f"{text}; held-out recall was still rising in {rising} of {routed} layers, so it could be higher."


def _add_quality(out: Outcome, bench: Bench, series: dict[str, list[LayerGates]]) -> None:
    """Perplexity with each router at work in the layers that have one, the others dense."""
    out.panel("ppl", "Perplexity with each predictor at work", PanelKind.BAR, "predictor", "perplexity",
              reference=perplexity(bench.score("dense")).value)  # fmt: skip
    dense = bench.score("dense")
    for name, gates in series.items():
        routed = [_has_router(one) for one in series["sequential"]]
        chosen = [gate if at_work else bench.whole for gate, at_work in zip(gates, routed, strict=True)]
        scored = bench.score_gates(f"router:{name}:{options(bench)}@{DENSITY:g}", lambda _block, c=chosen: c)
        out.add("ppl", "perplexity", perplexity(scored, bench.seed), "1", label=name, n=scored.tokens)
        out.add("ppl", "NLL - dense", difference(scored, dense, bench.seed), "nats", label=name, n=scored.tokens)


def _has_router(gates: LayerGates) -> bool:
    return isinstance(gates.neurons, TokenGate)


def domain_gap(bench: Bench) -> Outcome:
    """HU3: recall of the sequential router on held-out text, on another domain, and on shuffled histories."""
    out = Outcome(HU3, bench.quick, settings={"density": f"{DENSITY:g}", "training": options(bench) or "full",
                                              "other domain": f"sample prompts, {OTHER_DOMAIN}"})  # fmt: skip
    router = fit_series(bench.loaded, bench.trainer, DENSITY, options=options(bench), inputs=("sequential",))[
        "sequential"
    ]
    gap = predictability_gap(
        bench.loaded, router, bench.scored_sequences, other_domain(bench), DENSITY, bench.prompt_length,
        bench.progress, seed=bench.seed,
    )  # fmt: skip
    out.panel("recall", "Recall of the sequential router", PanelKind.BAR, "text", "corrected recall", reference=0.0)
    texts: dict[str, Interval] = {"same domain": gap.same, "other domain": gap.other, "shuffled history": gap.shuffled}
    for label, found in texts.items():
        out.add("recall", "corrected recall", found, "1", label=label)
    out.conclude(
        f"corrected recall falls from {shown(gap.same)} on held-out text to {shown(gap.other)} on code (HU3"
        f" {shown(gap.hu3)}), and to {shown(gap.shuffled)} with shuffled histories.",
        above(gap.hu3, 0.0),
        gap.hu3,
    )
    return out


def other_domain(bench: Bench) -> Sequences:
    """Blocks of code, joined from the sample prompts."""
    return bench.joined(str(sample_prompts() / OTHER_DOMAIN))
