"""P2 and P3: how sparse heads are, what dropping them costs, and what becomes of the keys and values that a dropped
head does not write (*Dynamic Activation Pitfalls in LLaMA Models*, arXiv 2405.09274)."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.bootstrap import Interval, bootstrap_mean
from actsparse.core.head_cett import HeadCett
from actsparse.methods.short import DENSE
from actsparse.models.taps import tapped
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, percent, shown
from actsparse.pipelines.studies.pitfalls import PAPER, TARGET
from actsparse.pipelines.studies.scores import Scored, difference, perplexity, relative_quality
from actsparse.results import KvPolicy, PanelKind, Site, SiteKind

P2 = Experiment("pitfalls", "P2", "Sparsity of heads at CETT 0.2, and an oracle over heads", PAPER,
                "Heads are sparse: many can be dropped at a token for little error")  # fmt: skip
P3 = Experiment("pitfalls", "P3", "Five policies for keys and values that were skipped", PAPER,
                "Skipping entries of the KV cache loses information, the more the longer the generation")  # fmt: skip
SAMPLED = 32


def head_sparsity(bench: Bench) -> Outcome:
    """P2: the share of heads below eps at CETT 0.2 by layer, and perplexity as an oracle keeps fewer KV groups."""
    out = Outcome(P2, bench.quick, settings={"CETT": f"{TARGET:g}", "blocks": str(bench.count)})
    out.panel("layers", f"Heads dropped at CETT {TARGET:g}", PanelKind.LINE, "layer", "share of heads dropped",
              layers=True)  # fmt: skip
    out.panel("sweep", "Quality as an oracle keeps fewer KV groups", PanelKind.LINE, "share of KV groups kept",
              "dense perplexity / perplexity", reference=1.0)  # fmt: skip
    dropped = _cett_over_heads(bench)
    for layer, values in enumerate(dropped.T):
        out.add("layers", bench.name, bootstrap_mean(values, seed=bench.seed), "share", x=layer,
                n=bench.count * SAMPLED)  # fmt: skip
    dense, groups = bench.score(DENSE), bench.loaded.record.kv_heads
    kept: dict[int, Interval] = {groups: relative_quality(dense, dense, bench.seed)}
    for count in _counts(groups, bench.quick):
        scored = bench.score(f"heads-oracle@{1 - count / groups:.6f}")
        kept[count] = relative_quality(scored, dense, bench.seed)
    for count, found in sorted(kept.items()):
        out.add("sweep", "heads-oracle", found, "1", x=count / groups, n=dense.tokens)
    mean = bootstrap_mean(dropped.mean(dim=1), seed=bench.seed)
    half = min(kept, key=lambda count: abs(count - groups / 2))
    out.conclude(
        f"at CETT {TARGET:g}, {percent(mean)} of the heads of a layer can be dropped at a token; an oracle that keeps"
        f" {half} of {groups} KV groups in all layers but the first keeps {percent(kept[half])} of the quality (our bar"
        " for sparse: 50 % of the heads).",
        above(mean, 0.5),
        mean,
        "share",
    )
    return out


def _counts(groups: int, quick: bool) -> list[int]:
    """How many KV groups an oracle keeps: all counts, or a few of them."""
    counts = list(range(1, groups))
    return counts if len(counts) <= 3 or not quick else [counts[0], counts[len(counts) // 2], counts[-1]]


def _cett_over_heads(bench: Bench) -> Float[Tensor, "blocks layers"]:
    """The share of heads under eps_l in every scored block; eps_l is solved on the blocks that plans are fitted on."""
    fitted, judged = _head_outputs(bench, bench.calib), _head_outputs(bench, bench.scored)
    heads, rows = bench.loaded.record.heads, []
    for layer, mine, theirs in zip(bench.loaded.sites.layers, fitted, judged, strict=True):
        weight = layer.output_matrix(mine.shape[-1]).cpu()
        eps = HeadCett.of(mine.flatten(0, 1), weight, heads).solve(TARGET).eps
        rows.append(torch.tensor([HeadCett.of(block, weight, heads).at(eps).sparsity for block in theirs]).double())
    return torch.stack(rows, dim=1)


def _head_outputs(bench: Bench, blocks: Tensor) -> list[Float[Tensor, "blocks tokens width"]]:
    """Concatenated outputs of the heads at positions spread over the blocks, layer by layer."""
    places = torch.linspace(bench.sink_tokens, bench.block_length - 1, SAMPLED).long()
    found: list[list[Tensor]] = [[] for _ in range(bench.layers)]

    def on_heads(site: Site, o: Tensor) -> None:
        found[site.layer].append(o[0, places].cpu())

    with tapped(bench.loaded.sites, {SiteKind.ATTN_OUT: on_heads}), torch.no_grad():
        for ids in blocks:
            bench.loaded.model.base_model(input_ids=ids[None].to(bench.loaded.device), use_cache=False)
    return [torch.stack(rows) for rows in found]


def kv_policies(bench: Bench) -> Outcome:
    """P3: the loss along a generation of an oracle over heads under each policy for the keys and values it skips."""
    decoded = 128 if bench.quick else bench.block_length // 2
    decoded = min(decoded, bench.block_length - bench.sink_tokens - 1)
    blocks, prompt = min(2, bench.count) if bench.quick else bench.count, bench.block_length - decoded
    shares = (0.5,) if bench.quick else (0.25, 0.5, 0.75)
    told = ", ".join(f"{share:g}" for share in shares)
    out = Outcome(P3, bench.quick, settings={"blocks": str(blocks), "decoded tokens": str(decoded), "dropped": told})
    edges = [round(i * decoded / 4) for i in range(5)]
    few = bench.first(blocks)
    dense = few.score(DENSE, prompt=prompt)
    found: dict[tuple[KvPolicy, float], Scored] = {}
    for share in shares:
        panel = f"share{share:g}"
        out.panel(panel, f"Perplexity along the generation, {share:.0%} of KV groups dropped", PanelKind.LINE,
                  "decoded tokens", "perplexity / dense", reference=1.0)  # fmt: skip
        for policy in KvPolicy:
            scored = few.score(f"heads-oracle:policy={policy.value}@{share:g}", prompt=prompt)
            found[policy, share] = scored
            for start, stop in pairwise(edges):
                part = slice(start, stop)
                lost = relative_quality(dense.part(part), scored.part(part), bench.seed)
                out.add(panel, policy.value, lost, "1", x=(start + stop) / 2, n=blocks * (stop - start))
    _conclude_policies(out, few, found, edges, shares[len(shares) // 2])
    return out


def _conclude_policies(
    out: Outcome, bench: Bench, found: dict[tuple[KvPolicy, float], Scored], edges: list[int], share: float
) -> None:
    kept = found[KvPolicy.COMPUTE_ALL, share]
    last = slice(edges[-2], edges[-1])
    told = []
    for policy in (KvPolicy.DROP, KvPolicy.ZERO, KvPolicy.COPY_PREV, KvPolicy.LAZY):
        ends = (difference(found[policy, share].part(part), kept.part(part)).value or 0.0
                for part in (slice(0, edges[1]), last))  # fmt: skip
        told.append(f"{policy.value} {' to '.join(f'{end:+.3f}' for end in ends)}")
    gap = difference(found[KvPolicy.DROP, share].part(last), kept.part(last), bench.seed)
    out.conclude(
        f"with {share:.0%} of the KV groups dropped, leaving holes in the cache costs {shown(gap)} nats more than"
        f" writing every entry over the last {edges[-1] - edges[-2]} tokens; against compute_all, first to last quarter"
        f" (nats): {', '.join(told)}; perplexity of compute_all {perplexity(kept).value or 0.0:.1f}.",
        above(gap, 0.0),
        gap,
        "nats",
    )
