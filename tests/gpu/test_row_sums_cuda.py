"""The CUDA pass over rows of activations against the same rows on the CPU."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from actsparse.core.native import gpu_library
from actsparse.core.quantiles import BINS, FIRST_BIN
from actsparse.core.row_sums import ColumnSums, EntrySums, Rows, add_columns, add_entries, add_squares

pytestmark = pytest.mark.gpu
WIDTH, K = 1408, 282


def sums(device: str) -> tuple[EntrySums, ColumnSums, Tensor]:
    with torch.device(device):
        ints = {name: torch.zeros(WIDTH, dtype=torch.int64) for name in ("active", "nonzero")}
        names = ("total", "total_abs", "share_square", "largest")
        columns = ColumnSums(**ints, **{name: torch.zeros(WIDTH, dtype=torch.float64) for name in names})
        counts, apart = (torch.zeros(size, dtype=torch.int64) for size in (BINS, 3))
        entries = EntrySums(counts, apart, torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
        return entries, columns, torch.zeros(WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
def test_a_gpu_counts_and_sums_like_a_cpu(dtype: torch.dtype, relu: bool) -> None:
    assert gpu_library("row_sums.cu", torch.device("cuda:0")) is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 211, 2 * WIDTH, generator=generator).pow(3)
    x = (x.relu() if relu else x).to(dtype)
    x[0, 3, WIDTH + 5], x[1, 7, WIDTH + 6], x[2, 9, WIDTH + 7] = float("nan"), float("inf"), -float("inf")
    x[3, 11] = 0.0
    index, norms = torch.arange(4, 5 * 211, 1)[torch.rand(5 * 211 - 4, generator=generator) < 0.8], torch.rand(WIDTH)
    found = []
    for device in ("cpu", "cuda"):
        view = x.to(device)[..., WIDTH:]
        rows = Rows.of(view, index.to(device))
        entries, columns, squared = sums(device)
        add_entries(rows, entries, FIRST_BIN)
        row_squares, zeros = add_columns(rows, norms.to(device), K, columns)
        add_squares(rows, squared)
        parts = {part.name: getattr(one, part.name) for one in (entries, columns) for part in fields(one)}
        parts |= {"row_squares": row_squares, "row_zeros": zeros, "squared": squared}
        found.append({name: tensor.cpu() for name, tensor in parts.items()})
    cpu, gpu = found
    for name, expected in cpu.items():
        if expected.dtype == torch.int64:
            # scores that differ in the last bit of a float32 may change places at the edge of a top set
            assert int((gpu[name] - expected).abs().sum()) <= (4 if name == "active" else 0), name
        else:
            torch.testing.assert_close(gpu[name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_grouping_rows_changes_no_count_and_no_sum_by_1e_9() -> None:
    x = torch.randn(700, WIDTH, generator=torch.Generator().manual_seed(1)).to("cuda", torch.bfloat16)
    whole, parted = sums("cuda"), sums("cuda")
    for into, pieces in ((whole, [x]), (parted, x.split([1, 300, 399]))):
        for piece in pieces:
            add_entries(Rows.of(piece), into[0], FIRST_BIN)
            add_columns(Rows.of(piece), torch.ones(WIDTH, device="cuda"), K, into[1])
    for one, other in zip(whole[:2], parted[:2], strict=True):
        for part in fields(one):
            mine, theirs = getattr(one, part.name), getattr(other, part.name)
            if mine.dtype == torch.int64:
                assert torch.equal(mine, theirs), part.name
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9, msg=part.name)
