"""S4: how many neurons, and how many KV groups, a batch of sequences needs together (methods.md, sections 6 and 8)."""

from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from actsparse.core.batch_union import BatchUnion, batch_union
from actsparse.core.bootstrap import Interval
from actsparse.core.overlap import topk_masks
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


def batch_unions(bench: Bench) -> Outcome:
    """Union density of batches of 1 to 64 tokens of different sequences, for neurons and for KV groups."""
    out = Outcome(S4, bench.quick, settings={"density": f"{DENSITY:g}"})
    out.panel("union", "Share that a batch needs together", PanelKind.LINE, "batch size", "share of units", log_x=True,
              reference=1.0)  # fmt: skip
    neurons, groups, labels = _collect(bench)
    found = {"neurons": _unions(neurons, labels), "KV groups": _unions(groups, labels)}
    for name, layers in found.items():
        for size in BATCHES:
            if size <= len(layers[0].measured):
                out.add("union", name, _over_layers(layers, lambda one, b=size: one.measured[b - 1]), "share", x=size)
                out.add("union", f"{name}, if independent",
                        _over_layers(layers, lambda one, b=size: one.independent[b - 1]), "share", x=size)  # fmt: skip
    at = min(8, len(found["neurons"][0].measured))
    unions = {
        name: without_one(masks, labels, at, _over_layers(found[name], lambda one: one.measured[at - 1]))
        for name, masks in (("neurons", neurons), ("KV groups", groups))
    }
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


def without_one(masks: Bool[Tensor, "layers tokens units"], labels: Tensor, batch: int, union: Interval) -> Interval:
    """A union density with its 95 % interval over sequences: each is left out once (jackknife), since drawing them
    with replacement would count a sequence twice in a batch and make unions smaller. Without two more sequences than
    a batch takes there is no interval."""
    sequences = labels.unique().tolist()
    if union.value is None or len(sequences) < batch + 2:
        return union
    values = torch.tensor(
        [
            sum(
                batch_union(layer[labels != out], labels[labels != out], max_batch=batch).measured[batch - 1]
                for layer in masks
            )
            / len(masks)
            for out in sequences
        ],
        dtype=torch.float64,
    )
    count = len(sequences)
    stderr = float(((values - values.mean()).square().sum() * (count - 1) / count).sqrt())
    low, high = max(0.0, union.value - 1.96 * stderr), min(1.0, union.value + 1.96 * stderr)
    return Interval(value=union.value, low=low, high=high, n=count, stderr=stderr)


def _unions(masks: Bool[Tensor, "layers tokens units"], labels: Tensor) -> list[BatchUnion]:
    return [batch_union(one, labels, max_batch=BATCHES[-1]) for one in masks]


def _over_layers(layers: list[BatchUnion], read: Callable[[BatchUnion], float]) -> Interval:
    values = torch.tensor([read(one) for one in layers], dtype=torch.float64)
    return Interval(value=float(values.mean()), low=None, high=None, n=layers[0].tokens, stderr=None)


def _collect(bench: Bench) -> tuple[Tensor, Tensor, Tensor]:
    """Top-r masks of neurons and of KV groups [layers, tokens, units] at positions spread over blocks, and each token's
    block."""
    places = torch.linspace(bench.sink_tokens, bench.block_length - 1, POSITIONS).long()
    chosen = torch.arange(len(bench.pool))[: 16 if bench.quick else 64]
    norms = [layer.down_norms(bench.loaded.record.intermediate_size) for layer in bench.loaded.sites.layers]
    neurons: list[list[Tensor]] = [[] for _ in norms]
    groups: list[list[Tensor]] = [[] for _ in norms]

    def on_neurons(site: Site, a: Tensor) -> None:
        scores = a[0, places].float().abs() * norms[site.layer].to(a.device)
        neurons[site.layer].append(topk_masks(scores, DENSITY).cpu())

    def on_heads(site: Site, o: Tensor) -> None:
        groups[site.layer].append(topk_masks(group_norms(bench, site.layer, o[0, places]), DENSITY).cpu())

    with (
        bench.progress.task(f"{bench.name}: unions", len(chosen), "blocks") as advance,
        tapped(bench.loaded.sites, {SiteKind.NEURON: on_neurons, SiteKind.ATTN_OUT: on_heads}),
        torch.no_grad(),
    ):
        for block in chosen.tolist():
            bench.loaded.model.base_model(input_ids=bench.pool[block][None].to(bench.loaded.device), use_cache=False)
            advance(1)
    labels = torch.arange(len(chosen)).repeat_interleave(POSITIONS)
    return torch.stack([torch.cat(rows) for rows in neurons]), torch.stack([torch.cat(rows) for rows in groups]), labels


def group_norms(bench: Bench, layer: int, o: Tensor) -> Tensor:
    """||sum of a KV group's heads' outputs|| [tokens, kv_heads], from concatenated heads o [tokens, heads_width]."""
    record = bench.loaded.record
    weight = bench.loaded.sites.layers[layer].output_matrix(o.shape[1]).float()
    width = o.shape[1] // record.kv_heads
    parts = o.float().unflatten(1, (record.kv_heads, width))
    return torch.stack([(parts[:, g] @ weight[:, g * width : (g + 1) * width].T).norm(dim=1)
                        for g in range(record.kv_heads)], dim=1)  # fmt: skip
