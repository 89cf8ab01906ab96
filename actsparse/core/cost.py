"""The byte model of batch-1 decode (methods.md, section 0, facts 1 and 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from actsparse.results import Sparsity, StepBytes, Unit

PARTS = {Unit.QKV: ("q", "k", "v"), Unit.GATE_UP: ("gate", "up")}
ALL_MATRICES = frozenset({"gate", "up", "down"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDrops:
    """What one layer drops, as shares; a part that a method leaves alone is None or missing.

    `neuron_saves`, `head_saves`: the matrices whose bytes of a dropped neuron or KV group are not read. The extra bytes
    are what the rules themselves read for a token.
    """

    neurons: float | None = None
    neuron_saves: frozenset[str] = ALL_MATRICES
    channels: Mapping[Unit, float] = field(default_factory=dict)
    heads: float | None = None
    head_saves: frozenset[str] = frozenset({"q", "o"})
    mlp_extra_bytes: int = 0
    attention_extra_bytes: int = 0

    def unread(self, matrix: str) -> float:
        """The share of a matrix that is not read: dropped rows and dropped columns leave a smaller rectangle.

        Neurons are columns of `down`, heads columns of `o`: there a channel rule drops units of the same axis.
        """
        units = [
            self.neurons if matrix in self.neuron_saves else None,
            self.heads if matrix in self.head_saves else None,
        ]
        rows = max((one for one in units if one is not None), default=0.0)
        columns = max((share for unit, share in self.channels.items() if matrix in parts_of(unit)), default=0.0)
        return max(rows, columns) if matrix in ("down", "o") else 1 - (1 - rows) * (1 - columns)

    def along_one_axis(self) -> "LayerDrops":
        """What an engine leaves unread of it: a matrix stored by rows or by columns skips those alone, so one that
        drops channels is read for every neuron."""
        by_columns = {matrix for unit in self.channels for matrix in parts_of(unit)}
        return replace(self, neuron_saves=self.neuron_saves - by_columns)


def parts_of(unit: Unit) -> tuple[str, ...]:
    """The matrices of a projection: itself, or the parts of a fused one."""
    return PARTS.get(unit, (unit.value,))


def saved(step: StepBytes, layers: Sequence[LayerDrops]) -> Sparsity:
    """Sparsity of a plan on every basis; `layers` has one entry a layer."""
    mlp = sum(size * one.unread(name) for one in layers for name, size in step.mlp.items())
    attention = sum(size * one.unread(name) for one in layers for name, size in step.projections.items())
    mlp -= sum(one.mlp_extra_bytes for one in layers)
    attention -= sum(one.attention_extra_bytes for one in layers)
    return Sparsity(
        neuron_frac=_mean([one.neurons for one in layers]),
        mlp_bytes_frac=mlp / step.mlp_total,
        model_bytes_frac=(mlp + attention) / step.total,
        channel_frac=_channel_frac(step, layers),
        head_frac=_mean([one.heads for one in layers]),
    )


def nothing_saved() -> Sparsity:
    """The sparsity of the dense model."""
    return Sparsity(neuron_frac=0.0, mlp_bytes_frac=0.0, model_bytes_frac=0.0)


def attention_bytes_unread(step: StepBytes, sparsity: Sparsity) -> float:
    """Bytes of the attention's projections that are not read, all layers."""
    return sparsity.model_bytes_frac * step.total - sparsity.mlp_bytes_frac * step.mlp_total


def ceiling(model_bytes_frac: float) -> float:
    """The best speed-up of a decode step that does not read this share of the weight bytes (fact 1)."""
    return 1.0 / (1.0 - model_bytes_frac)


def _mean(shares: Sequence[float | None]) -> float | None:
    """The mean over layers, of which some may drop none of this unit; None where none has it."""
    known = [share for share in shares if share is not None]
    return sum(known) / len(shares) if known else None


def _channel_frac(step: StepBytes, layers: Sequence[LayerDrops]) -> float | None:
    """Input channels dropped, each projection weighing as much as its matrix."""
    if not any(one.channels for one in layers):
        return None
    sizes = step.mlp | step.projections
    dropped = sum(
        sizes[name] * share for one in layers for unit, share in one.channels.items() for name in parts_of(unit)
    )
    return dropped / (len(layers) * sum(sizes.values()))
