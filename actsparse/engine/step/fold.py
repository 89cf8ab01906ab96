"""From the work of every layer to one of the plans that CUDA kernels run, where all layers do the same."""

import torch
from torch import Tensor

from actsparse.engine.step.plans import DensePlan, IndexedPlan, InputPlan, InputScores, NeuronPlan, Plan
from actsparse.engine.step.translate import NoStepError, Translator
from actsparse.engine.step.weights import InputRows
from actsparse.engine.step.work import Channels, Decided, GatePlan, LayerWork, Listed
from actsparse.results import Unit

ORDER = ("q", "k", "v", "o", "gate", "up", "down")


def fold(plan: GatePlan, translator: Translator, batch: int) -> Plan:
    """The plan that does the same as `plan`; raises NoStepError where the kernels have none."""
    layers = plan.layers
    if any(work.heads for work in layers):
        raise NoStepError("heads that are skipped have no CUDA step yet")
    if all(work.mlp is None and not work.channels for work in layers):
        return DensePlan()
    if all(isinstance(work.mlp, Listed) and not work.channels for work in layers):
        return _indexed(plan, translator, batch)
    if all(isinstance(work.mlp, Decided) and not work.channels for work in layers):
        return _neurons([work.mlp for work in layers if isinstance(work.mlp, Decided)], translator)
    if all(work.mlp is None for work in layers):
        return _inputs(layers, translator)
    raise NoStepError("layers that are sparse in different ways have no CUDA step yet")


def _indexed(plan: GatePlan, translator: Translator, batch: int) -> IndexedPlan:
    if plan.selection is None or any(work.mlp is not None and work.mlp.fill is not None for work in plan.layers):
        raise NoStepError("neurons that are filled in have no CUDA step yet")
    if batch > 1:
        raise NoStepError("sequences with neurons of their own have no CUDA step yet")
    return IndexedPlan(down_rows=translator.stacked(Unit.DOWN), selection=plan.selection)


def _neurons(found: list[Decided], translator: Translator) -> NeuronPlan:
    if any(one.fill is not None for one in found):
        raise NoStepError("neurons that are filled in have no CUDA step yet")
    if len({(one.gate_first, one.threshold.numel()) for one in found}) > 1:
        raise NoStepError("layers whose thresholds differ in kind have no CUDA step yet")
    return NeuronPlan(
        threshold=torch.stack([one.threshold for one in found]),
        down_rows=translator.stacked(Unit.DOWN),
        first="gate" if found[0].gate_first else "up",
    )


def _inputs(layers: tuple[LayerWork, ...], translator: Translator) -> InputPlan:
    rules = [rule for work in layers for rule in work.channels.values()]
    if any(rule.top or rule.basis is not None or rule.correction is not None for rule in rules):
        raise NoStepError("top-k, rotated and corrected channels have no CUDA step yet")
    rows = InputRows(
        qkv=translator.stacked(Unit.QKV),
        out=translator.stacked(Unit.O),
        gate_up=translator.stacked(Unit.GATE_UP),
        down=translator.stacked(Unit.DOWN),
    )
    thresholds = torch.zeros(len(layers), len(ORDER), device=translator.weights.device)
    for layer, work in enumerate(layers):
        for name, rule in work.channels.items():
            if rule.threshold is not None:
                thresholds[layer, ORDER.index(name)] = rule.threshold[0]
    scores = _scores(layers, translator) if any(rule.score is not None for rule in rules) else None
    return InputPlan(weights=rows, threshold=thresholds, scores=scores)


def _scores(layers: tuple[LayerWork, ...], translator: Translator) -> InputScores:
    shape, device = translator.weights.shape, translator.weights.device
    widths = dict.fromkeys(("q", "k", "v", "gate", "up"), shape.width) | {"o": shape.query_width, "down": shape.neurons}

    def stacked(*names: str) -> Tensor:
        return torch.stack(
            [torch.stack([_score(work.channels.get(n), widths[n], device) for n in names]) for work in layers]
        )

    return InputScores(
        qkv=stacked("q", "k", "v"), out=stacked("o"), gate_up=stacked("gate", "up"), down=stacked("down")
    )


def _score(rule: Channels | None, width: int, device: torch.device) -> Tensor:
    return torch.ones(width, device=device) if rule is None or rule.score is None else rule.score
