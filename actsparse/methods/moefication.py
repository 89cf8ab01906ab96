"""MoE-fication: the neurons of an FFN as equal experts, of which a router chooses (arXiv 2110.01786).

Rows of the gate projection (of the first one without a gate), L2-normalised, are clustered into balanced experts.
`routing=token` chooses for every token (RIDA in MOYU's terms), `routing=sequence` once, from the mean score of the
prompt (sRIDA), `routing=static` once for all text, from the mean score of the calibration text (the control of sRIDA).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from actsparse.core.balanced import balanced_kmeans, group_sizes
from actsparse.core.masks import top_mask
from actsparse.core.router_training import Examples, RouterWeights, soft_bce
from actsparse.errors import PlanError
from actsparse.methods.base import Budget, Calibration, Decides, Fit, counted_layers
from actsparse.methods.experts import CentroidScores, Experts, ExpertScores, MeanScores, PositiveSum, TrainedScores
from actsparse.methods.gates import FixedGate, LayerGates, PrefillGate, TokenGate
from actsparse.methods.trained_method import (
    Lesson,
    TrainedMethod,
    check_router,
    chosen_layers,
    judged_plan,
    read_routers,
    router_of,
    router_tensors,
    tensor_of,
    train_routers,
)
from actsparse.methods.training import LayerPairs, Training
from actsparse.results import LayerPlan, SiteKind


@dataclass(frozen=True, kw_only=True)
class MoEfication(TrainedMethod):
    """Whole experts of `neurons` neurons, best first, until at least r*f neurons are kept.

    `router`: `centroid` compares the input with the centre of an expert's rows, `mlp` is trained to predict the sum of
    an expert's positive activations, `oracle` knows that sum. `score=abs` takes |a| in place of positive a (ours): in a
    gated FFN negative activations write as much.
    """

    neurons: int = 32
    routing: Literal["token", "sequence", "static"] = "token"
    router: Literal["centroid", "mlp", "oracle"] = "centroid"
    score: Literal["positive", "abs"] = "positive"
    refresh_every: int = 0

    name = "moefication"
    summary = "balanced clusters of neurons as experts, chosen by a router"
    paper = "arXiv 2110.01786"
    decides = Decides.TOKEN
    needs = (SiteKind.MLP_IN,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 1:
            raise PlanError(f"moefication: neurons must be at least 1, not {self.neurons}", "the default is 32")
        if self.refresh_every < 0 or (self.refresh_every and self.routing != "sequence"):
            raise PlanError(
                f"moefication: refresh_every={self.refresh_every} does not go with routing={self.routing}",
                "it is for routing=sequence, and at least 0",
            )

    @property
    def site(self) -> SiteKind:
        """Where the router reads."""
        return SiteKind.NEURON if self.router == "oracle" else SiteKind.MLP_IN

    @property
    def control(self) -> str | None:
        if self.routing != "sequence":
            return None
        options = self.options | {"routing": "static"}
        return "moefication:" + ",".join(f"{key}={value}" for key, value in options.items() if key != "refresh_every")

    def fit(self, calibration: Calibration, budget: Budget) -> Fit:
        routed = chosen_layers(self.name, self.layers, len(calibration.widths))
        counted = counted_layers(budget, self.name, calibration.widths)
        plans = {one.layer: self._whole_experts(one, one.layer in routed) for one in counted}
        wanted = [plan for plan in plans.values() if plan.kept != plan.width]
        tensors: dict[str, Tensor] = {}
        if wanted:
            training = calibration.training()
            tensors |= self._clustered(training, wanted)
            if self.router == "mlp":
                judged, routers = self._routers(training, wanted, tensors)
                plans, tensors = plans | judged, tensors | routers
        drops = tuple(1 - (plan.kept or 0) / plan.width for plan in plans.values())
        # with experts of one size every choice keeps the same number; a smaller last one makes it vary with the text
        exact = all(plan.width % self.neurons == 0 for plan in wanted)
        fit = Fit(
            layers=tuple(plans.values()), predicted_drop=drops, realised_drop=drops if exact else (), tensors=tensors
        )
        return replace(fit, tensors=tensors | self._fixed(calibration, fit)) if self.routing == "static" else fit

    def _fixed(self, calibration: Calibration, fit: Fit) -> dict[str, Tensor]:
        """With `routing=static`, the neurons of the experts with the best mean score on calibration text."""
        rules = {plan.layer: self._rule(plan, fit) for plan in fit.layers if plan.kept != plan.width}
        if not rules:
            return {}
        unread = CentroidScores(torch.zeros(1, 1))
        scores = [MeanScores(rules[one.layer].scores if one.layer in rules else unread) for one in fit.layers]
        means = calibration.pooled(self.site, scores)
        return {f"layers.{layer}.mask": rule.neurons(means[layer]) for layer, rule in rules.items()}

    def gates(self, layer: int, fit: Fit) -> LayerGates:
        plan = fit.layers[layer]
        if plan.kept == plan.width:
            return LayerGates(neurons=FixedGate(torch.ones(plan.width, dtype=torch.bool)))
        if self.routing == "static":
            return LayerGates(neurons=FixedGate(tensor_of(fit, f"layers.{layer}.mask")))
        rule = self._rule(plan, fit)
        if self.routing == "sequence":
            statistic = partial(MeanScores, rule.scores)
            gate = PrefillGate(statistic, rule.neurons, site=self.site, refresh_every=self.refresh_every)
            return LayerGates(neurons=gate)
        gate = TokenGate(self.site, rule, ideal=self.router == "oracle")
        return LayerGates(neurons=gate, mlp_extra_bytes=self._extra_bytes(layer, fit))

    def check_fit(self, fit: Fit, hidden: int) -> None:
        for plan in fit.layers:
            if plan.kept == plan.width:
                continue
            sizes, where = group_sizes(plan.width, self.neurons), f"moefication, layer {plan.layer}"
            experts = tensor_of(fit, f"layers.{plan.layer}.experts")
            if experts.shape != (plan.width,) or experts.bincount(minlength=len(sizes)).tolist() != sizes:
                raise PlanError(
                    f"{where}: the experts are not {len(sizes)} groups of {plan.width} neurons", "fit again"
                )
            if self.router == "mlp":
                check_router(where, router_of(plan.layer, fit), hidden, len(sizes))
            elif self.router == "centroid" and tensor_of(fit, f"layers.{plan.layer}.centroids").shape != (
                len(sizes),
                hidden,
            ):
                raise PlanError(f"{where}: the centroids do not fit a model of {hidden} channels", "fit again")

    def _whole_experts(self, plan: LayerPlan, routed: bool) -> LayerPlan:
        """The plan with the neurons of as many whole experts as hold the neurons asked for; a smaller last expert is
        not counted on. A layer that gets no router keeps everything."""
        assert plan.kept is not None
        if not routed or plan.kept == plan.width:
            return replace(plan, kept=plan.width)
        if self.neurons >= plan.width:
            raise PlanError(
                f"moefication: experts of {self.neurons} neurons leave nothing to choose from {plan.width}",
                f"make them smaller: --set neurons={max(1, plan.width // 8)}",
            )
        return replace(plan, kept=min(plan.width, -(-plan.kept // self.neurons) * self.neurons))

    def _clustered(self, training: Training, plans: Sequence[LayerPlan]) -> dict[str, Tensor]:
        """The expert of every neuron, and the centroids of the experts, by name."""
        found: dict[str, Tensor] = {}
        with training.task("clustering neurons into experts", len(plans), "layers") as advance:
            for plan in plans:
                name = f"experts-{self._digest()}-{plan.layer:03d}"
                kept = training.finished(name)
                if kept is None:
                    rows = F.normalize(training.read_rows(plan.layer), dim=1).cpu()
                    groups, centroids = balanced_kmeans(rows, group_sizes(plan.width, self.neurons), self.seed)
                    kept = {"experts": groups.to(torch.int32), "centroids": centroids}
                    training.keep(name, kept)
                found[f"layers.{plan.layer}.experts"] = kept["experts"]
                if self.router == "centroid":
                    found[f"layers.{plan.layer}.centroids"] = kept["centroids"]
                advance(1)
        return found

    def _routers(
        self, training: Training, plans: Sequence[LayerPlan], tensors: dict[str, Tensor]
    ) -> tuple[dict[int, LayerPlan], dict[str, Tensor]]:
        """The plans with what their trained routers reached, by layer, and the routers by name."""

        def lesson(plan: LayerPlan, pairs: LayerPairs) -> Lesson:
            count = self._count(plan)
            truth = PositiveSum(tensors[f"layers.{plan.layer}.experts"].long(), count, self.score == "abs")
            kept = self._experts(plan)
            examples = Examples(
                pairs.x.float(), truth(pairs.a), pairs.held_x.float(), top_mask(truth(pairs.held_a), kept), kept
            )
            start = RouterWeights.drawn(pairs.x.shape[1], count, count, self.seed + plan.layer, tanh=True)
            return Lesson(examples, soft_bce, start)

        if self.weights:
            found = read_routers(self, training, plans, self._count)
        else:
            found = train_routers(self, training, plans, self.site, 0, lesson)
        named: dict[str, Tensor] = {}
        judged: dict[int, LayerPlan] = {}
        for plan, router in zip(plans, found, strict=True):
            named |= router_tensors(plan.layer, router)
            judged[plan.layer] = judged_plan(plan, router, self._experts(plan), self._count(plan))
        return judged, named

    def _count(self, plan: LayerPlan) -> int:
        """How many experts a layer has."""
        return len(group_sizes(plan.width, self.neurons))

    def _experts(self, plan: LayerPlan) -> int:
        """How many experts a layer keeps."""
        return (plan.kept or 0) // self.neurons

    def _rule(self, plan: LayerPlan, fit: Fit) -> Experts:
        sizes = torch.tensor(group_sizes(plan.width, self.neurons))
        expert_of = tensor_of(fit, f"layers.{plan.layer}.experts").long()
        assert plan.kept is not None
        return Experts(self._scores(plan.layer, fit, expert_of, len(sizes)), expert_of, sizes, plan.kept)

    def _scores(self, layer: int, fit: Fit, expert_of: Tensor, experts: int) -> ExpertScores:
        if self.router == "oracle":
            return PositiveSum(expert_of, experts, self.score == "abs")
        if self.router == "mlp":
            router = router_of(layer, fit)
            return TrainedScores(router.first, router.second)
        return CentroidScores(tensor_of(fit, f"layers.{layer}.centroids"))

    def _extra_bytes(self, layer: int, fit: Fit) -> int:
        """What the router reads for a token."""
        names = {"centroid": ("centroids",), "mlp": ("router.first", "router.second"), "oracle": ()}[self.router]
        read = [tensor_of(fit, f"layers.{layer}.{name}") for name in names]
        return sum(part.numel() * part.element_size() for part in read)

    def _digest(self) -> str:
        """What the clustering depends on beside the weights, for the names of finished layers."""
        return sha256(f"{self.neurons} {self.seed}".encode()).hexdigest()[:12]
