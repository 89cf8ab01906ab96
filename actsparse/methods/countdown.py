"""COUNTDOWN (M variant): thresholding of the up projection, known before the gate is read (arXiv 2505.17701)."""

from dataclasses import dataclass

from actsparse.methods.site_threshold import SiteThreshold
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Countdown(SiteThreshold):
    """Neurons with |u_i| >= t_l, token by token; t_l is the quantile of |u| on calibration text."""

    name = "countdown"
    summary = "up activations over an offline threshold, token by token"
    paper = "arXiv 2505.17701"
    site = SiteKind.UP
    needs = (SiteKind.UP,)
    saves = frozenset({"gate", "down"})
    gated_only = True
