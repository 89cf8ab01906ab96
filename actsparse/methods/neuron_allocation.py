"""Shares of neurons by layer, from how much each layer's output suffers (ours)."""

from dataclasses import replace

from actsparse.core.allocate import Curve, by_sensitivity
from actsparse.methods.base import Budget, Calibration, Method

SHARES = tuple(tenth / 10 for tenth in range(1, 10))


def by_layer(method: Method, calibration: Calibration, budget: Budget) -> Budget:
    """The budget with a share for every layer, of the same mean, under which the sum of squared errors is least.

    The method is fitted at uniform shares from 10 to 90 %, and the relative error of every layer's MLP output is
    measured on dense inputs; layers are taken as independent.
    """
    if not budget.drop:
        return budget
    widths = calibration.widths
    measured = []
    for share in SHARES:
        fit = method.fit(calibration, Budget(drop=share))
        measured.append(calibration.local_errors([method.gates(layer, fit) for layer in range(fit.depth)]))
    curves = [Curve((0.0, *SHARES), (0.0, *(errors[i] for errors in measured))) for i in range(len(widths))]
    return replace(budget, drops=by_sensitivity(widths, budget.drop, curves))
