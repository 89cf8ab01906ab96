"""One projection of a step: whole, or by its channel rule."""

from torch import Tensor

from actsparse.engine.cpu.emit import Emitter
from actsparse.engine.step.work import Channels, LayerWork


class Projector:
    """Emits projections, with scratch for what their rules rotate and drop."""

    def __init__(self, emit: Emitter, widest: int) -> None:
        self._emit = emit
        self._dropped, self._rotated = emit.floats(widest), emit.floats(widest)

    def project(
        self, index: int, name: str, work: LayerWork, weight: Tensor, x: Tensor, out: Tensor,
        *, bias: Tensor | None, add: int = 0,
    ) -> None:  # fmt: skip
        """x [batch, inputs] through a projection of layer `index` into out [batch, outputs], or added to it."""
        emit = self._emit
        rule: Channels | None = work.channels.get(name)
        if rule is None:
            emit.rows(weight, x, out, bias=bias, add=add)
            return
        if rule.basis is not None:
            rotated = self._room(self._rotated, x.shape[1])
            emit.rows(rule.basis, x, rotated)
            x = rotated
        dropped = None if rule.correction is None else self._room(self._dropped, x.shape[1])
        emit.columns(
            index, name, rule.rows, x, out, base=bias, score=rule.score, threshold=rule.threshold, top=rule.top,
            dropped=dropped, add=add,
        )  # fmt: skip
        if rule.correction is not None and dropped is not None:
            dropped = emit.choices[-1].values if emit.records else dropped
            outer, inner_rows = rule.correction
            inner = emit.floats(len(inner_rows))
            emit.rows(inner_rows, dropped, inner)
            emit.rows(outer, inner, out, scale=emit.scale(out), add=1)

    def _room(self, scratch: Tensor, width: int) -> Tensor:
        """[batch, width], contiguous: the front of `scratch` for one sequence, else a buffer of its own."""
        return scratch[:, :width] if self._emit.batch == 1 else self._emit.floats(width)
