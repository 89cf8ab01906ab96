"""P1 and P5: how sparse a SwiGLU model is beside its ReLU counterpart, and what sparsity costs it (*Dynamic Activation
Pitfalls in LLaMA Models*, arXiv 2405.09274)."""

import torch

from actsparse.core.bootstrap import Interval, bootstrap_mean
from actsparse.methods.short import DENSE
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, percent, points, shown
from actsparse.pipelines.studies.scores import drop_mean, perplexity, relative_quality
from actsparse.results import ClaimVerdict, PanelKind

PAPER = "Pitfalls, arXiv 2405.09274"
TARGET = 0.2
NO_COUNTERPART = "no counterpart was given: --counterpart MODEL names the model with the other activation"
NOT_PAIRED = "blocks can be compared one by one only between models whose tokenizers cut the text alike"
OTHER_TEXTS = "its counterpart's tokenizer cuts the text differently, so the two are not compared"

P1 = Experiment("pitfalls", "P1", "Sparsity at CETT 0.2, layer by layer", PAPER,
                "SwiGLU activations are far less sparse than ReLU activations at the same error")  # fmt: skip
P5 = Experiment("pitfalls", "P5", "Quality against sparsity, SwiGLU and ReLU", PAPER,
                "Dynamic activation costs a SwiGLU model more than a ReLU one, most at high sparsity")  # fmt: skip


def benches(bench: Bench) -> list[Bench]:
    """The model, and its counterpart where one was given."""
    return [bench] if bench.counterpart is None else [bench, bench.counterpart]


def paired(bench: Bench) -> bool:
    """Whether model and counterpart are scored on the same tokens, block by block."""
    other = bench.counterpart
    return other is not None and torch.equal(bench.scored, other.scored) and bench.prompt_length == other.prompt_length


def label_of(bench: Bench) -> str:
    """A model by its name and activation."""
    return f"{bench.name} ({bench.loaded.record.activation})"


def cett_sparsity(bench: Bench) -> Outcome:
    """P1: the share of neurons below eps at CETT 0.2 by layer, and quality along a sweep of CETT targets."""
    targets = (0.1, TARGET, 0.4) if bench.quick else (0.05, 0.1, 0.15, TARGET, 0.3, 0.4, 0.5)
    out = Outcome(P1, bench.quick, settings={"CETT": f"{TARGET:g}", "blocks": str(bench.count)})
    out.panel("layers", f"Sparsity at CETT {TARGET:g}", PanelKind.LINE, "layer", "share of neurons dropped",
              layers=True)  # fmt: skip
    out.panel("sweep", "Perplexity along the CETT sweep", PanelKind.LINE, "share of neurons dropped",
              "perplexity / dense", reference=1.0)  # fmt: skip
    means: dict[str, Interval] = {}
    for one in benches(bench):
        label, dense = label_of(one), one.score(DENSE)
        for target in targets:
            scored = one.score(f"cett:target={target:g}")
            cost = relative_quality(dense, scored, one.seed)
            out.add("sweep", label, cost, "1", x=drop_mean(scored).value, label=f"CETT {target:g}", n=scored.tokens)
            if target == TARGET:
                means[label] = drop_mean(scored, one.seed)
                for layer in range(one.layers):
                    found = bootstrap_mean(1 - scored.kept[:, layer], seed=one.seed)
                    out.add("layers", label, found, "share", x=layer, n=scored.tokens)
    _conclude_sparsity(out, bench, means)
    return out


def _conclude_sparsity(out: Outcome, bench: Bench, means: dict[str, Interval]) -> None:
    told = " and ".join(f"{percent(found)} of the neurons of {label}" for label, found in means.items())
    if bench.counterpart is None:
        out.notes.append(NO_COUNTERPART)
        out.conclude(f"at CETT {TARGET:g}, {told} can be dropped; without a counterpart nothing is compared.",
                     ClaimVerdict.UNDECIDED, means[label_of(bench)], "share")  # fmt: skip
        return
    if not paired(bench):
        out.notes.append(NOT_PAIRED)
        out.conclude(f"at CETT {TARGET:g}, {told} can be dropped; {OTHER_TEXTS}.", ClaimVerdict.UNDECIDED,
                     means[label_of(bench)], "share")  # fmt: skip
        return
    mine, theirs = (1 - one.score(f"cett:target={TARGET:g}").kept.mean(dim=1) for one in benches(bench))
    sign = -1.0 if _is_relu(bench) else 1.0
    gap = bootstrap_mean(sign * (theirs - mine), seed=bench.seed)
    out.conclude(
        f"at CETT {TARGET:g}, {told} can be dropped: {points(gap)} more with ReLU.",
        above(gap, 0.0),
        gap,
        "share",
    )


def quality_by_sparsity(bench: Bench) -> Outcome:
    """P5: dense perplexity over a plan's, against the share dropped, for an oracle and for two prompt rules."""
    shares = (0.5, 0.7, 0.9) if bench.quick else (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    methods = ("oracle-n", "griffin") if bench.quick else ("oracle-n", "griffin", "tda", "static:stat=griffin")
    out = Outcome(P5, bench.quick, settings={"blocks": str(bench.count)})
    out.panel("quality", "Quality kept against sparsity", PanelKind.LINE, "share of neurons dropped",
              "dense perplexity / perplexity", reference=1.0)  # fmt: skip
    out.panel("ppl", "Perplexity against sparsity", PanelKind.LINE, "share of neurons dropped", "perplexity",
              log_y=True)  # fmt: skip
    kept: dict[tuple[str, str, float], Interval] = {}
    for one in benches(bench):
        dense = one.score(DENSE)
        for method in methods:
            for share in shares:
                scored = one.score(f"{method}@{share:g}")
                found = relative_quality(scored, dense, one.seed)
                kept[label_of(one), method, share] = found
                series = f"{label_of(one)}: {method}"
                out.add("quality", series, found, "1", x=share, n=scored.tokens)
                out.add("ppl", series, perplexity(scored, one.seed), "1", x=share, n=scored.tokens)
    _conclude_quality(out, bench, shares[-1], kept)
    return out


def _conclude_quality(out: Outcome, bench: Bench, share: float, kept: dict[tuple[str, str, float], Interval]) -> None:
    mine = kept[label_of(bench), "griffin", share]
    if bench.counterpart is None:
        out.notes.append(NO_COUNTERPART)
        out.conclude(f"with {share:.0%} of the neurons dropped by the prompt's mask (griffin), {label_of(bench)} keeps"
                     f" {percent(mine)} of its dense quality;"
                     " without a counterpart nothing is compared.", ClaimVerdict.UNDECIDED, mine, "share")  # fmt: skip
        return
    if not paired(bench):
        out.notes.append(NOT_PAIRED)
        out.conclude(f"with {share:.0%} of the neurons dropped by the prompt's mask (griffin), {label_of(bench)} keeps"
                     f" {percent(mine)} of its dense quality; {OTHER_TEXTS}.",
                     ClaimVerdict.UNDECIDED, mine, "share")  # fmt: skip
        return
    gaps, sign = {}, -1.0 if _is_relu(bench) else 1.0
    for method in ("oracle-n", "griffin"):
        losses = [(one.score(f"{method}@{share:g}").nll - one.score(DENSE).nll).mean(dim=1) for one in benches(bench)]
        gaps[method] = bootstrap_mean(sign * (losses[0] - losses[1]), seed=bench.seed)
    told = {
        method: " and ".join(f"{label_of(one)} {percent(kept[label_of(one), method, share])}" for one in benches(bench))
        for method in gaps
    }
    out.conclude(
        f"with {share:.0%} of the neurons dropped by the prompt's mask (griffin), of the dense quality remain:"
        f" {told['griffin']}; SwiGLU's loss less ReLU's is {shown(gaps['griffin'])} nats a token. With the best mask of"
        f" each token (oracle-n): {told['oracle-n']}; {shown(gaps['oracle-n'])} nats.",
        above(gaps["griffin"], 0.0),
        gaps["griffin"],
        "nats",
    )


def _is_relu(bench: Bench) -> bool:
    return "relu" in bench.loaded.record.activation
