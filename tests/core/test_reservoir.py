import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse.core.reservoir import Reservoir, capacity, position_keys

LAYERS, WIDTH = (0, 3), 4
LENGTHS = (5, 1, 17, 9, 30, 2)


def activations(sequence: int, layer: int) -> torch.Tensor:
    """Rows that tell layer, sequence and position apart."""
    position = torch.arange(LENGTHS[sequence], dtype=torch.float32)
    return (1000.0 * layer + 100.0 * sequence + position)[:, None] + torch.arange(WIDTH) / 8


def keys_of(sequence: int, seed: int = 0) -> np.ndarray:
    return position_keys(7919 * sequence + 1, np.arange(LENGTHS[sequence]), seed)


def fed(order: tuple[int, ...], slots: int, *, step: int = 100, seed: int = 0) -> Reservoir:
    """A reservoir that saw the sequences in an order, each in pieces of `step` positions."""
    reservoir = Reservoir.empty(slots, LAYERS, WIDTH, torch.float32)
    for sequence in order:
        keys = keys_of(sequence, seed)
        for start in range(0, len(keys), step):
            piece = slice(start, start + step)
            places, chosen = reservoir.admit(keys[piece], np.arange(len(keys))[piece], np.arange(len(keys))[piece] // 7)
            for layer in LAYERS:
                reservoir.put(layer, chosen, activations(sequence, layer)[piece][places])
    return reservoir


def same(first: Reservoir, second: Reservoir) -> bool:
    kept = all(torch.equal(first.rows(layer), second.rows(layer)) for layer in LAYERS)
    return kept and torch.equal(first.places, second.places)


def naive_rows(sequences: tuple[int, ...], layer: int, slots: int) -> torch.Tensor:
    pairs = [(int(key), row) for s in sequences for key, row in zip(keys_of(s), activations(s, layer), strict=True)]
    return torch.stack([row for _, row in sorted(pairs, key=lambda pair: pair[0])[:slots]])


@settings(deadline=None, derandomize=True, max_examples=40)
@given(order=st.permutations(range(6)), slots=st.integers(1, 70), step=st.integers(1, 20))
def test_the_sample_is_the_smallest_keys_whatever_the_order_and_the_pieces(order, slots, step):
    found = fed(tuple(order), slots, step=step)
    for layer in LAYERS:
        assert torch.equal(found.rows(layer), naive_rows(tuple(range(6)), layer, slots))
    assert torch.equal(found.places, naive_rows(tuple(range(6)), 0, slots)[:, 0].long() % 100)
    assert found.used == min(slots, sum(LENGTHS))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(order=st.permutations(range(6)), cut=st.integers(0, 6), slots=st.integers(1, 70))
def test_merging_two_samples_is_sampling_everything_at_once(order, cut, slots):
    merged = fed(tuple(order[:cut]), slots)
    merged.merge(fed(tuple(order[cut:]), slots))
    assert same(merged, fed(tuple(range(6)), slots))


def test_the_buffers_never_grow():
    reservoir = fed((0, 1, 2), 8)
    sizes = {layer: (rows.shape, rows.data_ptr()) for layer, rows in reservoir.layers.items()}
    reservoir.merge(fed((3, 4, 5), 8))
    assert {layer: (rows.shape, rows.data_ptr()) for layer, rows in reservoir.layers.items()} == sizes
    assert len(reservoir.keys) == reservoir.used == 8


def test_nothing_seen_is_nothing_kept():
    reservoir = Reservoir.empty(3, LAYERS, WIDTH, torch.float32)
    assert reservoir.used == 0
    assert reservoir.rows(0).shape == (0, WIDTH)
    reservoir.merge(Reservoir.empty(3, LAYERS, WIDTH, torch.float32))
    assert reservoir.used == 0


def test_the_state_survives_a_shard_and_goes_on_from_there():
    reservoir = fed((0, 2), 20)
    again = Reservoir.empty(20, LAYERS, WIDTH, torch.float32)
    again.load({name: tensor.clone() for name, tensor in reservoir.tensors().items()})
    again.merge(fed((1, 3, 4, 5), 20))
    assert same(again, fed((0, 1, 2, 3, 4, 5), 20))


def test_keys_depend_on_seed_sequence_and_position_and_not_on_the_cut():
    keys = position_keys(12345, np.arange(100), 0)
    assert len(set(keys.tolist())) == 100
    assert np.array_equal(keys[40:], position_keys(12345, np.arange(40, 100), 0))
    for other in (position_keys(12345, np.arange(100), 1), position_keys(12346, np.arange(100), 0)):
        assert not set(keys.tolist()) & set(other.tolist())


def test_keys_are_uniform_so_that_the_sample_is_not_biased_to_a_place():
    keys = np.concatenate([position_keys(digest * 2**32 + 5, np.arange(500), 0) for digest in range(40)])
    counts = np.histogram(keys.astype(np.float64) / 2.0**64, bins=20, range=(0, 1))[0]
    # 20 bins of 1,000 expected: five standard deviations are 155.
    assert abs(counts - 1000).max() < 155


@pytest.mark.parametrize(
    ("tokens", "megabytes", "layers", "width", "itemsize", "slots"),
    [(4096, 512, 30, 1536, 4, 2912), (4096, 512, 4, 64, 4, 4096), (4096, 0, 30, 1536, 2, 1), (10, 512, 1, 1, 2, 10)],
)
def test_capacity_is_bounded_by_tokens_and_bytes(tokens, megabytes, layers, width, itemsize, slots):
    assert capacity(tokens, megabytes, layers, width, itemsize) == slots
