"""M5, the donor swap (methods.md, section 6, SI4): whose prompt should choose the neurons of a continuation?

Every continuation is scored with masks of equal density from eight donors. If the own prompt's mask is no better than
another prompt's or than one static mask, a mask a sequence buys nothing over static pruning. The definition is ours.
"""

from collections.abc import Sequence

from torch import Tensor

from actsparse.core.bootstrap import Interval
from actsparse.core.ladder import ordinary_ids, random_tokens
from actsparse.methods.gates import LayerGates
from actsparse.pipelines.studies.bench import Bench, top_gates
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, percent, shown
from actsparse.pipelines.studies.scores import Scored, difference, mean_of, perplexity, ratio, token_mean
from actsparse.results import PanelKind

DENSITY = 0.5
DRAWS = 3
"""Random prompts of a block whose mean NLL counts: one draw alone moves the perplexity of a small model by a half."""
OWN, NEAR, FAR, RANDOM_PROMPT, LEAK = "own prompt", "next block", "far block", "random tokens", "own continuation"
STATIC, RANDOM, ORACLE = "static", "random mask", "per-token oracle"
DONORS = (OWN, NEAR, FAR, RANDOM_PROMPT, STATIC, RANDOM, LEAK, ORACLE)
SHORT = {STATIC: "static:stat=griffin", RANDOM: "random", ORACLE: "oracle-n"}

M5 = Experiment(
    "moyu",
    "M5",
    "Donor swap: whose prompt chooses the neurons",
    "after MOYU, arXiv 2406.12569, and CLADA, arXiv 2502.19078; our definition",
    "A sequence's own prompt chooses the neurons that its continuation needs",
)


def donor_swap(bench: Bench) -> Outcome:
    """Perplexity of every continuation under eight donors' masks, and what each captures of the oracle's gain."""
    out = Outcome(M5, bench.quick, settings={"density": f"{DENSITY:g}", "blocks": str(bench.count)})
    scored = {donor: _score(bench, donor) for donor in DONORS}
    _fill(out, bench, scored)
    captured = captured_gain(scored, scored[OWN], STATIC, bench.seed)
    own, other = (difference(scored[OWN], scored[donor], bench.seed) for donor in (STATIC, NEAR))
    ppl = {donor: perplexity(one, bench.seed).value or float("nan") for donor, one in scored.items()}
    order = ", ".join(f"{donor} {ppl[donor]:.1f}" for donor in DONORS)
    out.conclude(
        f"at {DENSITY:.0%} of the neurons the own prompt's mask captures {percent(captured)} of what a per-token oracle"
        f" gains over one static mask, {shown(own)} nats against static and {shown(other)} against the next block's"
        f" prompt; perplexities: {order}.",
        above(captured, 0.0),
        captured,
        "share",
    )
    return out


def _fill(out: Outcome, bench: Bench, scored: dict[str, Scored]) -> None:
    out.panel("ppl", "Perplexity by donor", PanelKind.BAR, "donor of the mask", "perplexity", log_y=True,
              reference=perplexity(bench.score("dense")).value)  # fmt: skip
    out.panel("delta", "Paired difference to the own prompt", PanelKind.BAR, "donor of the mask", "NLL - own (nats)",
              reference=0.0)  # fmt: skip
    out.panel("captured", "What a donor captures of the oracle's gain", PanelKind.BAR, "donor of the mask", "share",
              reference=0.0)  # fmt: skip
    for donor, one in scored.items():
        out.add("ppl", "perplexity", perplexity(one, bench.seed), "1", label=donor, n=one.tokens)
        out.add("delta", "difference to own", difference(one, scored[OWN], bench.seed), "nats", label=donor,
                n=one.tokens)  # fmt: skip
        for base, series in ((STATIC, "over static (headline)"), (RANDOM, "over random masks")):
            found = captured_gain(scored, one, base, bench.seed)
            out.add("captured", series, found, "share", label=donor, n=one.tokens)


def captured_gain(scored: dict[str, Scored], one: Scored, base: str, seed: int) -> Interval:
    """(L_base - L_donor) / (L_base - L_oracle), resampled over blocks; undefined where the oracle's gain is not
    clearly above 0, since a ratio to nothing means nothing."""
    gain = scored[base].nll - scored[ORACLE].nll
    if token_mean(gain, seed).touches(0.0) or float(gain.mean()) <= 0:
        return Interval(value=None, low=None, high=None, n=len(gain), stderr=None)
    return ratio((scored[base].nll - one.nll).sum(dim=1), gain.sum(dim=1), seed)


def _score(bench: Bench, donor: str) -> Scored:
    if donor in SHORT:
        return bench.score(f"{SHORT[donor]}@{1 - DENSITY:g}")
    draws = range(DRAWS if donor == RANDOM_PROMPT else 1)
    return mean_of([
        bench.score_gates(
            f"donor:{donor}@{DENSITY:g}#{draw}", lambda block, d=draw: donor_gates(bench, donor, block, DENSITY, d)
        )
        for draw in draws
    ])  # fmt: skip


def donor_gates(bench: Bench, donor: str, block: int, density: float, draw: int = 0) -> Sequence[LayerGates]:
    """The gates of one block's continuation from a donor's text; of random tokens there are several draws."""
    tokens = bench.prompt_tokens
    if donor == LEAK:
        return top_gates(bench.statistics(bench.pool[block], slice(bench.prompt_length, None)), density)
    return top_gates(bench.statistics(donor_text(bench, donor, block, draw)[: bench.prompt_length], tokens), density)


def donor_text(bench: Bench, donor: str, block: int, draw: int = 0) -> Tensor:
    """The text whose prompt chooses: this block, the next, the one half the text away, or random tokens after the
    block's first four."""
    blocks = len(bench.pool)
    if donor == RANDOM_PROMPT:
        special = {token for token, text in bench.loaded.tokenizer.added_tokens_decoder.items() if text.special}
        vocabulary = min(bench.loaded.record.vocab_size, len(bench.loaded.tokenizer))
        ordinary = ordinary_ids(vocabulary, [*special, *bench.loaded.tokenizer.all_special_ids])
        return random_tokens(bench.pool[: bench.count], ordinary, seed=bench.seed + draw)[block]
    step = {OWN: 0, NEAR: 1, FAR: max(1, blocks // 2)}[donor]
    return bench.pool[(block + step) % blocks]
