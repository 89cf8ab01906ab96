"""Which plan of each method predicts not to read a share of the model's bytes, in closed form from the byte model."""

from collections.abc import Sequence
from dataclasses import dataclass

from actsparse.core.balanced import group_sizes
from actsparse.core.cost import LayerDrops, saved
from actsparse.core.masks import kept_count
from actsparse.methods.base import Method
from actsparse.methods.channel_controls import FixedChannels
from actsparse.methods.channels import ChannelMethod
from actsparse.methods.dejavu import DejaVu
from actsparse.methods.gates import Threshold, TokenGate
from actsparse.methods.heads_oracle import HeadsOracle
from actsparse.methods.heads_router import HeadsRouter
from actsparse.methods.larosa import LaRoSA
from actsparse.methods.moefication import MoEfication
from actsparse.methods.rsparse import RSparse
from actsparse.methods.short import parse
from actsparse.models.load import LoadedModel
from actsparse.models.sites import dense_linears
from actsparse.results import SiteKind

LARGEST = 0.95


@dataclass(frozen=True)
class Entry:
    """A method as tables name it, `label`, at the share that a budget of bytes asks for, and the plan that is run,
    which may have further options of training."""

    label: str
    share: float
    plan: str

    @property
    def shown(self) -> str:
        """What a table shows."""
        return f"{self.label}@{self.share:.4g}"


@dataclass(frozen=True)
class Shares:
    """Turns budgets of one model's bytes into shares of a method's own units."""

    loaded: LoadedModel

    @property
    def total(self) -> int:
        """Weight bytes of one decode step."""
        return self.loaded.record.step.total

    def entry(self, label: str, target: float, training: str = "") -> Entry | None:
        """The plan of a method that predicts not to read `target` of the bytes; None where none can."""
        method = parse(f"{with_options(label, training)}@0.5").method
        if method.gated_only and not self.loaded.record.gated:
            return None
        if method.name == "auto":
            return Entry(label, target, f"{label}@{target:g}")
        share = (target * self.total + self.rule_bytes(method)) / (self.whole_share(method) * self.total)
        if share > LARGEST:
            return None
        share = self._of_whole_experts(method, share)
        return Entry(label, share, f"{with_options(label, training)}@{share:.6g}")

    def whole_share(self, method: Method) -> float:
        """The share of the model's bytes that is not read when a method drops everything, its own reading apart."""
        step, gated = self.loaded.record.step, self.loaded.record.gated
        if isinstance(method, ChannelMethod | LaRoSA | FixedChannels):
            sizes = step.mlp | step.projections
            return step.layers * sum(sizes.values()) / step.total
        if isinstance(method, HeadsOracle | HeadsRouter):
            groups = self.loaded.record.kv_heads
            drops = LayerDrops(heads=1 - 1 / groups, head_saves=method.saves)
            return saved(step, [drops] * (step.layers - method.dense_layers)).model_bytes_frac
        reads = method.needs[0] if method.needs and method.name != "cett" else SiteKind.NEURON
        token = TokenGate(reads, Threshold(0.0), saves=method.saves, ideal=method.ideal)
        saves = token.unread(gated) if method.decides.value == "per token" else method.saves
        return saved(step, [LayerDrops(neurons=1.0, neuron_saves=saves)] * step.layers).model_bytes_frac

    def rule_bytes(self, method: Method) -> int:
        """What the rules themselves read for a token: routers, low-rank parts, rotations."""
        record, sites = self.loaded.record, self.loaded.sites
        linears, layers = dense_linears(sites), len(sites.layers)
        size, hidden, width = sites.model.dtype.itemsize, record.hidden_size, record.intermediate_size
        if isinstance(method, RSparse):
            shapes = [one.matrix().shape for one in linears.values()]
            return layers * size * sum(kept_count(method.rank_frac, min(shape)) * sum(shape) for shape in shapes)
        if isinstance(method, LaRoSA):
            return layers * size * 2 * next(iter(linears.values())).width ** 2
        if isinstance(method, DejaVu):
            return layers * size * min(method.rank, hidden) * (hidden + width)
        if isinstance(method, MoEfication) and method.routing == "token" and method.router != "oracle":
            experts = len(group_sizes(width, method.neurons))
            # centroids are kept in float32
            return layers * (
                4 * experts * hidden if method.router == "centroid" else size * experts * (hidden + experts)
            )
        return 0

    def heads(self, label: str, training: str = "") -> list[Entry]:
        """A method over heads at about half of the KV groups and at all but one, which is the most it can drop."""
        groups = self.loaded.record.kv_heads
        shares = sorted({(groups // 2) / groups, (groups - 1) / groups} - {0.0})
        return [Entry(label, share, f"{with_options(label, training)}@{share:.6g}") for share in shares]

    def _of_whole_experts(self, method: Method, share: float) -> float:
        """The nearest share that whole experts can drop."""
        if not isinstance(method, MoEfication):
            return share
        width = self.loaded.record.intermediate_size
        return 1 - max(1, round((1 - share) * width / method.neurons)) * method.neurons / width


def with_options(label: str, more: str) -> str:
    """A short form without a share, with further options."""
    return label + ("," if ":" in label else ":") + more if more else label


def entries(shares: Shares, labels: Sequence[str], target: float, training: str = "") -> list[Entry]:
    """The entries of several methods at one budget, those that cannot reach it left out."""
    found = [shares.entry(label, target, training) for label in labels]
    return [one for one in found if one is not None]
