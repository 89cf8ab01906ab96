"""How well masks can be known beforehand: recall and regret of trained routers against static and previous-token masks
(Pitfalls' predictors), and the predictability gap HU3 (methods.md, sections 3 and 5).

    recall     = |mask n oracle| / min(k, |oracle|)       oracle: a token's top k by |a|*||w||, zeros never in it
    corrected  = (recall - k/f) / (1 - k/f)               0 is chance
    regret     = rel_err(mask) - rel_err(oracle)          error of the MLP output on dense inputs
    HU3        = recall on held-out text of the same domain - recall on another domain
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.bootstrap import (
    Interval,
    LayerIntervals,
    bootstrap_mean,
    interval,
    layer_intervals,
    resample_weights,
)
from actsparse.core.ladder import token_shuffled
from actsparse.core.masks import kept_count
from actsparse.core.overlap import topk_masks
from actsparse.core.router_training import corrected
from actsparse.data.sequences import Sequences
from actsparse.engine.gating import PlanState, SiteValues
from actsparse.engine.masked import relative_errors
from actsparse.engine.points import visited
from actsparse.methods.base import Calibration
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.methods.plan import Plan, fit_plan
from actsparse.methods.short import parse
from actsparse.methods.trained_method import TrainedMethod
from actsparse.models.load import LoadedModel
from actsparse.pipelines.progress import Progress
from actsparse.results import Unit

INPUTS = ("sequential", "parallel", "lookahead")
STATIC, PREVIOUS, ORACLE = "static", "previous-token", "oracle"


@dataclass(frozen=True)
class SeriesScores:
    """What masks of one kind reached, [layers, blocks] means over tokens; NaN where a layer has no such mask.

    `kept` of `neurons` units a mask has.
    """

    recall: Float[Tensor, "layers blocks"]
    error: Float[Tensor, "layers blocks"]
    regret: Float[Tensor, "layers blocks"]
    kept: int
    neurons: int

    def recalls(self) -> LayerIntervals:
        """Recall by layer and in the mean, with intervals by bootstrap over blocks."""
        return _intervals(self.recall)

    def corrected_recalls(self) -> LayerIntervals:
        """Recall corrected for chance."""
        return _intervals(self.recall.clone().apply_(lambda value: corrected(value, self.kept, self.neurons)))

    def regrets(self) -> LayerIntervals:
        """Relative error of the MLP output above the oracle's."""
        return _intervals(self.regret)

    def within(self, layers: Collection[int]) -> "SeriesScores":
        """The same in some layers, NaN in the others, so that means of several series are over the same layers."""
        out = torch.tensor([layer not in layers for layer in range(len(self.recall))])[:, None]
        recall, error, regret = (part.masked_fill(out, torch.nan) for part in (self.recall, self.error, self.regret))
        return replace(self, recall=recall, error=error, regret=regret)


@dataclass(frozen=True, kw_only=True)
class PredictabilityGap:
    """HU3 of one router: recall (corrected for chance, mean over layers) on three texts, and the gap."""

    same: Interval
    other: Interval
    shuffled: Interval
    hu3: Interval


def fit_plans(
    loaded: LoadedModel,
    calibration: Calibration,
    density: float,
    *,
    options: str = "",
    inputs: Sequence[str] = INPUTS,
    static: str = "static:stat=mean_n",
) -> dict[str, Plan]:
    """Plans of routers for each input and of the static mask, all keeping `density`, fitted on the calibration text.

    `options` are further options of `dejavu`, such as `epochs=1,layers=0-3`.
    """
    drop = 1 - density
    extra = f",{options}" if options else ""
    texts = {name: f"dejavu:input={name}{extra}@{drop:.12g}" for name in inputs} | {STATIC: f"{static}@{drop:.12g}"}
    gated, step = loaded.record.gated, loaded.record.step
    return {name: fit_plan(parse(text), calibration, step, gated=gated)[0] for name, text in texts.items()}


def fit_series(
    loaded: LoadedModel,
    calibration: Calibration,
    density: float,
    *,
    options: str = "",
    inputs: Sequence[str] = INPUTS,
) -> dict[str, list[LayerGates]]:
    """The gates of `fit_plans`."""
    plans = fit_plans(loaded, calibration, density, options=options, inputs=inputs)
    return {name: plan.gates() for name, plan in plans.items()}


def still_rising(plan: Plan) -> list[int]:
    """The layers whose router was best after the last epoch that it was given: more training could find more."""
    assert isinstance(plan.method, TrainedMethod)
    return [one.layer for one in plan.fit.layers if one.epoch == plan.method.epochs]


def score_series(
    loaded: LoadedModel,
    series: Mapping[str, Sequence[LayerGates]],
    blocks: Sequences,
    density: float,
    prompt_length: int,
    progress: Progress,
) -> dict[str, SeriesScores]:
    """Recall and regret of every series, of the previous token's oracle mask and of the oracle itself, at positions
    P..S-2 of every block, on dense activations. A layer in which a router keeps everything has none."""
    layers, width = loaded.record.layers, loaded.record.intermediate_size
    kept = kept_count(density, width)
    names = [*series, PREVIOUS, ORACLE]
    found = {name: torch.full((2, layers, len(blocks)), torch.nan, dtype=torch.float64) for name in names}
    norms = [layer.down_matrix(width).float().norm(dim=0) for layer in loaded.sites.layers]
    with progress.task("scoring routers", blocks.tokens, "tokens") as advance, torch.no_grad():
        for index, ids in enumerate(blocks.ids):
            states = {
                name: PlanState(gates, prompt_length=prompt_length, sink_tokens=blocks.record.sink_tokens)
                for name, gates in series.items()
            }

            def visit(
                _unit: Unit,
                layer: int,
                a: Tensor,
                values: SiteValues,
                states: Mapping[str, PlanState] = states,
                index: int = index,
            ) -> None:
                scores = a.abs().float() * norms[layer]
                oracle = topk_masks(scores, kept / width) & (scores > 0)
                masks = _masks(states, layer, a, values, prompt_length)
                masks |= {PREVIOUS: oracle[:, prompt_length - 1 : -1], ORACLE: oracle[:, prompt_length:]}
                down = loaded.sites.layers[layer].down_matrix(width)
                for name, mask in masks.items():
                    errors = relative_errors(a[:, prompt_length:], mask, down)
                    found[name][0, layer, index] = _recall(mask, oracle[:, prompt_length:], kept)
                    found[name][1, layer, index] = float(errors.double().mean())

            with visited(loaded.sites, list(series.values()), visit):
                loaded.model.base_model(input_ids=ids[None, :-1].to(loaded.device), use_cache=False)
            advance(len(ids))
    best = found[ORACLE][1]
    return {name: SeriesScores(recall, error, error - best, kept, width) for name, (recall, error) in found.items()}


def predictability_gap(
    loaded: LoadedModel,
    router: Sequence[LayerGates],
    same: Sequences,
    other: Sequences,
    density: float,
    prompt_length: int,
    progress: Progress,
    *,
    seed: int = 0,
) -> PredictabilityGap:
    """HU3: corrected recall of a router on held-out text of its own domain, on another domain, and on the same tokens
    with their histories shuffled (the tokens of each block after the sink tokens in random order)."""

    def mean_recalls(text: Sequences) -> Float[Tensor, " blocks"]:
        scores = score_series(loaded, {"router": router}, text, density, prompt_length, progress)["router"]
        recall = scores.recall.nanmean(dim=0)
        return recall.apply_(lambda value: corrected(value, scores.kept, scores.neurons))

    shuffled = replace(same, ids=tuple(token_shuffled(same.stack(), seed=seed)))
    recalls = {"same": mean_recalls(same), "other": mean_recalls(other), "shuffled": mean_recalls(shuffled)}
    return PredictabilityGap(
        same=bootstrap_mean(recalls["same"]),
        other=bootstrap_mean(recalls["other"]),
        shuffled=bootstrap_mean(recalls["shuffled"]),
        hu3=_unpaired_difference(recalls["same"], recalls["other"]),
    )


def _masks(
    states: Mapping[str, PlanState], layer: int, a: Tensor, values: SiteValues, prompt_length: int
) -> dict[str, Bool[Tensor, "batch seq neurons"]]:
    """The masks of every series in a layer, without those that keep everything."""
    found: dict[str, Tensor] = {}
    for name, state in states.items():
        state.observe(layer, values, 0)
        gate = state.gates[layer].neurons
        edit = state.edit(Unit.NEURON, layer, a, values, slice(prompt_length, a.shape[1]))
        if edit is not None and not (isinstance(gate, FixedGate) and bool(gate.mask.all())):
            found[name] = edit.mask
    return found


def _recall(mask: Bool[Tensor, "1 seq neurons"], oracle: Bool[Tensor, "1 seq neurons"], kept: int) -> float:
    """Mean over tokens of |mask n oracle| / min(k, |oracle|); tokens whose oracle is empty are skipped."""
    hits, size = (mask & oracle).sum(dim=-1).double(), oracle.sum(dim=-1).clamp(max=kept)
    used = size > 0
    return float((hits[used] / size[used]).mean()) if bool(used.any()) else float("nan")


def _intervals(values: Float[Tensor, "layers blocks"]) -> LayerIntervals:
    """Means over blocks by layer, and of the layers that have a value; all share the resamples."""
    defined = values.isfinite()
    weights = resample_weights(values.shape[1])
    sums, counts = torch.where(defined, values, 0.0), defined.double()
    samples = (weights @ sums.mT) / (weights @ counts.mT)
    return layer_intervals(sums.sum(dim=1) / counts.sum(dim=1), samples, values.shape[1])


def _unpaired_difference(first: Float[Tensor, " blocks"], second: Float[Tensor, " blocks"]) -> Interval:
    """The difference of means of two independent samples of blocks, each resampled by itself."""
    samples = [
        (resample_weights(len(values), seed=seed) @ values.double()) / len(values)
        for seed, values in enumerate((first, second))
    ]
    return interval(float(first.mean() - second.mean()), samples[0] - samples[1], min(len(first), len(second)))
