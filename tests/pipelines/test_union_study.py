"""S4's interval: a union density over sequences, each left out once."""

import pytest
import torch

from actsparse.core.batch_union import batch_union
from actsparse.core.bootstrap import Interval
from actsparse.pipelines.studies.union import without_one

SEQUENCES, TOKENS, UNITS, BATCH = 12, 6, 400, 4
LABELS = torch.arange(SEQUENCES).repeat_interleave(TOKENS)


def union_of(masks: torch.Tensor) -> Interval:
    value = sum(batch_union(one, LABELS, max_batch=BATCH).measured[-1] for one in masks) / len(masks)
    return Interval(value=value, low=None, high=None, n=len(LABELS), stderr=None)


def test_one_mask_for_all_has_an_interval_of_no_width() -> None:
    masks = (torch.rand(2, 1, UNITS, generator=torch.Generator().manual_seed(0)) < 0.3).expand(2, len(LABELS), UNITS)
    found = without_one(masks, LABELS, BATCH, union_of(masks))
    assert found.value == found.low == found.high
    assert found.n == SEQUENCES


def test_independent_masks_lie_inside_and_unlike_sequences_widen_it() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2, len(LABELS), UNITS, generator=generator) < 0.3
    found = without_one(masks, LABELS, BATCH, union_of(masks))
    assert None not in (found.low, found.high, found.stderr)
    assert found.low < 1 - 0.7**BATCH < found.high
    dense = masks.clone()
    dense[:, LABELS == 0] = True
    wider = without_one(dense, LABELS, BATCH, union_of(dense))
    assert wider.stderr > 3 * found.stderr


@pytest.mark.parametrize("sequences", [BATCH, BATCH + 1])
def test_too_few_sequences_have_none(sequences: int) -> None:
    few = sequences > LABELS
    masks = torch.ones(1, int(few.sum()), UNITS, dtype=torch.bool)
    assert without_one(masks, LABELS[few], BATCH, union_of(torch.ones(1, len(LABELS), UNITS).bool())).low is None
