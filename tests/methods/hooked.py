"""What projections read, seen by hooks of the tests' own."""

import torch
from lengths import SINK
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.models.load import LoadedModel
from actsparse.results import Unit


def inputs_of(loaded: LoadedModel, blocks: Sequences) -> dict[tuple[int, Unit], Tensor]:
    """[tokens after the sinks, in] of every projection over the blocks, by layer."""
    found: dict[tuple[int, Unit], list[Tensor]] = {}
    handles = []
    for layer in loaded.sites.layers:
        for unit, one in layer.projections.items():
            rows = found.setdefault((layer.index, unit), [])
            handles.append(
                one.module.register_forward_pre_hook(
                    lambda _m, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1])[SINK:].clone())
                )
            )
    with torch.no_grad():
        for block in blocks.stack():
            loaded.model(input_ids=block[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {place: torch.cat(rows) for place, rows in found.items()}


def weight_of(loaded: LoadedModel, layer: int, unit: Unit) -> Tensor:
    """The weight [out, in] of a projection."""
    one = loaded.sites.layers[layer].projections[unit]
    weight = one.module.get_parameter("weight").detach()
    return weight.T if one.transposed else weight
