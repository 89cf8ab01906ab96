"""One layer at a time: what a plan costs when that layer alone is sparse, and where an allocation could save. Ours."""

import torch

from actsparse.methods.short import DENSE
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, shown
from actsparse.pipelines.studies.scores import difference
from actsparse.results import PanelKind

SHARE = 0.5
FEW_LAYERS = 6
S2 = Experiment("frontier", "S2", "Sensitivity, one layer at a time", "our definition",
                "Layers differ in what their sparsity costs, so that one share for all wastes quality")  # fmt: skip


def one_layer(bench: Bench) -> Outcome:
    """The paired loss against dense with one layer under a plan and the others dense, layer by layer."""
    few = bench.first(2) if bench.quick else bench
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
    name = f"griffin@{SHARE:g}"
    worst, best = (pick(layers, key=lambda one: found[name, one].value or 0.0) for pick in (max, min))
    spread = difference(scores[name, worst], scores[name, best], bench.seed)
    out.conclude(
        f"under {name} layer {worst} alone costs {shown(found[name, worst])} nats and layer {best}"
        f" {shown(found[name, best])}, a difference of {shown(spread)} (both picked on these blocks).",
        above(spread, 0.0),
        spread,
        "nats",
    )
    return out
