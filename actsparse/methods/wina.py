"""WINA: magnitudes weighted by the norms of the weight's columns (arXiv 2505.19427)."""

from dataclasses import dataclass

from torch import Tensor

from actsparse.methods.channel_replay import ChannelReplay, Place
from actsparse.methods.channels import ChannelMethod, Mode, column_norms


@dataclass(frozen=True, kw_only=True)
class Wina(ChannelMethod):
    """The top channels by |x_j| * ||W[:, j]|| of each projection, token by token (`mode=threshold`: those over the
    exact quantile of these scores)."""

    mode: Mode = "topk"

    name = "wina"
    summary = "top input channels of every projection by magnitude times column norm, token by token"
    paper = "arXiv 2505.19427"

    def weights(self, replay: ChannelReplay) -> dict[Place, Tensor]:
        return column_norms(replay)
