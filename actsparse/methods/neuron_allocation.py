"""Shares of neurons by layer, from how much each layer's output suffers and what that costs the model (ours)."""

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from actsparse.core.allocate import Curve, by_sensitivity
from actsparse.methods.base import Budget, Calibration, Method
from actsparse.methods.gates import LayerGates

SHARES = tuple(tenth / 10 for tenth in range(1, 10))


def by_layer(method: Method, calibration: Calibration, budget: Budget) -> Budget:
    """The budget with a share for every layer, of the same mean, that should move the model's predictions least.

    The method is fitted at uniform shares from 10 to 90 %, and the relative error e of every layer's MLP output is
    measured on dense inputs. An error does not cost the same in every layer: with one layer alone at the share that is
    nearest to the budget, the KL of the model's predictions is divided by e^2. The sum over layers of that weight
    times e^2 is made least; layers are taken as independent.
    """
    if not budget.drop:
        return budget
    widths = calibration.widths
    fits = {share: method.fit(calibration, Budget(drop=share)) for share in SHARES}
    gates = {share: [method.gates(layer, fit) for layer in range(len(widths))] for share, fit in fits.items()}
    errors = {share: calibration.local_errors(of_share) for share, of_share in gates.items()}
    nearest = min(SHARES, key=lambda share: abs(share - (budget.drop or 0.0)))
    roots = [sqrt(one) for one in _weights(calibration, gates[nearest], errors[nearest])]
    curves = [
        Curve((0.0, *SHARES), (0.0, *(roots[layer] * errors[share][layer] for share in SHARES)))
        for layer in range(len(widths))
    ]
    return replace(budget, drops=by_sensitivity(widths, budget.drop, curves))


def _weights(calibration: Calibration, gates: Sequence[LayerGates], errors: Sequence[float]) -> list[float]:
    """Nats of KL per squared error of each layer; 1 in mixtures of experts, whose gates are not one a layer."""
    if any(place.expert is not None for place in calibration.ffns):
        return [1.0] * len(gates)
    replay, found = calibration.channels(), []
    for layer in replay.each_layer("weighing the layers"):
        alone = [one if at == layer else LayerGates() for at, one in enumerate(gates)]
        found.append(max(0.0, replay.kl(alone)) / max(errors[layer] ** 2, 1e-12))
    return found
