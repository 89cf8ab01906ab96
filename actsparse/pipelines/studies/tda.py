"""T1, T3-T6: threshold-based dynamic activation (*First Activations Matter*, arXiv 2408.11393) put to the test.

The bars that decide a verdict are ours, and stand in its sentence.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.bootstrap import Interval, bootstrap_mean, interval, resample_weights
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.methods.plan import Plan
from actsparse.methods.short import DENSE
from actsparse.methods.tda import over, threshold_for_share
from actsparse.pipelines.prompt_lengths import LENGTHS, kept_by_prompt_length
from actsparse.pipelines.studies.bench import Bench, GatesOfBlock, fixed_gates
from actsparse.pipelines.studies.outcome import Experiment, Outcome, below, percent, points, shown
from actsparse.pipelines.studies.scores import Scored, difference, drop_mean, perplexity, token_mean
from actsparse.results import PanelKind

SHARE = 0.5
PAPER = "TDA, arXiv 2408.11393"
CLOSE = 0.03
"""A share kept within three points of what was asked for is close."""
LITTLE = 0.05
"""An NLL difference (nats) that we call little: 5 % of perplexity."""

T1 = Experiment("tda", "T1", "TDA against dense, GRIFFIN, static and random pruning", PAPER,
                "TDA does not significantly compromise quality")  # fmt: skip
T3 = Experiment("tda", "T3", "Threshold against top-k, global against layer-wise", PAPER,
                "A threshold chooses better than a fixed count at the same mean density")  # fmt: skip
T4 = Experiment("tda", "T4", "A mask from the first tokens of the prompt", PAPER,
                "The first activations decide: a few prompt tokens choose the mask as well as all")  # fmt: skip
T5 = Experiment("tda", "T5", "Staleness of the mask along the generation", PAPER,
                "One mask, chosen at the end of the prompt, serves the whole generation")  # fmt: skip
T6 = Experiment("tda", "T6", "A threshold fitted offline, at other prompt lengths", PAPER,
                "A threshold found offline keeps the same share of neurons whatever the prompt's length")  # fmt: skip


def compare(bench: Bench) -> Outcome:
    """T1: quality of TDA beside dense, GRIFFIN, static and random pruning, at one share."""
    out = Outcome(T1, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count)})
    names = [DENSE, *(f"{m}@{SHARE:g}" for m in ("tda", "griffin", "static:stat=griffin", "static", "random"))]
    scored = {name: bench.score(name) for name in names}
    quality_table(out, "quality", scored, bench.seed)
    tda = scored[f"tda@{SHARE:g}"]
    lost = difference(tda, scored[DENSE], bench.seed)
    control = scored[f"static:stat=griffin@{SHARE:g}"]
    static = difference(tda, control, bench.seed)
    out.conclude(
        f"dropping {percent(drop_mean(tda, bench.seed))} of the neurons, TDA loses {shown(lost)} nats against dense"
        f" (our bar: {LITTLE:g}), and stands at {shown(static)} nats against one static mask,"
        f" which drops {percent(drop_mean(control, bench.seed))}.",
        below(lost, LITTLE),
        lost,
        "nats",
    )
    return out


def quality_table(out: Outcome, panel: str, scored: dict[str, Scored], seed: int) -> None:
    """A table of plans: perplexity, KL, top-1 agreement, share dropped, and the paired difference to dense."""
    out.panel(panel, "Quality in the decode regime", PanelKind.TABLE, "plan", "value")
    for name, one in scored.items():
        columns = {
            "perplexity": (perplexity(one, seed), "1"),
            "KL": (token_mean(one.kl, seed), "nats"),
            "top-1": (token_mean(one.top1, seed), "share"),
            "dropped": (drop_mean(one, seed), "share"),
            "NLL - dense": (difference(one, scored[DENSE], seed), "nats"),
        }
        for label, (found, unit) in columns.items():
            out.add(panel, name, found, unit, label=label, n=one.tokens)


def threshold_or_count(bench: Bench) -> Outcome:
    """T3: thresholds (layer by layer, or one for all layers) and top-k at the densities that they realise."""
    out = Outcome(T3, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count)})
    layered = bench.score(f"tda@{SHARE:g}")
    whole = bench.score_gates(f"tda-global@{SHARE:g}", _global_gates(bench))
    counts = {
        "top-k, layer-wise": bench.score(f"griffin@{float(1 - layered.kept.mean()):.4f}"),
        "top-k at the global threshold's density": bench.score(f"griffin@{float(1 - whole.kept.mean()):.4f}"),
    }
    scored = {"threshold, layer-wise": layered, "threshold, global": whole, **counts}
    out.panel("ppl", "Perplexity at equal mean density", PanelKind.BAR, "rule", "perplexity",
              reference=perplexity(bench.score(DENSE)).value)  # fmt: skip
    out.panel("density", "Neurons kept in each layer", PanelKind.LINE, "layer", "share kept", layers=True)
    for name, one in scored.items():
        out.add("ppl", "perplexity", perplexity(one, bench.seed), "1", label=name, n=one.tokens)
        for layer in range(bench.layers):
            found = bootstrap_mean(one.kept[:, layer], seed=bench.seed)
            out.add("density", name, found, "share", x=layer, n=one.tokens)
    gain = difference(layered, counts["top-k, layer-wise"], bench.seed)
    across = difference(whole, counts["top-k at the global threshold's density"], bench.seed)
    out.conclude(
        f"at equal mean density a layer-wise threshold stands at {shown(gain)} nats against top-k, a global one at"
        f" {shown(across)} nats (kept {float(layered.kept.mean()):.1%} and {float(whole.kept.mean()):.1%}).",
        below(gain, 0.0),
        gain,
        "nats",
    )
    return out


def _global_gates(bench: Bench) -> GatesOfBlock:
    """One threshold on s * sqrt(f) for all layers, the round(r*N*f*L)-th largest over calibration prompts; every
    block's prompt chooses by it."""
    replay = bench.calibration.prompts()
    scores = [replay.statistics(layer) for layer in range(bench.layers)]
    pooled = torch.cat([one * sqrt(one.shape[1]) for one in scores])
    threshold = threshold_for_share(pooled, 1 - SHARE)

    def gates(block: int) -> Sequence[LayerGates]:
        found = bench.statistics(bench.pool[block, : bench.prompt_length], bench.prompt_tokens)
        return fixed_gates([over(one * sqrt(len(one)), threshold).cpu() for one in found])

    return gates


def first_tokens(bench: Bench) -> Outcome:
    """T4: GRIFFIN's mask from the first k prompt tokens after the sink tokens, k in 1, 2, 4 .. P."""
    out = Outcome(T4, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count)})
    whole = bench.prompt_length - bench.sink_tokens
    lengths = [2**power for power in range(0, 20, 2 if bench.quick else 1) if 2**power < whole]
    full, static = bench.score(f"griffin@{SHARE:g}"), bench.score(f"static:stat=griffin@{SHARE:g}")
    scored = {k: bench.score(f"griffin:first={k}@{SHARE:g}") for k in lengths} | {whole: full}
    out.panel("ppl", "Perplexity by the number of prompt tokens that choose", PanelKind.LINE,
              "prompt tokens that choose the mask", "perplexity", log_x=True, log_y=True,
              reference=perplexity(bench.score(DENSE)).value)  # fmt: skip
    for k, one in scored.items():
        out.add("ppl", "mask of the first tokens", perplexity(one, bench.seed), "1", x=k, n=one.tokens)
        out.add("ppl", "static mask", perplexity(static, bench.seed), "1", x=k, n=static.tokens)
    quarter = min(scored, key=lambda k: abs(k - whole / 4))
    lost = difference(scored[quarter], full, bench.seed)
    enough = next(k for k in scored if (difference(scored[k], full).value or 0.0) <= LITTLE)
    out.conclude(
        f"the mask of the first {quarter} of {whole} prompt tokens stands at {shown(lost)} nats against the whole"
        f" prompt's (our bar: {LITTLE:g}); within {LITTLE:g} nats from {enough} tokens on.",
        below(lost, LITTLE),
        lost,
        "nats",
    )
    return out


def staleness(bench: Bench) -> Outcome:
    """T5: the loss against dense along the generation, after a prompt of a quarter of the block."""
    prompt = max(bench.sink_tokens + 1, bench.block_length // 4)
    out = Outcome(T5, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count),
                                             "prompt tokens": str(prompt)})  # fmt: skip
    every = (bench.block_length - prompt) // 8
    dense, name = bench.score(DENSE, prompt=prompt), f"griffin@{SHARE:g}"
    again = [_refreshed(gates, every) for gates in bench.plan(name).gates()]
    scored = {
        "chosen once": bench.score(name, prompt=prompt),
        f"chosen again every {every} tokens": bench.score_gates(
            f"{name} refresh {every}", lambda _: again, prompt=prompt
        ),
        "static mask": bench.score(f"static:stat=griffin@{SHARE:g}", prompt=prompt),
    }
    out.panel("nll", "Loss against dense along the generation", PanelKind.LINE, "decoded token", "NLL - dense (nats)",
              reference=0.0)  # fmt: skip
    bins = 4 if bench.quick else 8
    edges = [round(i * dense.nll.shape[1] / bins) for i in range(bins + 1)]
    for label, one in scored.items():
        for start, stop in pairwise(edges):
            found = difference(one.part(slice(start, stop)), dense.part(slice(start, stop)), bench.seed)
            out.add("nll", label, found, "nats", x=(start + stop) / 2, n=(stop - start) * bench.count)
    once, renewed, _ = scored.values()
    growth = _growth(once, dense, edges, bench.seed)
    fresh = difference(once, renewed, bench.seed)
    out.conclude(
        f"from the first to the last {edges[1]} decoded tokens the loss of a mask chosen once changes by"
        f" {shown(growth)} nats (our bar: {LITTLE:g}); choosing again every {every} tokens, which then run dense, gains"
        f" {shown(fresh)} nats.",
        below(growth, LITTLE),
        growth,
        "nats",
    )
    return out


def _refreshed(gates: LayerGates, every: int) -> LayerGates:
    """The same gates, chosen again every so many decoded tokens."""
    assert isinstance(gates.neurons, PrefillGate)
    return replace(gates, neurons=replace(gates.neurons, refresh_every=every))


def _growth(one: Scored, dense: Scored, edges: list[int], seed: int) -> Interval:
    """The loss over the last stretch less that over the first, paired block by block."""
    lost = one.nll - dense.nll
    return bootstrap_mean(lost[:, edges[-2] :].mean(dim=1) - lost[:, : edges[1]].mean(dim=1), seed=seed)


def other_lengths(bench: Bench) -> Outcome:
    """T6: the share that TDA keeps of prompts shorter and longer than those that its threshold was fitted on."""
    out = Outcome(T6, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count),
                                             "fitted at": str(bench.prompt_length)})  # fmt: skip
    lengths = [k for k in LENGTHS if bench.sink_tokens < k <= bench.block_length] or [bench.block_length]
    fixed, aware = bench.plan(f"tda@{SHARE:g}"), bench.plan(f"tda:length_aware=true@{SHARE:g}")
    out.panel("kept", "Share kept by prompt length", PanelKind.LINE, "prompt tokens",
              "share of neurons kept", log_x=True, reference=1 - SHARE)  # fmt: skip
    kept = {name: _kept(bench, plan, lengths) for name, plan in (("one threshold", fixed), ("length-aware", aware))}
    for name, of_length in kept.items():
        for k, values in zip(lengths, of_length.T, strict=True):
            out.add("kept", name, bootstrap_mean(values, seed=bench.seed), "share", x=k, n=bench.count)
    away = {name: _farthest(found, 1 - SHARE, bench.seed) for name, found in kept.items()}
    told = {
        name: "/".join(f"{100 * share:.0f}" for share in found.mean(dim=0).tolist()) for name, found in kept.items()
    }
    out.conclude(
        f"after prompts of {'/'.join(map(str, lengths))} tokens one threshold keeps {told['one threshold']} % of the"
        f" neurons, at most {points(away['one threshold'])} from the {1 - SHARE:.0%} asked for; length-aware ones"
        f" keep {told['length-aware']} %, at most {points(away['length-aware'])} from it (our bar: {CLOSE:.0%}).",
        below(away["one threshold"], CLOSE),
        away["one threshold"],
        "share",
    )
    return out


def _farthest(kept: Float[Tensor, "blocks lengths"], density: float, seed: int) -> Interval:
    """How far the mean share over blocks is from the density at the length where it is farthest."""
    weights = resample_weights(len(kept), seed=seed) / len(kept)
    found = (kept.mean(dim=0) - density).abs().max()
    return interval(float(found), (weights @ kept - density).abs().amax(dim=1), len(kept))


def _kept(bench: Bench, plan: Plan, lengths: list[int]) -> Float[Tensor, "blocks lengths"]:
    """The mean share over layers that a plan keeps after every block's first tokens."""
    found = kept_by_prompt_length(bench.loaded, plan.gates(), bench.scored_sequences, bench.progress, lengths)
    return torch.stack([found[length].mean(dim=0) for length in lengths], dim=1)
