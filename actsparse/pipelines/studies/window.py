"""S6: how much a result depends on how much of a text is left dense (methods.md, section 8).

Published perplexities differ in this window: some sparsify every token, some the second half, some leave the first
one or the first per cent dense. The same plan then has several perplexities.
"""

from math import log

import torch
from torch import Tensor

from actsparse.core.bootstrap import Interval
from actsparse.methods.short import DENSE
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, shown
from actsparse.pipelines.studies.scores import difference, mapped, token_mean
from actsparse.results import PanelKind

S6 = Experiment("window", "S6", "Sensitivity to the evaluation window", "after TEAL, arXiv 2408.14690; our definition",
                "The perplexity of a plan depends on how much of the text is left dense")  # fmt: skip
SHARE = 0.5
SHARES = (0.01, 0.1, 0.5, 0.9)


def windows(bench: Bench) -> dict[str, int]:
    """Dense positions by the name of their window: the sink tokens alone, one token more, shares of the block."""
    sink = max(1, bench.sink_tokens)
    found = {"sink tokens": sink, "1 token": sink + 1}
    shares = SHARES[1:] if bench.quick else SHARES
    return found | {f"{share:.0%}": max(sink + 2, round(share * bench.block_length)) for share in shares}


def window_sensitivity(bench: Bench) -> Outcome:
    """Whole-block perplexity, and the loss over the sparse tokens alone, for dense windows from none to 90 %."""
    out = Outcome(S6, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(bench.count)})
    out.panel("whole", "Perplexity over whole blocks", PanelKind.LINE, "dense share of the block (%)", "perplexity",
              log_y=True)  # fmt: skip
    out.panel("sparse", "Loss over the sparse tokens", PanelKind.LINE, "dense share of the block (%)",
              "NLL - dense (nats)", reference=0.0)  # fmt: skip
    first = next(iter(windows(bench).values()))
    whole_dense = _dense_nll(bench, first)
    lost: dict[str, dict[str, Interval]] = {}
    for method in ("griffin", "static:stat=griffin", "cats" if bench.loaded.record.gated else "oracle-a"):
        name = f"{method}@{SHARE:g}"
        lost[name] = {}
        for window, dense_tokens in windows(bench).items():
            if method == "griffin" and dense_tokens <= bench.sink_tokens:
                continue
            scored = bench.score(name, prompt=dense_tokens)
            place = 100 * dense_tokens / bench.block_length
            blocks = whole_dense.clone()
            blocks[:, dense_tokens - first :] = scored.nll
            ppl = mapped(token_mean(blocks, bench.seed), lambda nll: float(torch.tensor(nll).exp()))
            out.add("whole", name, ppl, "1", x=place, label=window, n=blocks.numel())
            found = difference(scored, bench.score(DENSE, prompt=dense_tokens), bench.seed)
            lost[name][window] = found
            out.add("sparse", name, found, "nats", x=place, label=window, n=scored.tokens)
    _conclude(out, bench, lost)
    return out


def _conclude(out: Outcome, bench: Bench, lost: dict[str, dict[str, Interval]]) -> None:
    static = f"static:stat=griffin@{SHARE:g}"
    chosen = windows(bench)
    ends = [bench.score(static, prompt=chosen[name]).nll for name in ("sink tokens", "90%")]
    dense = [bench.score(DENSE, prompt=chosen[name]).nll for name in ("sink tokens", "90%")]
    whole = [(one - other).sum(dim=1) / bench.block_length for one, other in zip(ends, dense, strict=True)]
    spread = token_mean((whole[0] - whole[1])[:, None], bench.seed)
    told = "; ".join(
        f"{name} {min(v.value or 0.0 for v in found.values()):.2f} to {max(v.value or 0.0 for v in found.values()):.2f}"
        for name, found in lost.items()
    )
    out.conclude(
        f"between a window of the sink tokens and one of 90 % the same static mask's whole-block loss differs by"
        f" {shown(spread)} nats a token; over the sparse tokens alone the loss ranges (nats): {told}.",
        above(spread, log(1.05)),
        spread,
        "nats",
    )


def _dense_nll(bench: Bench, prompt: int) -> Tensor:
    return bench.score(DENSE, prompt=prompt).nll.clone()
