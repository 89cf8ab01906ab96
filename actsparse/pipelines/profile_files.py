"""The files of a profile: tables, histograms, sample and co-activation of every phase, and the summary."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from actsparse.core.cett import CettLayer, CettSolution
from actsparse.core.coactivation import CoActivation, co_activation
from actsparse.core.streaming import ACTIVE_DENSITY, POSITION_EDGES
from actsparse.core.token_sparsity import TokenSpread, spread_over_tokens, token_sparsity
from actsparse.models.load import LoadedModel
from actsparse.pipelines.expert_tables import SolvedExpert, expert_rows
from actsparse.pipelines.profile_state import ProfileState
from actsparse.pipelines.profile_tables import cett_means, head_rows, measure_rows, neuron_rows, spread_rows
from actsparse.pipelines.progress import Progress
from actsparse.results import PREFILL, SHARED_EXPERT, HeadRow, Measure, NeuronRow
from actsparse.store import tables, tensors
from actsparse.store.codec import builtins, pretty
from actsparse.store.files import write_bytes
from actsparse.store.run import RunWriter

SPREAD_TARGET = 0.2


@dataclass(frozen=True)
class Phase:
    """One phase as recorded, with what was solved on its sample."""

    name: str
    state: ProfileState
    cett: dict[int, CettSolution]
    together: dict[int, CoActivation]
    spread: dict[int, TokenSpread]
    down_norms: dict[int, Tensor]
    experts: list[SolvedExpert]

    @classmethod
    def solved(
        cls, name: str, loaded: LoadedModel, state: ProfileState, targets: tuple[float, ...], progress: Progress
    ) -> "Phase":
        """CETT, co-activation and the spread over tokens of every recorded layer; of layers of experts CETT and
        co-activation of each expert."""
        cett: dict[int, CettSolution] = {}
        together: dict[int, CoActivation] = {}
        spread: dict[int, TokenSpread] = {}
        experts: list[SolvedExpert] = []
        norms = {place: loaded.sites.ffns[place].down_norms().cpu() for place in state.neurons}
        what = "solving CETT" if name == PREFILL else f"solving CETT of {name}"
        with progress.task(what, len(state.sampled) + len(state.experts), "FFNs") as advance:
            for layer in state.sampled:
                place = loaded.sites.ffn_index[layer, None]
                down = loaded.sites.layers[layer].down_matrix(loaded.record.intermediate_size)
                sample = state.reservoir.rows(layer).to(down.device)
                cett[layer] = CettSolution.of(CettLayer.of(sample, down, state.reservoir.texts), targets)
                together[layer] = co_activation(
                    sample, norms[place], state.neurons[place].active, density=ACTIVE_DENSITY
                )
                if SPREAD_TARGET in cett[layer].targets:
                    eps = cett[layer].targets[SPREAD_TARGET].eps
                    shares = token_sparsity(sample, norms[place], eps)
                    spread[layer] = spread_over_tokens(shares, state.reservoir.places, POSITION_EDGES)
                advance(1)
            for place in state.experts:
                experts.append(SolvedExpert.of(place, loaded, state, targets))
                advance(1)
        return cls(name, state, cett, together, spread, norms, experts)

    @property
    def rows(self) -> list[Measure]:
        """Its rows of `measures.parquet`; those of another phase than prefill say so in `param`."""
        rows = measure_rows(self.state, self.cett, self.together) + spread_rows(self.spread, SPREAD_TARGET)
        mixed = expert_rows(self.experts)
        rows += mixed + cett_means([*rows, *mixed])
        return rows if self.name == PREFILL else [_in_phase(row, self.name) for row in rows]


def write_phase(phase: Phase, writer: RunWriter) -> None:
    """Tables and histograms of a phase; of prefill the sample and the co-activation too."""
    state, path = phase.state, writer.path
    end = "" if phase.name == PREFILL else f"_{phase.name}"
    tables.write(path / f"neurons{end}.parquet", tables.frame(neuron_rows(state, phase.down_norms), NeuronRow))
    tables.write(path / f"heads{end}.parquet", tables.frame(head_rows(state), HeadRow))
    histograms: dict[str, Tensor] = {}
    for site, moments in state.moments.items():
        counts, edges = moments.histogram.trimmed()
        histograms |= {
            f"layers.{site.layer}.{site.name}.counts": counts,
            f"layers.{site.layer}.{site.name}.edges": edges,
        }
    tensors.write(path / f"histograms{end}.safetensors", histograms)
    if phase.name != PREFILL:
        return
    reservoir = {f"layers.{layer}.neuron": state.reservoir.rows(layer) for layer in state.sampled}
    for place, sample in state.experts.items():
        layer, expert = state.ffns[place]
        name = "shared" if expert == SHARED_EXPERT else f"experts.{expert}"
        reservoir[f"layers.{layer}.{name}.neuron"] = sample.rows(place)
    tensors.write(path / "reservoir.safetensors", reservoir)
    together: dict[str, Tensor] = {}
    for layer, found in phase.together.items():
        together |= {f"layers.{layer}.neurons": found.neurons, f"layers.{layer}.counts": found.counts}
    together["tokens"] = torch.tensor([state.reservoir.used])
    tensors.write(path / "coactivation.safetensors", together)


def write_measures(loaded: LoadedModel, measures: list[Measure], writer: RunWriter) -> None:
    """`measures.parquet`, and the document that `--json` prints."""
    tables.write(writer.path / "measures.parquet", tables.frame(measures, Measure))
    summary = {
        "model": builtins(loaded.record),
        "data": builtins(writer.manifest.texts[0]),
        "measures": builtins(measures),
        "warnings": list(writer.warnings),
        "run": str(writer.path),
    }
    write_bytes(writer.path / "summary.json", pretty(summary).encode())


def _in_phase(row: Measure, phase: str) -> Measure:
    return replace(row, param=",".join(sorted([*filter(None, row.param.split(",")), f"phase={phase}"])))
