"""Static pruning: one mask for all text, the control that every prompt method must beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from actsparse.core.masks import top_mask
from actsparse.methods.base import Budget, Calibration, Decides, Fit, Method, counted_fit, counted_layers
from actsparse.methods.coreinfer import TOKEN_FRAC, CoreShare, check_token_frac
from actsparse.methods.gates import FixedGate, LayerGates
from actsparse.methods.prompt_statistic import PromptReading, Source
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Static(Method):
    """The top r*f neurons of each layer on calibration text by mean |a|*||w|| (`mean_n`), by GRIFFIN's statistic
    (`griffin`, of `source` as in griffin and tda), or by how often a neuron is among a token's strongest (`coreinfer`,
    with its `token_frac`)."""

    stat: Literal["mean_n", "griffin", "coreinfer"] = "mean_n"
    source: Source = "a"
    token_frac: float = TOKEN_FRAC

    name = "static"
    summary = "top neurons of the calibration text, one mask for everything"
    paper = "control"
    decides = Decides.OFFLINE
    needs = ()
    is_control = True
    serves_experts = True
    needs_statistics = True

    def __post_init__(self) -> None:
        check_token_frac(self.token_frac, self.name)

    @property
    def needs_replay(self) -> bool:
        return self.stat == "coreinfer" or (self.stat == "griffin" and self.source != "a")

    def check(self, gated: bool) -> None:
        super().check(gated)
        self.reading.check(self.name, gated)

    @property
    def reading(self) -> PromptReading:
        """What GRIFFIN's statistic reads."""
        return PromptReading(source=self.source)

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        layers = counted_layers(budget, self.name, calibration.widths)
        scores = self._scores(calibration)
        masks = {f"layers.{one.layer}.mask": top_mask(scores[one.layer], one.kept or one.width) for one in layers}
        return counted_fit(layers, masks)

    def _scores(self, calibration: Calibration) -> Sequence[Tensor]:
        places = range(len(calibration.widths))
        if self.stat == "coreinfer":
            return calibration.pooled(SiteKind.NEURON, [CoreShare(self.token_frac) for _ in places])
        if self.stat == "griffin" and self.source != "a":
            norms = [calibration.down_norms(place) if self.source == "n" else None for place in places]
            return calibration.pooled(self.reading.site, [self.reading.statistic(one) for one in norms])
        means = [calibration.means(place) for place in places]
        return [one.griffin if self.stat == "griffin" else one.mean_norm for one in means]

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        return LayerGates(neurons=FixedGate(fit.tensors[f"layers.{layer}.mask"]))
