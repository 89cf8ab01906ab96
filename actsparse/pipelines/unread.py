"""What an engine did not read of the weights while it decoded under a plan."""

from collections.abc import Mapping, Sequence

from actsparse.core.cost import saved
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import drops_of
from actsparse.results import Sparsity, StepBytes, Unit

UNITS = frozenset(unit.value for unit in Unit)


def unread_by_engine(
    gates: Sequence[LayerGates], kept: Mapping[tuple[str, int], float], cost: StepBytes
) -> Sparsity | None:
    """The sparsity that an engine made use of, from the shares that it read (`Run.kept`; one gate a layer); None where
    it does not count. A matrix is left out along one axis: one that drops channels is read for every neuron."""
    dropped = {(Unit(unit), layer): 1 - share for (unit, layer), share in kept.items() if unit in UNITS}
    if not dropped:
        return None
    drops = drops_of(gates, dropped, gated="gate" in cost.mlp)
    return saved(cost, [one.along_one_axis() for one in drops])
