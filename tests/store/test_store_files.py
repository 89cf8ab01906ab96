import errno
import os
import resource
from pathlib import Path

import polars as pl
import pytest
import torch

from actsparse.errors import RunError
from actsparse.results import EvalRow, HeadRow, Measure, NeuronRow, TimingRow, TokenRow
from actsparse.store import arrays, files, tables, tensors

ROW_CLASSES = [Measure, NeuronRow, HeadRow, EvalRow, TokenRow, TimingRow]
WRITERS = {
    "bytes": lambda path: files.write_bytes(path, b"new" * 10_000),
    "table": lambda path: tables.write(path, pl.DataFrame({"x": range(10_000)})),
    "tensors": lambda path: tensors.write(path, {"x": torch.arange(10_000)}),
}


def example(record: type, *, empty: bool = False):
    """A row of a record class; with `empty`, None wherever it may stand."""
    schema = tables.schema_of(record)
    of_type = {pl.Int64: 3, pl.Float64: 0.25, pl.String: "a=b,c", pl.Boolean: True}
    values = {name: of_type[kind] for name, kind in schema.items()}
    return record(**values | ({name: None for name in ("value", "stderr", "layer") if name in schema} if empty else {}))


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "no disk space"), (errno.EROFS, "cannot be written")])
def test_a_refused_write_is_said_and_leaves_the_old_file_whole(tmp_path, monkeypatch, writer, call, code, said):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def failing(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(RunError, match=said) as refused:
        writer(path)
    assert str(path) in refused.value.what
    assert refused.value.hint
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_disk_that_is_really_full_is_said(small_disk, writer):
    path = small_disk / "file"
    path.write_bytes(b"old")
    (small_disk / "filler").write_bytes(b"x" * 50_000)
    with pytest.raises(RunError, match="no disk space"):
        writer(path)
    assert path.read_bytes() == b"old"
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["file", "filler"]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, writer):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "file.tmp").symlink_to(outside)
    writer(folder / "file")
    assert outside.read_bytes() == b"mine"
    assert [entry.name for entry in folder.iterdir()] == ["file"]
    assert not (folder / "file").is_symlink()


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_system_that_stops_a_write_half_way_is_said(tmp_path, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RunError, match="cannot be written"):
            writer(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_folder_that_cannot_be_made_is_said(tmp_path, writer):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        writer(tmp_path / "file" / "below")


def test_an_interrupted_write_leaves_no_trace(tmp_path):
    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(tmp_path / "file", interrupted)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_synced_before_it_is_moved_into_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    files.write_bytes(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace"]


# Tables


@pytest.mark.parametrize("record", ROW_CLASSES, ids=lambda record: record.__name__)
def test_rows_come_back_as_they_were_written(tmp_path, record):
    rows = [example(record), example(record, empty=True)]
    tables.write(tmp_path / "t.parquet", tables.frame(rows, record))
    found = tables.read(tmp_path / "t.parquet", record)
    assert [record(**row) for row in found.rows(named=True)] == rows


@pytest.mark.parametrize("record", ROW_CLASSES, ids=lambda record: record.__name__)
def test_a_table_without_rows_has_its_columns(tmp_path, record):
    tables.write(tmp_path / "t.parquet", tables.frame([], record))
    assert dict(tables.read(tmp_path / "t.parquet", record).schema) == tables.schema_of(record)


@pytest.mark.parametrize("change", ["missing", "renamed", "retyped"])
def test_a_table_of_another_schema_is_refused(tmp_path, change):
    table = tables.frame([example(HeadRow)], HeadRow)
    changed = {
        "missing": lambda: table.drop("share"),
        "renamed": lambda: table.rename({"share": "part"}),
        "retyped": lambda: table.with_columns(pl.col("index").cast(pl.Float64)),
    }
    tables.write(tmp_path / "t.parquet", changed[change]())
    with pytest.raises(RunError, match=r"t\.parquet has columns") as refused:
        tables.read(tmp_path / "t.parquet", HeadRow)
    assert "--force" in refused.value.hint


@pytest.mark.parametrize("rows", [0, 3])
def test_a_run_older_than_a_column_is_read_with_nulls(tmp_path, rows):
    whole = tables.frame([example(NeuronRow)] * rows, NeuronRow)
    tables.write(tmp_path / "t.parquet", whole.drop("expert", "tokens", "mean_square_up"))
    found = tables.read(tmp_path / "t.parquet", NeuronRow)
    assert found.schema == whole.schema
    assert found["expert"].to_list() == [None] * rows
    assert found["neuron"].to_list() == [3] * rows


def test_a_column_with_a_default_takes_it_and_one_of_a_newer_version_is_left_out(tmp_path):
    rows = [Measure(metric="rms", layer=0, kind="up", param="s=1", value=1.0, unit="1", n=2)]
    whole = tables.frame(rows, Measure)
    tables.write(tmp_path / "t.parquet", whole.drop("param", "stderr").with_columns(newer=pl.lit(1)))
    found = tables.read(tmp_path / "t.parquet", Measure)
    assert found.schema == whole.schema
    assert found.row(0, named=True) == whole.with_columns(param=pl.lit("")).row(0, named=True)


@pytest.mark.parametrize("change", ["lacks", "changes"])
def test_a_column_that_must_be_there_is_named_with_the_way_out(tmp_path, change):
    whole = tables.frame([example(NeuronRow)], NeuronRow)
    broken = (
        whole.drop("active_frac") if change == "lacks" else whole.with_columns(pl.col("active_frac").cast(pl.String))
    )
    tables.write(tmp_path / "t.parquet", broken)
    with pytest.raises(RunError, match=r"\['active_frac'\]") as refused:
        tables.read(tmp_path / "t.parquet", NeuronRow)
    assert "--force" in refused.value.hint


@pytest.mark.parametrize("keep", [0, 3, 100, -1])
def test_a_truncated_table_is_damaged(tmp_path, keep):
    path = tmp_path / "t.parquet"
    tables.write(path, tables.frame([example(Measure)] * 50, Measure))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="damaged"):
        tables.read(path, Measure)


def test_a_missing_table_is_said(tmp_path):
    with pytest.raises(RunError, match="missing"):
        tables.read(tmp_path / "t.parquet", Measure)


# Tensors


@pytest.mark.parametrize("reader", [tensors.read, arrays.read])
def test_tensors_come_back_bit_by_bit(tmp_path, reader):
    named = {"a.b": torch.randn(3, 4).T, "n": torch.arange(5), "none": torch.zeros(0, 2)}
    tensors.write(tmp_path / "t.safetensors", named)
    found = reader(tmp_path / "t.safetensors")
    assert set(found) == set(named)
    for name, tensor in named.items():
        assert torch.equal(torch.as_tensor(found[name]), tensor)


@pytest.mark.parametrize("reader", [tensors.read, arrays.read])
@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_tensors_are_damaged_and_missing_ones_missing(tmp_path, reader, keep):
    path = tmp_path / "t.safetensors"
    with pytest.raises(RunError, match="missing"):
        reader(path)
    tensors.write(path, {"x": torch.randn(20)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match="damaged"):
        reader(path)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_the_umask_says_who_may_read_a_file(tmp_path, writer):
    before = os.umask(0o027)
    try:
        writer(tmp_path / "file")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_device_or_a_pipe_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for writer in WRITERS.values():
        with pytest.raises(RunError, match="is a directory, a device or a pipe"):
            writer(path)
    assert path.is_fifo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
