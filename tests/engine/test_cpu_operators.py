"""The compiled CPU operators against torch, on odd sizes, with poisoned outputs and threads that share the work."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from actsparse.engine.cpu import build
from actsparse.engine.cpu.ops import (
    ACTIVATIONS,
    Attend,
    Columns,
    Decide,
    Embed,
    Gated,
    Multiply,
    NeuronSparse,
    Next,
    Norm,
    Rows,
    Top,
    bfloat,
    chunks_of,
)
from actsparse.engine.cpu.program import Program

pytestmark = pytest.mark.skipif(build.failure() is not None, reason=f"no operators: {build.failure()}")

SIZES = [(577, 131), (48, 80), (33, 1), (1, 37)]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
batches = pytest.mark.parametrize("batch", [1, 2, 8])
sizes = pytest.mark.parametrize(("width", "rows"), SIZES)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weight(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows a little apart, NaN in between: what lies there must not be read."""
    storage = torch.full((rows, width + 3), torch.nan, dtype=dtype)
    storage[:, :width] = drawn(rows, width, seed=seed) * width**-0.5
    return storage[:, :width]


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def counter() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def assert_agree(make: Callable[[], Any], outputs: tuple[str, ...] = ("out",)) -> tuple[Any, Any]:
    """Run the compiled and the torch operator on equal tensors and compare what they wrote."""
    ours, theirs = make(), make()
    Program([ours], build.library()).run()
    Program([theirs], None).run()
    for name in outputs:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-5, rtol=1e-5)
    return ours, theirs


@batches
@pytest.mark.parametrize("add", [0, 1])
@pytest.mark.parametrize("width", [1, 15, 16, 577])
def test_norm(batch: int, width: int, add: int) -> None:
    x, weights = drawn(batch, width), drawn(width)
    out = drawn(batch, width, seed=3) if add else poisoned(batch, width)
    assert_agree(
        lambda: Norm(x=x, weight=weights, out=out.clone(), batch=batch, width=width, epsilon=1e-5, scale=0.5, add=add)
    )


@dtypes
@batches
@sizes
def test_rows(width: int, rows: int, batch: int, dtype: torch.dtype) -> None:
    matrix, x, bias = weight(rows, width, dtype), drawn(batch, width), drawn(rows)
    some = torch.arange(rows)[::3].int()
    listed = torch.full((rows,), -(2**30), dtype=torch.int32)
    listed[: len(some)] = some
    common: dict[str, Any] = {"weight": matrix, "x": x, "bfloat": bfloat(matrix), "batch": batch, "rows": rows}
    common |= {"width": width, "out_stride": rows}
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({"bias": None}, poisoned(batch, rows)),
        ({"bias": bias, "scale": 0.3, "add": 1}, drawn(batch, rows, seed=5)),
        ({"bias": None, "scale": 3.0, "softcap": 2.0}, poisoned(batch, rows)),
        (
            {"index": listed, "count": torch.tensor([len(some)], dtype=torch.int32), "add": 1, "bias": bias},
            drawn(batch, rows, seed=6),
        ),
    ]
    for extra, out in cases:
        assert_agree(lambda e=extra, o=out: Rows(**common, **e, out=o.clone(), stride=matrix.stride(0)))


@dtypes
@batches
@sizes
def test_gated(width: int, rows: int, batch: int, dtype: torch.dtype) -> None:
    gate, up, x = weight(rows, width, dtype), weight(rows, width, dtype, seed=9), drawn(batch, width)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[: (rows + 1) // 2].sort().values.int()
    listed = torch.full((rows,), -(2**30), dtype=torch.int32)  # beyond `count` nothing may be read
    listed[: len(index)] = index
    count = torch.tensor([len(index)], dtype=torch.int32)
    mask = (drawn(batch, rows, seed=2) > 0).to(torch.uint8)
    for name, extra in {
        "silu": {"index": None, "count": None, "gate_bias": drawn(rows), "up_bias": drawn(rows, seed=1)},
        "gelu_tanh": {"index": listed, "count": count, "mask": None, "fill": drawn(rows)},
        "gelu": {"index": listed, "count": count, "mask": mask, "fill": None},
        "relu": {"index": None, "count": None, "mask": mask, "fill": drawn(rows)},
    }.items():

        def make(name: str = name, extra: dict = extra) -> Gated:
            return Gated(
                gate=gate, up=up, x=x, out=poisoned(batch, rows), bfloat=bfloat(gate), batch=batch, rows=rows,
                width=width, stride=gate.stride(0), activation=ACTIVATIONS[name], **extra,
            )  # fmt: skip

        ours, theirs = make(), make()
        Program([ours], build.library()).run()
        Program([theirs], None).run()
        live = rows if extra["count"] is None else len(index)
        torch.testing.assert_close(ours.out[:, :live], theirs.out[:, :live], atol=1e-5, rtol=1e-5)


@dtypes
@batches
@sizes
@pytest.mark.parametrize("gate_first", [0, 1])
def test_neuron_sparse(width: int, rows: int, batch: int, dtype: torch.dtype, gate_first: int) -> None:
    first, second, x = weight(rows, width, dtype), weight(rows, width, dtype, seed=9), drawn(batch, width)
    for threshold, fill in (
        (torch.tensor([0.25]), None),
        (drawn(rows).abs(), drawn(rows, seed=4)),
        (counter().float(), None),
    ):
        ours, _ = assert_agree(
            lambda t=threshold, f=fill: NeuronSparse(
                first=first, second=second, x=x, threshold=t, fill=f,
                first_bias=None if f is None else drawn(rows, seed=5), second_bias=f,
                out=poisoned(batch, rows), read=counter(),
                bfloat=bfloat(first), batch=batch, rows=rows, width=width, stride=first.stride(0),
                step=int(t.numel() > 1), activation=ACTIVATIONS["silu"], gate_first=gate_first,
            ),
            ("out", "read"),
        )  # fmt: skip
        assert int(ours.read) <= rows


def test_rows_of_dropped_neurons_are_not_read() -> None:
    first, second, x = weight(80, 48, torch.float32), weight(80, 48, torch.float32, seed=9), drawn(1, 48)
    value = torch.nn.functional.silu(x @ first.T)[0]
    second[value.abs() < 0.2] = torch.nan
    op = NeuronSparse(
        first=first, second=second, x=x, threshold=torch.tensor([0.2]), fill=None, out=poisoned(1, 80), read=counter(),
        bfloat=0, batch=1, rows=80, width=48, stride=first.stride(0), step=0, activation=0, gate_first=1,
    )  # fmt: skip
    Program([op], build.library()).run()
    assert op.out.isfinite().all()
    assert int(op.read) == int((value.abs() >= 0.2).sum())


def columns(matrix: Tensor, x: Tensor, **changes: Any) -> Columns:
    inputs, outputs = matrix.shape
    batch, chunks = len(x), chunks_of(len(matrix))
    plain = Columns(
        weight=matrix, x=x, threshold=torch.tensor([0.5]),
        out=poisoned(batch, outputs), scratch=poisoned(batch * (inputs + chunks * outputs)), chunks=chunks,
        list=torch.full((inputs,), -(2**30), dtype=torch.int32), read=counter(), bfloat=bfloat(matrix), batch=batch,
        inputs=inputs, outputs=outputs, stride=matrix.stride(0), out_stride=outputs,
    )  # fmt: skip
    return replace(plain, **changes)


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@dtypes
@batches
@sizes
def test_columns(width: int, rows: int, batch: int, dtype: torch.dtype) -> None:
    matrix, x = weight(rows, width, dtype), drawn(batch, rows)
    x = torch.where(drawn(batch, rows, seed=11) > 0, x, 0.0)
    score, out = drawn(rows).abs(), drawn(batch, width, seed=8)
    for changes in (
        {},
        {"score": score, "add": 1, "scale": 0.7, "dropped": poisoned(batch, rows)},
        {"keep": 1, "threshold": None},
        {"top": (rows + 2) // 3, "score": score},
        {"top": rows, "base": drawn(width), "fill": drawn(rows, seed=13)},
    ):
        assert_agree(
            lambda c=changes: columns(
                matrix, x, **{n: copied(v) for n, v in c.items()}, **({"out": out.clone()} if c.get("add") else {})
            ),
            ("out", "read", *(("dropped",) if "dropped" in changes else ())),
        )


@dtypes
def test_columns_of_listed_inputs_into_a_part_of_the_output(dtype: torch.dtype) -> None:
    matrix, x = weight(90, 70, dtype), drawn(2, 90)
    listed = torch.full((90,), -(2**30), dtype=torch.int32)
    listed[:41] = torch.randperm(90)[:41].sort().values.int()
    x[:, 41:] = torch.nan  # behind `count`
    whole = poisoned(2, 100)
    ours, theirs = (whole.clone() for _ in range(2))
    for out, handle in ((ours, build.library()), (theirs, None)):
        part = columns(
            matrix,
            x,
            index=listed,
            count=torch.tensor([41], dtype=torch.int32),
            keep=1,
            out=out[:, 20:90],
            out_stride=100,
        )
        Program([part], handle).run()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert ours[:, 20:90].isfinite().all()
    assert ours[:, :20].isnan().all()


def test_nan_is_seen() -> None:
    x = drawn(1, 60)
    x[0, 7] = torch.nan
    ours, theirs = columns(weight(60, 33, torch.float32), x), columns(weight(60, 33, torch.float32), x)
    Program([ours], build.library()).run()
    Program([theirs], None).run()
    assert ours.out.isnan().all()
    assert theirs.out.isnan().all()


@batches
def test_top(batch: int) -> None:
    score = drawn(batch, 40).round(decimals=1)  # with ties
    members = torch.randperm(120, generator=torch.Generator().manual_seed(0)).view(40, 3).int()
    members[5, 2] = -1
    always = (torch.arange(120) % 17 == 0).to(torch.uint8)
    sizes = torch.full((40,), 3, dtype=torch.int32)
    sizes[5] = 2
    cases = ((None, 1, 40, None, None), (members, 3, 120, None, always), (members, 3, 120, sizes, None))
    for units, each, neurons, size, kept in cases:
        for top in (1, 13, 40):

            def make(
                units: Any = units, each: int = each, neurons: int = neurons, top: int = top, size: Any = size,
                kept: Any = kept,
            ) -> Top:  # fmt: skip
                return Top(
                    score=score, members=units, sizes=size, always=kept,
                    index=torch.full((neurons,), -1, dtype=torch.int32),
                    count=counter().int(),
                    mask=torch.full((batch, neurons), 9, dtype=torch.uint8), read=counter(), batch=batch,
                    units=40, top=top, members_each=each, neurons=neurons,
                )  # fmt: skip

            ours, theirs = make(), make()
            Program([ours], build.library()).run()
            Program([theirs], None).run()
            assert torch.equal(ours.mask, theirs.mask)
            assert torch.equal(ours.count, theirs.count)
            assert torch.equal(ours.index[: int(ours.count)], theirs.index[: int(ours.count)])


@dtypes
@batches
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary", "window", "softcap", "norms"),
    [
        (4, 4, 16, 16, 0, 0.0, False),
        (9, 3, 64, 64, 0, 0.0, True),
        (6, 1, 24, 12, 5, 3.0, False),
        (2, 2, 8, 0, 40, 0.0, True),
    ],
)
def test_attend(
    batch: int, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, rotary: int, window: int, softcap: float,
    norms: bool,
) -> None:  # fmt: skip
    length, at = 64, 37
    angle = drawn(length, max(1, rotary // 2))
    keys, values = (drawn(batch, kv_heads, length, head_dim, seed=s).to(dtype) for s in (1, 2))
    keys[:, :, at:], values[:, :, at:] = torch.nan, torch.nan  # what is not live must not be read
    left = torch.arange(batch) % 3 * 2
    active = (drawn(batch, kv_heads, seed=6) > -0.5).to(torch.uint8)
    for open_groups in (None, active):

        def make(open_groups: Tensor | None = open_groups) -> Attend:
            return Attend(
                qkv=drawn(batch, (heads + 2 * kv_heads) * head_dim),
                q_norm=drawn(head_dim) if norms else None, k_norm=drawn(head_dim, seed=1) if norms else None,
                cosine=angle.cos() if rotary else None, sine=angle.sin() if rotary else None, keys=keys.clone(),
                values=values.clone(), position=torch.tensor([at], dtype=torch.int32), left=left, active=open_groups,
                out=poisoned(batch, heads * head_dim), scores=poisoned(batch * heads * length),
                bfloat=int(dtype == torch.bfloat16), batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                length=length, rotary=rotary, window=window, scale=head_dim**-0.5, softcap=softcap, epsilon=1e-6,
            )  # fmt: skip

        ours, theirs = make(), make()
        Program([ours], build.library()).run()
        Program([theirs], None).run()
        torch.testing.assert_close(ours.out, theirs.out, atol=2e-5, rtol=2e-5)
        assert ours.out.isfinite().all()
        for name in ("keys", "values"):
            got, want = getattr(ours, name)[:, :, at].float(), getattr(theirs, name)[:, :, at].float()
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
            assert getattr(ours, name)[:, :, at + 1 :].isnan().all()


@batches
@pytest.mark.parametrize("neurons", [1, 50, 3000])
def test_multiply(batch: int, neurons: int) -> None:
    halves = drawn(batch, 2 * neurons)
    for activation in ACTIVATIONS.values():
        assert_agree(
            lambda a=activation: Multiply(
                halves=halves, out=poisoned(batch, neurons), batch=batch, neurons=neurons, activation=a
            )
        )
    mask = (drawn(batch, neurons, seed=1) > 0).to(torch.uint8)
    halves[:, neurons:][mask == 0] = torch.nan  # the second half of a dropped neuron is not computed
    ours, _ = assert_agree(
        lambda: Multiply(
            halves=halves, mask=mask, fill=drawn(neurons, seed=2), out=poisoned(batch, neurons), batch=batch,
            neurons=neurons, activation=0,
        )
    )  # fmt: skip
    assert ours.out.isfinite().all()


@batches
@pytest.mark.parametrize("threshold", [torch.tensor([0.3]), torch.linspace(0, 1, 50)], ids=["one", "each"])
def test_decide(batch: int, threshold: Tensor) -> None:
    def make() -> Decide:
        return Decide(
            value=drawn(batch, 100)[:, 50:], threshold=threshold, index=torch.full((50,), -1, dtype=torch.int32),
            count=counter().int(), mask=torch.full((batch, 50), 9, dtype=torch.uint8), read=counter(), batch=batch,
            neurons=50, stride=100, step=int(threshold.numel() > 1), activation=0,
        )  # fmt: skip

    ours, theirs = make(), make()
    Program([ours], build.library()).run()
    Program([theirs], None).run()
    kept = int(ours.count)
    assert 0 < kept < 50 * batch
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("mask", "count", "read"))
    assert torch.equal(ours.index[:kept], theirs.index[:kept])


@dtypes
def test_embed_and_next(dtype: torch.dtype) -> None:
    table, token = weight(50, 21, dtype).contiguous(), torch.tensor([3, 49])
    assert_agree(
        lambda: Embed(
            embedding=table, token=token, out=poisoned(2, 21), bfloat=bfloat(table), batch=2, width=21, scale=4.0
        )
    )
    logits = drawn(2, 50).round(decimals=1)
    forced = torch.full((2, 9), -1)
    forced[1, 5] = 17

    def make() -> Next:
        return Next(
            logits=logits, forced=forced, token=token.clone(), tokens=torch.zeros(2, 9, dtype=torch.int64),
            position=torch.tensor([4], dtype=torch.int32), batch=2, vocab=50, length=9,
        )  # fmt: skip

    ours, _ = assert_agree(make, ("token", "tokens", "position"))
    assert ours.token.tolist() == [int(logits[0].argmax()), 17]


@dtypes
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    first, second = weight(1500, 907, dtype), weight(1500, 907, dtype, seed=9)
    wide, narrow = drawn(1, 1500), drawn(1, 907)
    plain = {"bfloat": bfloat(first), "batch": 1, "rows": 1500, "width": 907, "stride": first.stride(0)}

    def rows(add: int) -> Rows:
        return Rows(weight=first, x=narrow, bias=drawn(1500), out=drawn(1, 1500, seed=3), out_stride=1500, scale=0.7,
                    add=add, **plain)  # fmt: skip

    def gated(name: str) -> Gated:
        return Gated(gate=first, up=second, x=narrow, out=poisoned(1, 1500), fill=drawn(1500),
                     activation=ACTIVATIONS[name], **plain)  # fmt: skip

    def sparse(name: str, gate_first: int) -> NeuronSparse:
        return NeuronSparse(
            first=first, second=second, x=narrow, threshold=torch.tensor([0.2]), fill=drawn(1500), read=counter(),
            out=poisoned(1, 1500), step=0, activation=ACTIVATIONS[name], gate_first=gate_first, **plain,
        )  # fmt: skip

    def results() -> list[Tensor]:
        smooth = ("silu", "gelu_tanh")
        neurons = (sparse(name, gate_first) for name in smooth for gate_first in (0, 1))
        made = [columns(first, wide), rows(0), rows(1), *map(gated, smooth), *neurons]
        Program(made, build.library()).run()
        return [one.out for one in made]

    torch.set_num_threads(1)
    expected = results()
    assert all(one.isfinite().all() for one in expected)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert [torch.equal(*pair) for pair in zip(results(), expected, strict=True)] == [True] * len(expected)
