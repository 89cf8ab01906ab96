"""S4: how many neurons, and how many KV groups, a batch of sequences needs together (methods.md, sections 6 and 8)."""

import torch
from jaxtyping import Int
from torch import Tensor

from actsparse.core.batch_union import batch_union, layer_unions
from actsparse.core.overlap import firing_counts, topk_masks
from actsparse.models.taps import tapped
from actsparse.pipelines.studies.bench import Bench
from actsparse.pipelines.studies.outcome import Experiment, Outcome, above, percent
from actsparse.results import PanelKind, Site, SiteKind

S4 = Experiment("union", "S4", "What a batch needs together: neurons against heads", "after Polar, arXiv 2505.14884",
                "In a batch the sparsity of neurons is lost to the union of the masks")  # fmt: skip
DENSITY = 0.5
POSITIONS = 16
LOST = 0.9
"""Share of the neurons from which on we call their sparsity lost."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)

# At how many positions of each block a unit is kept.
Counts = Int[Tensor, "layers blocks units"]


def batch_unions(bench: Bench) -> Outcome:
    """Union density of batches of 1 to 64 tokens of different sequences, for neurons and for KV groups."""
    out = Outcome(S4, bench.quick, settings={"density": f"{DENSITY:g}"})
    out.panel("union", "Share that a batch needs together", PanelKind.LINE, "batch size", "share of units", log_x=True,
              reference=1.0)  # fmt: skip
    found = {
        name: [batch_union(fired, POSITIONS, max_batch=BATCHES[-1]) for fired in counts]
        for name, counts in zip(("neurons", "KV groups"), _collect(bench), strict=True)
    }
    measured = {name: layer_unions(layers) for name, layers in found.items()}
    for name, layers in found.items():
        for size in BATCHES:
            if size <= len(measured[name]):
                out.add("union", name, measured[name][size - 1].mean, "share", x=size)
                independent = sum(one.independent[size - 1] for one in layers) / len(layers)
                out.add("union", f"{name}, if independent", independent, "share", x=size, n=layers[0].tokens)
    at = min(8, len(measured["neurons"]))
    unions = {name: one[at - 1].mean for name, one in measured.items()}
    groups_of_layer = bench.loaded.record.kv_heads
    out.notes.append(
        "heads stay sparse per sequence, since each sequence reads its own KV cache; the union says what shared weights"
        f" would cost. This model has {groups_of_layer} KV groups a layer."
    )
    out.conclude(
        f"at density {DENSITY:g} a batch of {at} needs {percent(unions['neurons'])} of the neurons and"
        f" {percent(unions['KV groups'])} of the {groups_of_layer} KV groups of a layer together; over {LOST:.0%}"
        " of the neurons means that their sparsity is lost, while heads are read per sequence and keep theirs.",
        above(unions["neurons"], LOST),
        unions["neurons"],
        "share",
    )
    return out


def _collect(bench: Bench) -> tuple[Counts, Counts]:
    """At how many of the positions, spread over each block, a neuron and a KV group is in the top-r mask."""
    places = torch.linspace(bench.sink_tokens, bench.block_length - 1, POSITIONS).long()
    chosen = torch.arange(len(bench.pool))[: 16 if bench.quick else 64]
    norms = [layer.down_norms(bench.loaded.record.intermediate_size) for layer in bench.loaded.sites.layers]
    neurons: list[list[Tensor]] = [[] for _ in norms]
    groups: list[list[Tensor]] = [[] for _ in norms]

    def on_neurons(site: Site, a: Tensor) -> None:
        scores = a[0, places].float().abs() * norms[site.layer].to(a.device)
        neurons[site.layer].append(firing_counts(topk_masks(scores, DENSITY)).cpu())

    def on_heads(site: Site, o: Tensor) -> None:
        masks = topk_masks(group_norms(bench, site.layer, o[0, places]), DENSITY)
        groups[site.layer].append(firing_counts(masks).cpu())

    with (
        bench.progress.task(f"{bench.name}: unions", len(chosen), "blocks") as advance,
        tapped(bench.loaded.sites, {SiteKind.NEURON: on_neurons, SiteKind.ATTN_OUT: on_heads}),
        torch.no_grad(),
    ):
        for block in chosen.tolist():
            bench.loaded.model.base_model(input_ids=bench.pool[block][None].to(bench.loaded.device), use_cache=False)
            advance(1)
    return torch.stack([torch.stack(rows) for rows in neurons]), torch.stack([torch.stack(rows) for rows in groups])


def group_norms(bench: Bench, layer: int, o: Tensor) -> Tensor:
    """||sum of a KV group's heads' outputs|| [tokens, kv_heads], from concatenated heads o [tokens, heads_width]."""
    record = bench.loaded.record
    weight = bench.loaded.sites.layers[layer].output_matrix(o.shape[1]).float()
    width = o.shape[1] // record.kv_heads
    parts = o.float().unflatten(1, (record.kv_heads, width))
    return torch.stack([(parts[:, g] @ weight[:, g * width : (g + 1) * width].T).norm(dim=1)
                        for g in range(record.kv_heads)], dim=1)  # fmt: skip
