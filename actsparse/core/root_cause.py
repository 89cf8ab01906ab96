"""M2, the root cause: would the loss fall if active neurons were smaller? (methods.md, sections 5 and 8)

MOYU (arXiv 2406.12569) [A]; the choice of entries is ours [I].
"""

from jaxtyping import Bool, Float
from torch import Tensor

from actsparse.core.bootstrap import RESAMPLES, LayerIntervals, layered_ratio


def signed_gradient_sum(
    activations: Float[Tensor, "tokens neurons"],
    gradients: Float[Tensor, "tokens neurons"],
    masks: Bool[Tensor, "tokens neurons"],
) -> tuple[float, int]:
    """The sum of sign(a_i) * dL/da_i over the entries of the masks of one sequence and layer, and their number."""
    total = (activations.sign() * gradients).double()[masks].sum()
    return float(total), int(masks.sum())


def root_cause(
    sums: Float[Tensor, "layers sequences"],
    counts: Float[Tensor, "layers sequences"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> LayerIntervals:
    """M2: the mean of sign(a_i) * dL/da_i over active entries, per layer, sequences resampled.

    Above 0: shrinking the active neurons would lower the loss (they are over-activated, MOYU's root cause); below 0:
    the model would gain from activating them more. Sums and counts come from `signed_gradient_sum`; L is the sum of
    a block's NLL in nats. MOYU [A]; the choice of entries is ours [I].
    """
    return layered_ratio(sums, counts, resamples=resamples, seed=seed)
