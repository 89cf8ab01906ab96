"""TEAL: thresholds on the magnitudes of every projection's input (arXiv 2408.14690)."""

from dataclasses import dataclass

from torch import Tensor

from actsparse.methods.channel_replay import ChannelReplay, Place
from actsparse.methods.channels import ChannelMethod


@dataclass(frozen=True, kw_only=True)
class Teal(ChannelMethod):
    """Channels with |x_j| >= t, token by token; t is the exact quantile of |x| at the projection's input."""

    name = "teal"
    summary = "input channels of every projection over an offline threshold, token by token"
    paper = "arXiv 2408.14690"
    caution = "25 % barely pays on an NVIDIA H200, 50 % does; docs/engine-gpu.md has the figures"

    @property
    def control(self) -> str:
        return "channels-static:stat=mean_abs"

    def weights(self, replay: ChannelReplay) -> dict[Place, Tensor]:
        return {}
