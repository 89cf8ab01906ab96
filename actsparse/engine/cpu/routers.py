"""Routers of a step: what chooses neurons or KV groups before they are computed."""

import torch
from torch import Tensor

from actsparse.engine.cpu.emit import Emitter
from actsparse.engine.cpu.ops import Top
from actsparse.engine.step.work import Chosen
from actsparse.results import SiteKind


class Routers:
    """Emits routers. `inputs`: the normed residuals that they read, two buffers a site that layers use in turn."""

    def __init__(self, emit: Emitter, inputs: dict[SiteKind, list[Tensor]]) -> None:
        self._emit = emit
        self._inputs = inputs

    def choose(self, index: int, router: Chosen, neurons: int, unit: str) -> Top:
        """Emits the router of layer `index`; its last operator, whose list, count and masks say what was chosen."""
        emit = self._emit
        x = self._inputs[router.site][max(0, index - router.ahead) % 2]
        if router.first is not None:
            inner = emit.floats(len(router.first))
            emit.rows(router.first, x, inner, softcap=1.0 if router.tanh else 0.0)
            x = inner
        units = len(router.second)
        score = emit.floats(units)
        emit.rows(router.second, x, score)
        chosen = Top(
            score=score,
            members=router.members,
            sizes=router.sizes,
            always=router.always,
            index=torch.zeros(neurons, dtype=torch.int32),
            count=torch.zeros(1, dtype=torch.int32),
            mask=torch.zeros(emit.batch, neurons, dtype=torch.uint8),
            read=emit.counter(index, unit, neurons),
            batch=emit.batch,
            units=units,
            top=router.top,
            members_each=1 if router.members is None else router.members.shape[1],
            neurons=neurons,
        )
        emit.ops.append(chosen)
        emit.chose(index, "neuron" if unit == "router" else unit, chosen.mask)
        return chosen

    def members(self, chosen: Top, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Emits the list of the rows [units, each] int32 that the chosen units stand for; list and count."""
        total = rows.numel()
        index, count = torch.zeros(total, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self._emit.ops.append(
            Top(
                score=chosen.score,
                members=rows,
                index=index,
                count=count,
                mask=torch.zeros(self._emit.batch, total, dtype=torch.uint8),
                read=torch.zeros(1, dtype=torch.int64),
                batch=self._emit.batch,
                units=chosen.units,
                top=chosen.top,
                members_each=rows.shape[1],
                neurons=total,
            )
        )
        return index, count
