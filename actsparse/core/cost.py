"""The byte model of batch-1 decode (methods.md, section 0, facts 1 and 2)."""

from actsparse.results import Sparsity, StepBytes


def saved(step: StepBytes, matrices: frozenset[str], dropped: list[float]) -> Sparsity:
    """Sparsity on every basis.

    `dropped` [layers]: share of neurons dropped in each layer; `matrices`: those of `gate`, `up` and `down` whose bytes
    of a dropped neuron are not read.
    """
    per_layer = sum(step.mlp[name] for name in matrices & step.mlp.keys())
    not_read = sum(dropped) * per_layer
    return Sparsity(
        neuron_frac=sum(dropped) / len(dropped),
        mlp_bytes_frac=not_read / step.mlp_total,
        model_bytes_frac=not_read / step.total,
    )


def ceiling(model_bytes_frac: float) -> float:
    """The best speed-up of a decode step that does not read this share of the weight bytes (fact 1)."""
    return 1.0 / (1.0 - model_bytes_frac)
