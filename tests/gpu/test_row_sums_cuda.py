"""The CUDA pass over rows of activations against the same rows on the CPU."""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from actsparse.core import row_sums_cuda
from actsparse.core.quantiles import BINS, FIRST_BIN
from actsparse.core.row_sums import (
    add_columns,
    add_entries,
    add_positions,
    add_squares,
    numbers,
    summed_norms,
    summed_product_norms,
)
from actsparse.core.rows import ColumnSums, EntrySums, PositionSums, Rows
from actsparse.core.streaming import POSITION_EDGES

pytestmark = pytest.mark.gpu
WIDTH = 1408


@dataclass
class Sums:
    """All accumulators of one layer."""

    entries: EntrySums
    columns: ColumnSums
    positions: PositionSums
    squared: Tensor

    @classmethod
    def zeros(cls, width: int, device: str) -> "Sums":
        def ints(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=device)

        def sums(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=device)

        bins = len(POSITION_EDGES)
        return cls(
            EntrySums(ints(BINS), ints(3), sums(4), ints(2)),
            ColumnSums(ints(width), ints(width), *(sums(width) for _ in range(4))),
            PositionSums(POSITION_EDGES, sums(bins), ints(bins), ints(bins), ints(2)),
            sums(width),
        )

    def add(self, rows: Rows, norms: Tensor, positions: Tensor) -> None:
        add_entries(rows, self.entries, FIRST_BIN)
        squares, zeros = add_columns(rows, norms, rows.width // 5, self.columns)
        add_positions(positions, squares, zeros, self.positions)
        add_squares(rows, self.squared)

    def tensors(self) -> dict[str, Tensor]:
        parts = [(one, part.name) for one in (self.entries, self.columns, self.positions) for part in fields(one)]
        named = {f"{type(one).__name__}.{name}": getattr(one, name) for one, name in parts if name != "edges"}
        return {name: tensor.cpu() for name, tensor in (named | {"squared": self.squared}).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("width", [WIDTH, 37])
@pytest.mark.parametrize("shared", [None, 14_000])
def test_a_gpu_counts_and_sums_like_a_cpu(
    dtype: torch.dtype, relu: bool, width: int, shared: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row_sums_cuda.available(torch.device("cuda:0"))
    if shared is not None:
        # bins that do not all fit, and scores that are not kept between rounds
        monkeypatch.setattr(row_sums_cuda, "shared_bytes", lambda _device: shared)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 211, 2 * width, generator=generator).pow(3)
    x *= torch.exp2(torch.randint(-20, 8, (5, 211, 1), generator=generator))
    x = (x.relu() if relu else x).clamp(-60000, 60000).to(dtype)
    x[0, 3, width + 5], x[1, 7, width + 6], x[2, 9, width + 7] = float("nan"), float("inf"), -float("inf")
    x[3, 11] = 0.0
    index = torch.arange(4, 5 * 211)[torch.rand(5 * 211 - 4, generator=generator) < 0.8]
    norms, found = torch.rand(width, generator=generator), []
    for device in ("cpu", "cuda"):
        sums = Sums.zeros(width, device)
        rows = Rows.of(x.to(device)[..., width:], index.to(device))
        sums.add(rows, norms.to(device), (index % 211 * 40).to(device))
        found.append(sums.tensors() | {"numbers": numbers(rows).float().cpu()})
    cpu, gpu = found
    for name, expected in cpu.items():
        if expected.dtype == torch.int64:
            # scores that differ in the last bit of a float32 may change places at the edge of a top set
            assert int((gpu[name] - expected).abs().sum()) <= (4 if name.endswith("active") else 0), name
        else:
            # entries of both signs cancel
            rtol = 1e-4 if name == "EntrySums.sums" else 1e-5
            torch.testing.assert_close(gpu[name], expected, rtol=rtol, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouping_rows_changes_no_count_and_no_sum_by_1e_9(dtype: torch.dtype) -> None:
    x = torch.randn(700, WIDTH, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    whole, parted, again = (Sums.zeros(WIDTH, "cuda") for _ in range(3))
    norms, positions = torch.ones(WIDTH, device="cuda"), torch.arange(700, device="cuda")
    for into, sizes in ((whole, [700]), (parted, [1, 300, 399]), (again, [700])):
        for piece, at in zip(x.split(sizes), positions.split(sizes), strict=True):
            into.add(Rows.of(piece), norms, at)
    once = whole.tensors()
    for name, sums in parted.tensors().items():
        if sums.dtype == torch.int64:
            assert torch.equal(sums, once[name]), name
        else:
            torch.testing.assert_close(sums, once[name], rtol=1e-9, atol=1e-9, msg=name)
    assert all(torch.equal(sums, once[name]) for name, sums in again.tensors().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("units", "part"), [(32, 128), (3, 192), (5, 7)])
def test_norms_of_units_are_summed_like_on_a_cpu(units: int, part: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    o = torch.randn(333, units * part, generator=generator).to(dtype)
    slices = torch.randn(units, part, 64, generator=generator, dtype=torch.float64)
    o[7] = 0.0
    exact = torch.einsum("tup,upk->tuk", o.double().view(333, units, part), slices).norm(dim=2).sum(dim=0)
    grams = (slices @ slices.transpose(1, 2)).float().cuda()
    torch.testing.assert_close(summed_norms(o.cuda(), grams).cpu(), exact, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_one_group_are_those_of_the_projection(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    o, weight = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (333, 64))
    o[7] = 0.0
    exact = (o.double() @ weight.double().T).norm(dim=1).sum()[None]
    torch.testing.assert_close(summed_product_norms(o.cuda(), weight.cuda()).cpu(), exact, rtol=2e-5, atol=0.0)


def test_nothing_waits_for_the_device() -> None:
    x, index = torch.randn(64, WIDTH, device="cuda"), torch.arange(3, 60, device="cuda")
    sums, norms = Sums.zeros(WIDTH, "cuda"), torch.ones(WIDTH, device="cuda")
    sums.add(Rows.of(x, index), norms, index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add(Rows.of(x, index), norms, index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
