"""Statistics that methods are fitted from: of a profile's tables, or of a recording in memory."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from actsparse.errors import PlanError
from actsparse.methods.base import NeuronMeans
from actsparse.models.load import LoadedModel
from actsparse.pipelines.profile_state import ProfileState
from actsparse.results import Site
from actsparse.store.runs import ProfileRun


@dataclass(frozen=True)
class Statistics:
    """Means of every layer, and quantiles of magnitudes at its sites."""

    means: tuple[NeuronMeans, ...]
    histograms: dict[Site, tuple[Tensor, Tensor]]

    @classmethod
    def of_run(cls, run: ProfileRun) -> "Statistics":
        """From the tables of a profile; raises PlanError where it did not record every layer."""
        model = run.manifest.model
        recorded = run.neurons["layer"].n_unique()
        if model is None or recorded != model.layers:
            raise PlanError(
                f"the profile at {run.path} recorded {recorded} layers only", "profile the model without --layers"
            )
        means = []
        # rows of a layer stand in the order of its FFNs: its MLP, or its experts and the shared one
        for _, rows in run.neurons.group_by("layer", "expert", maintain_order=True):
            columns = [field.name for field in fields(NeuronMeans)]
            ordered = rows.sort("neuron")
            means.append(NeuronMeans(**{name: torch.from_numpy(ordered[name].to_numpy().copy()) for name in columns}))
        histograms = {
            Site.named(int(layer), kind): (
                torch.from_numpy(run.histograms[f"layers.{layer}.{kind}.counts"]),
                torch.from_numpy(run.histograms[f"layers.{layer}.{kind}.edges"]),
            )
            for name in run.histograms
            if name.endswith(".counts")
            for _, layer, kind, _ in [name.split(".")]
        }
        return cls(tuple(means), histograms)

    @classmethod
    def of_state(cls, state: ProfileState, loaded: LoadedModel) -> "Statistics":
        """From a recording in memory."""
        means = []
        for place, sums in state.neurons.items():
            norms = loaded.sites.ffns[place].down_norms()
            tokens = max(1, sums.tokens)
            means.append(
                NeuronMeans(
                    mean=sums.total / tokens,
                    mean_norm=sums.total_abs / tokens * norms.double().cpu(),
                    griffin=(sums.share_square / max(1, sums.rows)).sqrt(),
                    mean_square_up=sums.square_up / tokens,
                )
            )
        return cls(tuple(means), {site: moments.histogram.trimmed() for site, moments in state.moments.items()})
