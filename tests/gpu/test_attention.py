"""The compiled attention against float64: any position, grouped heads, both dtypes, NaN beyond the live cache."""

import pytest
import torch

from actsparse.engine.cuda.operators import Angles
from actsparse.engine.step import reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 32, 128), (32, 8, 128), (14, 2, 64), (9, 3, 64), (4, 1, 32)]
)
@pytest.mark.parametrize("position", [0, 1, 7, 63, 513, 1023])
def test_attend(operators, draw, poisoned, assert_near, dtype, heads, kv_heads, head_dim, position):
    positions = 1024
    qkv = draw((heads + 2 * kv_heads) * head_dim)
    keys, values = (draw(kv_heads, positions, head_dim, dtype=dtype) for _ in range(2))
    keys[:, position:], values[:, position:] = torch.nan, torch.nan
    angle = torch.arange(positions, device="cuda")[:, None] * 10000.0 ** -(
        torch.arange(0, head_dim, 2, device="cuda") / head_dim
    )
    angles, at = Angles(angle.cos(), angle.sin()), torch.tensor([position], dtype=torch.int32, device="cuda")
    # The reference's cache gains the token as the kernel rounds it.
    want_keys, want_values = keys.clone(), values.clone()
    reference.attend(qkv, want_keys, want_values, at, *angles)
    want = reference.attend(
        qkv.double(), want_keys.double(), want_values.double(), at, angles.cosine.double(), angles.sine.double()
    )
    out = poisoned(heads * head_dim)
    operators.attend(out, qkv, keys, values, position=at, angles=angles)
    assert_near(out, want)
    assert_near(keys[:, position], want_keys[:, position])
    assert torch.equal(values[:, position], want_values[:, position])
    assert keys[:, position + 1 :].isnan().all(), "the cache was written past the position"
