"""R-Sparse: what is dropped passes through a low-rank copy of the weight (arXiv 2504.19449)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.masks import kept_count
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Fit
from actsparse.methods.channel_replay import ChannelReplay, Place
from actsparse.methods.channels import OF_MLP, ChannelMethod, Mode, column_norms
from actsparse.methods.gates import ChannelRule, LayerGates
from actsparse.results import LayerPlan, Unit

EXACT_SVD = 2048
OVERSAMPLED, POWER_STEPS = 16, 6


@dataclass(frozen=True, kw_only=True)
class RSparse(ChannelMethod):
    """y = W (x * m) + U_k (S_k V_k^T) (x * (1 - m)): m as in WINA, U_k S_k V_k^T the rank-k part of W.

    `rank_frac`: k as a share of the smaller side of W. The two thin matrices are read for every token and are charged.
    """

    mode: Mode = "topk"
    rank_frac: float = 0.05

    name = "rsparse"
    summary = "as wina, and the dropped channels through a low-rank copy of the weight"
    paper = "arXiv 2504.19449"

    def __post_init__(self) -> None:
        if not 0 < self.rank_frac < 0.5:
            raise PlanError(
                f"rsparse: rank_frac must be above 0 and below 0.5, not {self.rank_frac:g}",
                "it is the rank of the correction as a share of the smaller side of the weight",
            )

    def weights(self, replay: ChannelReplay) -> dict[Place, Tensor]:
        return column_norms(replay)

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        fit, replay = super().fit(calibration, budget), calibration.channels()
        tensors = dict(fit.tensors)
        dropping = {(one.layer, one.unit) for one, share in zip(fit.layers, fit.predicted_drop, strict=True) if share}
        for layer in replay.each_layer("factoring weights"):
            for unit in [unit for at, unit in dropping if at == layer]:
                outer, inner = low_rank(replay.matrix(layer, unit), self.rank_frac)
                tensors[_named(layer, unit, "outer")] = outer.to(replay.dtype).cpu().contiguous()
                tensors[_named(layer, unit, "inner")] = inner.to(replay.dtype).cpu().contiguous()
        return replace(fit, tensors=tensors)

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        gates = super().gates(layer, fit)
        charged = {unit: _bytes(rule.correction) for unit, rule in gates.rules.items()}
        mlp = sum(size for unit, size in charged.items() if unit in OF_MLP)
        return replace(gates, mlp_extra_bytes=mlp, attention_extra_bytes=sum(charged.values()) - mlp)

    def rule(self, entry: LayerPlan, fit: Fit) -> ChannelRule:
        rule = super().rule(entry, fit)
        outer = fit.tensors.get(_named(entry.layer, entry.unit, "outer"))
        if outer is None:
            return rule
        return replace(rule, correction=(outer, fit.tensors[_named(entry.layer, entry.unit, "inner")]))


def low_rank(weight: Float[Tensor, "out in"], rank_frac: float) -> tuple[Float[Tensor, "out k"], Float[Tensor, "in k"]]:
    """U_k and V_k S_k of the rank-k part of a weight; by randomised projections (seeded) where both sides are large."""
    rank = kept_count(rank_frac, min(weight.shape))
    if min(weight.shape) <= EXACT_SVD:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], vh[:rank].T * s[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, q=rank + OVERSAMPLED, niter=POWER_STEPS)
    return u[:, :rank], v[:, :rank] * s[:rank]


def _bytes(correction: tuple[Tensor, Tensor] | None) -> int:
    return 0 if correction is None else sum(one.numel() * one.element_size() for one in correction)


def _named(layer: int, unit: Unit, part: str) -> str:
    return f"layers.{layer}.{unit.value}.{part}"
