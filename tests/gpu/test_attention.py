"""The compiled attention against float64: any position, grouped heads, every family's extras, NaN beyond the cache."""

import dataclasses

import pytest
import torch

from actsparse.engine.step import reference
from actsparse.engine.step.reference import Attention
from actsparse.engine.step.state import Angles

pytestmark = pytest.mark.gpu
POSITIONS = 1024


def angles_of(rotated):
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2, device="cuda") / rotated)
    angle = torch.arange(POSITIONS, device="cuda")[:, None] * frequencies
    return Angles(angle.cos(), angle.sin())


def check(operators, draw, poisoned, assert_near, *, dtype, heads, kv_heads, head_dim, position, how, rotated=None):
    qkv = draw((heads + 2 * kv_heads) * head_dim)
    keys, values = (draw(kv_heads, POSITIONS, head_dim, dtype=dtype) for _ in range(2))
    first = 0 if how.window is None else max(0, position + 1 - how.window)
    for cache in (keys, values):
        cache[:, position:], cache[:, :first] = torch.nan, torch.nan
    angles, at = angles_of(rotated or head_dim), torch.tensor([position], dtype=torch.int32, device="cuda")
    # The reference's cache gains the token as the kernel rounds it.
    want_keys, want_values = keys[None].clone(), values[None].clone()
    reference.attend(qkv[None], want_keys, want_values, at, *angles, how)
    exact = dataclasses.replace(
        how,
        q_norm=None if how.q_norm is None else how.q_norm.double(),
        k_norm=None if how.k_norm is None else how.k_norm.double(),
    )
    tables = angles.cosine.double(), angles.sine.double()
    # Scores of unseen positions are computed and then masked, so the reference must not meet NaN keys.
    want = reference.attend(
        qkv[None].double(), want_keys.double().nan_to_num(), want_values.double(), at, *tables, exact
    )
    out = poisoned(heads * head_dim)
    operators.attend(out, qkv, keys[None], values[None], position=at, angles=angles, how=how)
    assert_near(out, want[0], limit=3e-3)  # the new key and value round once more
    assert_near(keys[:, position], want_keys[0, :, position], limit=5e-3)  # another order of rounding, on few elements
    assert torch.equal(values[:, position], want_values[0, :, position])
    assert keys[:, position + 1 :].isnan().all(), "the cache was written past the position"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 32, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64), (4, 1, 32), (32, 32, 96), (8, 4, 256), (4, 1, 256)],
)
@pytest.mark.parametrize("position", [0, 1, 7, 63, 513, 1023])
def test_attend(operators, draw, poisoned, assert_near, dtype, heads, kv_heads, head_dim, position):
    how = Attention(scale=head_dim**-0.5)
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "position": position}
    check(operators, draw, poisoned, assert_near, dtype=dtype, how=how, **sizes)


@pytest.mark.parametrize("position", [0, 5, 130, 1023])
@pytest.mark.parametrize("extra", ["norms", "window", "softcap", "part of a head", "all"])
@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_attend_as_families_do(operators, draw, poisoned, assert_near, extra, head_dim, position):
    norms = {"q_norm": 1 + draw(head_dim, scale=0.2), "k_norm": 1 + draw(head_dim, scale=0.2), "epsilon": 1e-6}
    extras = {"norms": norms, "window": {"window": 100}, "softcap": {"softcap": 5.0}, "part of a head": {}}
    extras["all"] = norms | {"window": 100, "softcap": 5.0}
    how = Attention(scale=0.3, **extras[extra])
    rotated = head_dim // 2 if extra in ("part of a head", "all") else head_dim
    check(
        operators,
        draw,
        poisoned,
        assert_near,
        dtype=torch.bfloat16,
        heads=8,
        kv_heads=2,
        head_dim=head_dim,
        position=position,
        how=how,
        rotated=rotated,
    )


@pytest.mark.parametrize("position", [0, 700])
def test_masked_groups_return_zeros_and_read_no_cache(operators, draw, poisoned, assert_near, position):
    heads, kv_heads, head_dim = 8, 4, 64
    how, at = Attention(scale=0.125), torch.tensor([position], dtype=torch.int32, device="cuda")
    qkv = draw((heads + 2 * kv_heads) * head_dim)
    keys, values = (draw(kv_heads, POSITIONS, head_dim, dtype=torch.bfloat16) for _ in range(2))
    whole_keys, whole_values = keys[None].clone(), values[None].clone()
    want = reference.attend(qkv[None], whole_keys, whole_values, at, *angles_of(head_dim), how)[0]
    groups = torch.tensor([1, 0, 0, 1], dtype=torch.int32, device="cuda")
    keys[1:3, :position], values[1:3, :position] = torch.nan, torch.nan
    out = poisoned(heads * head_dim)
    angles = angles_of(head_dim)
    operators.attend(out, qkv, keys[None], values[None], position=at, angles=angles, how=how, groups=groups)
    kept = groups.bool().repeat_interleave(heads // kv_heads)
    out, want = out.view(heads, head_dim), want.view(heads, head_dim)
    assert (out[~kept] == 0).all()
    assert_near(out[kept], want[kept])
    assert_near(keys[:, position], whole_keys[0, :, position], limit=5e-3)


@pytest.mark.parametrize("position", [60, 700])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 100])
def test_sequences_of_a_batch_see_their_own_cache_without_its_padding(
    operators, draw, poisoned, assert_near, position, batch, window
):
    heads, kv_heads, head_dim = 14, 2, 64
    how, at = Attention(scale=0.125, window=window), torch.tensor([position], dtype=torch.int32, device="cuda")
    qkv, padding = draw(batch, (heads + 2 * kv_heads) * head_dim), torch.randint(0, 60, (batch,), device="cuda")
    keys, values = (draw(batch, kv_heads, POSITIONS, head_dim, dtype=torch.bfloat16) for _ in range(2))
    whole_keys, whole_values = keys.clone(), values.clone()
    want = reference.attend(qkv, whole_keys, whole_values, at, *angles_of(head_dim), how, padding)
    for sequence, pad in enumerate(padding.tolist()):
        keys[sequence, :, :pad] = values[sequence, :, :pad] = torch.nan
    out = poisoned(batch, heads * head_dim)
    operators.attend(out, qkv, keys, values, position=at, angles=angles_of(head_dim), how=how, padding=padding)
    assert_near(out, want, limit=3e-3)
    assert_near(keys[:, :, position], whole_keys[:, :, position], limit=5e-3)
    assert torch.equal(values[:, :, position], whole_values[:, :, position])
