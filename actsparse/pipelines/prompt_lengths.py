"""How many neurons a prompt method keeps after prompts of different lengths (experiment T6).

A fixed threshold on the prompt statistic drifts with the length of the prompt, because the statistic spreads less the
longer it is; `tda:length_aware=true` follows it.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.engine.gating import PlanState, SiteValues
from actsparse.engine.points import visited
from actsparse.errors import DataError
from actsparse.methods.gates import LayerGates, PrefillGate
from actsparse.models.load import LoadedModel
from actsparse.pipelines.progress import Progress
from actsparse.results import Unit

LENGTHS = (32, 64, 128, 256, 512)


def kept_by_prompt_length(
    loaded: LoadedModel,
    gates: Sequence[LayerGates],
    blocks: Sequences,
    progress: Progress,
    lengths: Sequence[int] = LENGTHS,
) -> dict[int, Float[Tensor, "layers blocks"]]:
    """The share of neurons kept in every layer after the first P tokens of every block (sink tokens included), by P.

    One dense pass over each block. Raises DataError where a block is shorter than the longest prompt.
    """
    longest, sink = max(lengths), blocks.record.sink_tokens
    if min(len(ids) for ids in blocks.ids) < longest:
        raise DataError(
            f"blocks of {min(len(ids) for ids in blocks.ids)} tokens hold no prompt of {longest}",
            f"use longer blocks: --block-length {longest}",
        )
    found = {length: torch.ones(len(gates), len(blocks), dtype=torch.float64) for length in lengths}
    with progress.task("selecting after prompts of several lengths", blocks.tokens, "tokens") as advance:
        for index, ids in enumerate(blocks.ids):
            states = {length: PlanState(gates, prompt_length=length, sink_tokens=sink) for length in lengths}

            def watch(
                _unit: Unit,
                layer: int,
                _a: Tensor,
                values: SiteValues,
                states: dict[int, PlanState] = states,
                index: int = index,
            ) -> None:
                for length, state in states.items():
                    gate = state.neurons[layer]
                    if gate is not None and isinstance(gate.gate, PrefillGate):
                        state.observe(layer, values, 0)
                        found[length][layer, index] = float(gate.chosen()[0].double().mean()) if gate.ready else 1.0

            with visited(loaded.sites, [gates], watch), torch.no_grad():
                loaded.model.base_model(input_ids=ids[None, :longest].to(loaded.device), use_cache=False)
            advance(len(ids))
    return found
