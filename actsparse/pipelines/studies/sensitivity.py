"""One layer at a time: what a plan costs when that layer alone is sparse, and where an allocation could save. Ours."""

import torch

from actsparse.core.bootstrap import Interval
from actsparse.methods.short import DENSE
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, shown
from actsparse.pipelines.studies.scores import Scored, difference, of_blocks
from actsparse.results import PanelKind

SHARE = 0.5
FEW_LAYERS = 6
S2 = Experiment("frontier", "S2", "Sensitivity, one layer at a time", "our definition",
                "Layers differ in what their sparsity costs, so that one share for all wastes quality")  # fmt: skip


def picked_apart(scored: dict[int, Scored], half: int, seed: int) -> tuple[int, int, Interval]:
    """The layers of the largest and of the smallest loss on the first `half` blocks, and the difference of their losses
    on the others: on the blocks that they were picked on it would be above 0 by chance alone."""
    first = (
        {layer: float(one.nll[:half].mean()) for layer, one in scored.items()} if half else dict.fromkeys(scored, 0.0)
    )
    worst, best = max(first, key=first.__getitem__), min(first, key=first.__getitem__)
    mine, other = (of_blocks(scored[layer], slice(half, None)) for layer in (worst, best))
    return worst, best, difference(mine, other, seed)


def one_layer(bench: Bench) -> Outcome:
    """The paired loss against dense with one layer under a plan and the others dense, layer by layer."""
    few = bench.first(4) if bench.quick else bench
    layers = torch.linspace(0, bench.layers - 1, min(bench.layers, FEW_LAYERS)).round().int().unique().tolist()
    layers = layers if bench.quick else list(range(bench.layers))
    out = Outcome(S2, bench.quick, settings={"share dropped": f"{SHARE:g}", "blocks": str(few.count),
                                             "layers": ", ".join(map(str, layers))})  # fmt: skip
    out.panel("layers", "Loss when one layer alone is sparse", PanelKind.LINE, "layer", "NLL - dense (nats)",
              layers=True, reference=0.0)  # fmt: skip
    dense, found, scores = few.score(DENSE), {}, {}
    names = ["griffin", *(["cats"] if bench.loaded.record.gated else []), "static:stat=griffin"]
    for name in (f"{method}@{SHARE:g}" for method in names):
        gates = bench.plan(name).gates()
        for layer in layers:
            alone = [gates[layer] if i == layer else bench.whole for i in range(bench.layers)]
            scored = few.score_gates(f"{name} in layer {layer}", lambda _block, one=alone: one)
            scores[name, layer] = scored
            found[name, layer] = difference(scored, dense, bench.seed)
            out.add("layers", name, found[name, layer], "nats", x=layer, n=scored.tokens)
    name, half = f"griffin@{SHARE:g}", few.count // 2
    own = {layer: scores[name, layer] for layer in layers}
    worst, best, spread = picked_apart(own, half, bench.seed)
    out.conclude(
        f"under {name} layer {worst} alone costs {shown(found[name, worst])} nats and layer {best}"
        f" {shown(found[name, best])}, a difference of {shown(spread)} on {few.count - half} blocks (both picked"
        f" on the other {half}).",
        above(spread, 0.0),
        spread,
        "nats",
    )
    return out
