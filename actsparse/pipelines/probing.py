"""What gates would do to a text: counts and local errors on dense inputs, over whole blocks."""

from collections.abc import Sequence

import torch

from actsparse.data.sequences import Sequences
from actsparse.engine.masked import MaskedPlan, probed
from actsparse.methods.gates import LayerGates
from actsparse.models.load import LoadedModel
from actsparse.pipelines.progress import Progress


def probe(
    loaded: LoadedModel,
    gates: Sequence[LayerGates],
    blocks: Sequences,
    prompt_length: int,
    what: str,
    progress: Progress,
) -> MaskedPlan:
    """The counts and errors of a plan over positions P..S-1 of every block, summed up over the blocks."""
    total = MaskedPlan(gates, prompt_length=prompt_length, sink_tokens=blocks.record.sink_tokens)
    with progress.task(what, blocks.tokens, "tokens") as advance, torch.no_grad():
        for ids in blocks.ids:
            one = MaskedPlan(gates, prompt_length=prompt_length, sink_tokens=blocks.record.sink_tokens)
            with probed(loaded.sites, [one]):
                loaded.model.base_model(input_ids=ids[None].to(loaded.device), use_cache=False)
            for (unit, layer), tally in one.tallies.items():
                total.tally(unit, layer).add(tally)
            advance(len(ids))
    return total
