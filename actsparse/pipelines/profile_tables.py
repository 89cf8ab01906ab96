"""From recorded statistics to the rows of a profile's tables."""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from actsparse.core.cett import CettSolution
from actsparse.core.coactivation import CoActivation
from actsparse.core.routing import RouterSums
from actsparse.core.stats import gini
from actsparse.core.streaming import POSITION_EDGES, HeadSums, Moments, NeuronSums
from actsparse.core.token_sparsity import TokenSpread
from actsparse.pipelines.profile_state import ProfileState
from actsparse.results import SHARED_EXPERT, HeadRow, Measure, NeuronRow, Site, SiteKind, param

QUANTILES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.99)
DEAD, HOT = 0.001, 0.5


def measure_rows(
    state: ProfileState, cett: dict[int, CettSolution], together: dict[int, CoActivation]
) -> list[Measure]:
    """The rows of `measures.parquet`."""
    rows = [Measure(metric="tokens", value=float(state.tokens), unit="tokens", n=state.tokens)]
    for site, moments in state.moments.items():
        rows += _moment_rows(site, moments)
    for layer in state.layers:
        rows += _ffn_measures(layer, state)
        rows += _head_measures(layer, state.heads[layer])
        if layer in cett:
            rows += _cett_rows(layer, cett[layer])
            rows += _together_rows(layer, together[layer])
    return rows


def neuron_rows(state: ProfileState, down_norms: dict[int, Tensor]) -> list[NeuronRow]:
    """The rows of `neurons.parquet`; `down_norms` [neurons] of every FFN."""
    return [
        NeuronRow(layer=layer, expert=expert, neuron=neuron, tokens=state.neurons[place].tokens, **values)
        for place, (layer, expert) in state.ffns.items()
        for neuron, values in enumerate(_per_neuron(state.neurons[place], down_norms[place]))
    ]


def head_rows(state: ProfileState) -> list[HeadRow]:
    """The rows of `heads.parquet`: heads, then KV groups, layer by layer."""
    return [
        HeadRow(layer=layer, unit=unit, index=index, mean_norm=norm / max(1, sums.tokens), share=norm / total)
        for layer, sums in state.heads.items()
        for unit, norms in (("head", sums.heads), ("group", sums.groups))
        for total in [float(norms.sum()) or 1.0]
        for index, norm in enumerate(norms.tolist())
    ]


def _moment_rows(site: Site, moments: Moments) -> list[Measure]:
    """Of the entries that are numbers; those that are not are counted."""
    n, lost = moments.finite, float(moments.not_finite)
    broken = [_row(site, "not_finite", lost, moments.count, unit="entries")] if lost else []
    if lost and not n:
        return broken
    mean, mean_square = moments.total / max(1, n), moments.total_square / max(1, n)
    values = {
        "abs_mean": moments.total_abs / max(1, n),
        "rms": sqrt(mean_square),
        "mean": mean,
        "std": sqrt(max(0.0, mean_square - mean**2)),
        "abs_max": moments.largest,
    }
    rows = [_row(site, metric, value, n) for metric, value in values.items()]
    rows.append(_row(site, "zero_frac", moments.histogram.zeros / max(1, n), n, unit="share"))
    return (
        rows
        + broken
        + [
            _row(site, "abs_quantile", moments.histogram.quantile(share), n, param=param(s=share))
            for share in QUANTILES
        ]
    )


def _ffn_measures(layer: int, state: ProfileState) -> list[Measure]:
    """The rows of a layer's neurons; of a mixture, of every expert and of the router."""
    rows: list[Measure] = []
    for place, (owner, expert) in state.ffns.items():
        if owner == layer and (expert is None or expert == SHARED_EXPERT):
            site = Site(layer=layer, kind=SiteKind.NEURON, expert=expert)
            whole = site not in state.moments or not state.moments[site].not_finite
            rows += _neuron_measures(site, state.neurons[place], whole=whole)
        elif owner == layer and expert is not None:
            rows += _expert_measures(layer, expert, state.neurons[place], state.routers[layer])
    if layer in state.routers:
        router, site = state.routers[layer], Site(layer=layer, kind=SiteKind.ROUTER)
        rows.append(_row(site, "router_entropy", router.entropy, router.tokens, unit="nats", stderr=router.stderr))
    return rows


def _expert_measures(layer: int, expert: int, sums: NeuronSums, router: RouterSums) -> list[Measure]:
    """How often an expert is chosen, and how unevenly its neurons fire over the tokens that it serves."""
    where, n = param(expert=expert), router.tokens
    share = sums.tokens / max(1, n)
    rows = [
        _row(
            Site(layer=layer, kind=SiteKind.ROUTER), "expert_frac", share, n, param=where, unit="share",
        )
    ]  # fmt: skip
    if sums.tokens:
        site, active = Site(layer=layer, kind=SiteKind.NEURON), sums.active.double() / sums.tokens
        rows.append(_row(site, "neuron_gini", gini(active), sums.tokens, param=where))
        for metric, share in (("dead_frac", active < DEAD), ("hot_frac", active > HOT)):
            rows.append(_row(site, metric, float(share.double().mean()), sums.tokens, param=where, unit="share"))
    return rows


def _neuron_measures(site: Site, sums: NeuronSums, *, whole: bool) -> list[Measure]:
    """`whole`: every entry was a number; else zeros by position are not told, which hold the others too."""
    active = sums.active.double() / max(1, sums.tokens)
    n = len(active)
    rows = [
        _row(site, "neuron_gini", gini(active), n),
        _row(site, "dead_frac", float((active < DEAD).double().mean()), n, unit="share"),
        _row(site, "hot_frac", float((active > HOT).double().mean()), n, unit="share"),
    ]
    for i, start in enumerate(POSITION_EDGES):
        seen = int(sums.position_tokens[i])
        if seen:
            stop = POSITION_EDGES[i + 1] if i + 1 < len(POSITION_EDGES) else 2 * start
            where = param(from_=start, to=stop)
            entries = seen * n
            rms = sqrt(float(sums.position_square[i]) / entries)
            zeros = float(sums.position_zeros[i]) / entries
            rows.append(_row(site, "position_rms", rms, entries, param=where))
            if whole:
                rows.append(_row(site, "position_zero_frac", zeros, entries, param=where, unit="share"))
    return rows


def spread_rows(by_layer: dict[int, TokenSpread], target: float) -> list[Measure]:
    """How sparsity at a CETT level spreads over tokens, and how it moves with their position, over the sample."""
    rows: list[Measure] = []
    for layer, found in by_layer.items():
        site, where = Site(layer=layer, kind=SiteKind.NEURON), param(target=target)
        for metric, value in (("cett_sparsity_p10", found.low), ("cett_sparsity_p90", found.high)):
            rows.append(_row(site, metric, value, found.tokens, param=where, unit="share"))
        for one in found.by_position:
            span = param(from_=one.start, to=one.stop)
            rows.append(_row(site, "position_sparsity", one.share, one.tokens, param=span, unit="share"))
    return rows


def _head_measures(layer: int, sums: HeadSums) -> list[Measure]:
    site = Site(layer=layer, kind=SiteKind.ATTN_OUT)
    return [
        _row(site, "head_gini", gini(norms), len(norms), param=param(unit=unit))
        for unit, norms in (("head", sums.heads), ("group", sums.groups))
    ]


def _cett_rows(layer: int, solution: CettSolution) -> list[Measure]:
    site = Site(layer=layer, kind=SiteKind.NEURON)
    rows: list[Measure] = []
    for target, point in solution.targets.items():
        where = param(target=target)
        rows.append(
            _row(site, "cett_sparsity", point.sparsity, point.tokens, param=where, unit="share",
                 stderr=point.sparsity_stderr)
        )  # fmt: skip
        rows.append(_row(site, "cett_eps", point.eps, point.tokens, param=where))
    for point in solution.curve:
        where = param(sparsity=round(point.sparsity, 4))
        rows.append(_row(site, "cett_curve", point.cett, point.tokens, param=where, stderr=point.cett_stderr))
    if solution.rho is not None:
        rows.append(_row(site, "cett_rho", solution.rho, solution.tokens))
    return rows


def _together_rows(layer: int, found: CoActivation) -> list[Measure]:
    site, phi = Site(layer=layer, kind=SiteKind.NEURON), found.phi()
    where = param(hottest=len(found.neurons))
    return [] if phi is None else [_row(site, "coactivation_phi", phi, found.tokens, param=where)]


def cett_means(rows: Sequence[Measure]) -> list[Measure]:
    """Mean CETT sparsity over the recorded layers, for every target; from the layers' rows."""
    by_target: dict[str, list[Measure]] = {}
    for row in rows:
        if row.metric == "cett_sparsity" and row.value is not None:
            by_target.setdefault(row.param, []).append(row)
    return [
        Measure(metric="cett_sparsity", kind=SiteKind.NEURON, param=where, unit="share", n=layers[0].n,
                value=sum(row.value for row in layers if row.value is not None) / len(layers))
        for where, layers in by_target.items()
    ]  # fmt: skip


def _per_neuron(sums: NeuronSums, norms: Tensor) -> list[dict[str, float]]:
    tokens, rows = max(1, sums.tokens), max(1, sums.rows)
    mean_abs = sums.total_abs / tokens
    columns = {
        "active_frac": sums.active.double() / tokens,
        "nonzero_frac": sums.nonzero.double() / tokens,
        "mean_abs": mean_abs,
        "max_abs": sums.largest,
        "mean_norm": mean_abs * norms.double(),
        "griffin": (sums.share_square / rows).sqrt(),
        "mean": sums.total / tokens,
        "mean_square_up": sums.square_up / tokens,
    }
    table = torch.stack(list(columns.values()), dim=1).tolist()
    return [dict(zip(columns, values, strict=True)) for values in table]


def _row(
    site: Site, metric: str, value: float, n: int, *, param: str = "", unit: str = "1", stderr: float | None = None
) -> Measure:
    return Measure(
        metric=metric, layer=site.layer, kind=site.name, param=param, value=value, unit=unit, n=n, stderr=stderr
    )
