"""An error target for any method that drops neurons (ours): in each layer the largest share whose mean relative error
of the MLP output, ||FFN(x) - FFN_mask(x)|| / ||FFN(x)|| over calibration continuations on dense inputs, is at most the
target. CETT and TDA find their thresholds for it by themselves."""

from dataclasses import replace

from actsparse.errors import PlanError
from actsparse.methods.add_ons import AddOns
from actsparse.methods.base import Budget, Calibration, Fit, Method

STEPS = 8


def fit_to_error(method: Method, add_ons: AddOns, calibration: Calibration, target: float) -> tuple[Fit, Budget]:
    """A fit of the method that meets the target together with its add-ons, and the shares that it drops, by bisection
    in all layers at once. Raises PlanError where the method drops no neurons."""
    layers = len(calibration.widths)
    extra = add_ons.tensors(calibration)
    low, high = [0.0] * layers, [1.0] * layers
    for _ in range(STEPS):
        drops = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        fit = method.fit(calibration, Budget(drops=tuple(drops)))
        fit = replace(fit, tensors=fit.tensors | extra)
        gates = [add_ons.applied(method.gates(layer, fit), layer, fit) for layer in range(layers)]
        if any(one.neurons is None for one in gates):
            raise PlanError(
                f"{method.name} drops no neurons, so an error of the MLP output by layer does not say how much to drop",
                f"give a share ({method.name}@0.5), --target-ppl-increase or --target-speedup",
            )
        for layer, error in enumerate(calibration.local_errors(gates)):
            side = low if error <= target else high
            side[layer] = drops[layer]
    found = Budget(drops=tuple(low))
    return method.fit(calibration, found), found
