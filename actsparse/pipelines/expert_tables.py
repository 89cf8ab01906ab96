"""CETT and co-activation of the experts of a mixture: each a feed-forward network over the tokens that it serves.

An expert's CETT is relative to its own output. The router weighs an expert's output as a whole, so its weight cancels.
A layer's rows are means over its routed experts, weighted by how many tokens each serves. Our own definition.
"""

from dataclasses import dataclass

from actsparse.core.cett import CettLayer, CettPoint, CettSolution
from actsparse.core.coactivation import CoActivation, co_activation
from actsparse.core.streaming import ACTIVE_DENSITY
from actsparse.models.load import LoadedModel
from actsparse.pipelines.profile_state import ProfileState
from actsparse.results import SHARED_EXPERT, Measure, SiteKind, param

SHARED_NAME = "shared"


@dataclass(frozen=True)
class SolvedExpert:
    """What was solved on the sample of one expert; `tokens`: how many it served in the whole text."""

    layer: int
    expert: int
    tokens: int
    cett: CettSolution
    together: CoActivation

    @classmethod
    def of(cls, place: int, loaded: LoadedModel, state: ProfileState, targets: tuple[float, ...]) -> "SolvedExpert":
        """Solve the expert at this place of the model's FFNs."""
        layer, expert = state.ffns[place]
        assert expert is not None
        ffn, sums = loaded.sites.ffns[place], state.neurons[place]
        down = ffn.down_matrix()
        sample, texts = state.experts[place].rows(place).to(down.device), state.experts[place].texts
        together = co_activation(sample, ffn.down_norms(), sums.active, density=ACTIVE_DENSITY)
        return cls(layer, expert, sums.tokens, CettSolution.of(CettLayer.of(sample, down, texts), targets), together)


def expert_rows(found: list[SolvedExpert]) -> list[Measure]:
    """The rows of every expert, then of each layer's routed experts together."""
    rows = [row for one in found for row in _own_rows(one)]
    for layer in sorted({one.layer for one in found}):
        routed = [one for one in found if one.layer == layer and one.expert != SHARED_EXPERT and one.cett.targets]
        rows += _layer_rows(layer, routed) if routed else []
    return rows


def _own_rows(one: SolvedExpert) -> list[Measure]:
    name = SHARED_NAME if one.expert == SHARED_EXPERT else one.expert
    rows: list[Measure] = []
    for target, point in one.cett.targets.items():
        where = param(expert=name, target=target)
        rows.append(_row("expert_cett_sparsity", one.layer, where, point.sparsity, point, point.sparsity_stderr))
        rows.append(_row("expert_cett_eps", one.layer, where, point.eps, point))
    n, phi = one.cett.tokens, one.together.phi()
    for metric, value in (("expert_cett_rho", one.cett.rho), ("expert_coactivation_phi", phi)):
        if value is not None:
            rows.append(_measure(metric, one.layer, param(expert=name), value, n))
    return rows


def _layer_rows(layer: int, routed: list[SolvedExpert]) -> list[Measure]:
    weights = [one.tokens / sum(each.tokens for each in routed) for one in routed]
    rows: list[Measure] = []
    for target in routed[0].cett.targets:
        mean = _mean([one.cett.targets[target] for one in routed], weights)
        rows.append(_row("cett_sparsity", layer, param(target=target), mean.sparsity, mean, mean.sparsity_stderr))
    for points in zip(*(one.cett.curve for one in routed), strict=True):
        mean = _mean(list(points), weights)
        where = param(sparsity=round(mean.sparsity, 4))
        rows.append(_row("cett_curve", layer, where, mean.cett, mean, mean.cett_stderr))
    rho = [weight * one.cett.rho for one, weight in zip(routed, weights, strict=True) if one.cett.rho is not None]
    rows.append(_measure("cett_rho", layer, "", sum(rho), sum(one.cett.tokens for one in routed)))
    return rows


def _mean(points: list[CettPoint], weights: list[float]) -> CettPoint:
    """The weighted mean, its error as if experts' samples were independent."""

    def over(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def error(values: list[float | None]) -> float | None:
        known = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
        return sum(one**2 for one in known) ** 0.5 if len(known) == len(values) else None

    return CettPoint(
        eps=over([one.eps for one in points]),
        cett=over([one.cett for one in points]),
        sparsity=over([one.sparsity for one in points]),
        tokens=sum(one.tokens for one in points),
        cett_stderr=error([one.cett_stderr for one in points]),
        sparsity_stderr=error([one.sparsity_stderr for one in points]),
    )


def _row(metric: str, layer: int, where: str, value: float, point: CettPoint, stderr: float | None = None) -> Measure:
    unit = "share" if metric.endswith("sparsity") else "1"
    return _measure(metric, layer, where, value, point.tokens, unit=unit, stderr=stderr)


def _measure(
    metric: str, layer: int, where: str, value: float, n: int, *, unit: str = "1", stderr: float | None = None
) -> Measure:
    return Measure(
        metric=metric, layer=layer, kind=SiteKind.NEURON, param=where, value=value, unit=unit, n=n, stderr=stderr
    )
