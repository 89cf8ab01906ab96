"""CATS: contextually-aware thresholding of the gate (arXiv 2404.08763)."""

from dataclasses import dataclass

from actsparse.methods.site_threshold import SiteThreshold
from actsparse.results import SiteKind


@dataclass(frozen=True, kw_only=True)
class Cats(SiteThreshold):
    """Neurons with |act(g_i)| >= t_l, token by token; t_l is the quantile of |act(g)| on calibration text."""

    name = "cats"
    summary = "gate activations over an offline threshold, token by token"
    paper = "arXiv 2404.08763"
    site = SiteKind.GATE
    needs = (SiteKind.GATE,)
    saves = frozenset({"up", "down"})
