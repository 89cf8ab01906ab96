"""Raw recording: what is written is what the model computes, as much as was announced, also after an interruption."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import FFN, HEADS, LAYERS
from torch import Tensor

from actsparse.cli.app import main
from actsparse.data.texts import TextReader
from actsparse.errors import ActsparseError, ModelError, RunError
from actsparse.models.taps import tapped
from actsparse.pipelines import dump as dump_module
from actsparse.pipelines.profile import profile
from actsparse.pipelines.progress import Advance, Silent
from actsparse.results import Site, SiteKind
from actsparse.specs import DUMP_KINDS, DataSpec, DumpSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

SINK = 4


class Listener(Silent):
    """Keeps the notes; Ctrl-C after a number of steps of the dump."""

    def __init__(self, after: int = 0) -> None:
        self.left, self.notes = after, []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def task(self, what: str, total: int, unit: str) -> Iterator[Advance]:
        def advance(_units: int) -> None:
            if what == "dumping activations":
                self.left -= 1
                if self.left == 0:
                    raise KeyboardInterrupt

        yield advance


def dumped(
    folder: Path, prompts: Path, output: Path, dump: DumpSpec, progress: Silent | None = None, **options: object
) -> ProfileRun:
    model, data = ModelSpec(name=str(folder), device="cpu"), DataSpec(prompts=(str(prompts),))
    return profile(ProfileSpec(model=model, data=data, output=output, dump=dump, **options), progress)


def content(run: ProfileRun) -> dict[str, Tensor]:
    shards = [load_file(path) for path in run.dump]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
def test_rows_are_those_of_every_sequence_alone(
    family: str, tiny_folder: Callable, tiny_loaded: Callable, prompts_file: Path, tmp_path: Path
) -> None:
    loaded = tiny_loaded(family)
    kinds = tuple(kind for kind in DUMP_KINDS if loaded.record.gated or kind != "up")
    run = dumped(tiny_folder(family), prompts_file, tmp_path / "p", DumpSpec(layers=(1,), kinds=kinds, tokens=100))
    found = content(run)
    assert set(found) == {"token_ids", "positions", "sequences", *(f"layers.1.{kind}" for kind in kinds)}
    assert {len(rows) for rows in found.values()} == {100}
    data = DataSpec(prompts=(str(prompts_file),))
    texts = TextReader(data, loaded.tokenizer, loaded.record.max_positions, lambda _line: None).profile_sequences()
    expected: dict[str, list[Tensor]] = {}
    tokens: list[tuple[int, int, int]] = []
    loaded.model.set_attn_implementation("eager")
    for place, ids in enumerate(texts.ids):
        seen: dict[Site, Tensor] = {}

        def keep(site: Site, x: Tensor, seen: dict[Site, Tensor] = seen) -> None:
            seen[site] = x[0, SINK:]

        sites = [SiteKind(kind) for kind in kinds if kind not in ("head_norm", "attention_entropy")]
        with tapped(loaded.sites, dict.fromkeys(sites, keep), (1,)), torch.no_grad():
            output = loaded.model(input_ids=ids[None], output_attentions=True)
        for site, x in seen.items():
            expected.setdefault(f"layers.1.{site.kind}", []).append(x)
        o = seen[Site(layer=1, kind=SiteKind.ATTN_OUT)]
        weight = loaded.sites.layers[1].output_matrix(o.shape[1])
        parts = zip(o.chunk(HEADS, dim=1), weight.chunk(HEADS, dim=1), strict=True)
        norms = torch.stack([(part @ columns.T).norm(dim=1) for part, columns in parts], dim=1)
        expected.setdefault("layers.1.head_norm", []).append(norms)
        entropy = torch.tensor(
            [
                [-math.fsum(p * math.log(p) for p in row if p > 0) for row in head[SINK:].tolist()]
                for head in output.attentions[1][0]
            ]
        )
        expected.setdefault("layers.1.attention_entropy", []).append(entropy.T)
        tokens += [(place, position, int(ids[position])) for position in range(SINK, len(ids))]
    loaded.model.set_attn_implementation("sdpa")
    columns = (found[name].tolist() for name in ("sequences", "positions", "token_ids"))
    assert list(zip(*columns, strict=True)) == tokens[:100]
    for name, parts in expected.items():
        torch.testing.assert_close(found[name], torch.cat(parts)[:100], rtol=2e-3, atol=1e-4, msg=name)


def test_what_is_announced_is_what_is_written(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    listener = Listener()
    spec = DumpSpec(layers=None, kinds=("neuron", "head_norm"), tokens=64)
    run = dumped(tiny_folder("llama"), prompts_file, tmp_path / "p", spec, listener)
    per_token = LAYERS * (FFN * 4 + HEADS * 4) + 24
    announced = next(note for note in listener.notes if note.startswith("dump:"))
    assert announced.startswith(f"dump: 64 tokens x {per_token:,} bytes = ")
    assert sum(rows.numel() * rows.element_size() for rows in content(run).values()) == 64 * per_token


def test_more_tokens_than_there_are_is_all_of_them(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    run = dumped(
        tiny_folder("llama"), prompts_file, tmp_path / "p", DumpSpec(layers=(0,), kinds=("neuron",), tokens=10**6)
    )
    assert len(content(run)["positions"]) == run.measures.filter(metric="tokens")["value"][0]


def test_a_killed_dump_goes_on_to_the_same_shards(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dump_module, "SHARD_BYTES", 20_000)
    spec = DumpSpec(layers=None, kinds=("neuron", "gate"), tokens=150)
    whole = dumped(tiny_folder("llama"), prompts_file, tmp_path / "whole", spec)
    assert len(whole.dump) > 2
    with pytest.raises(KeyboardInterrupt):
        dumped(tiny_folder("llama"), prompts_file, tmp_path / "cut", spec, Listener(after=4))
    assert (tmp_path / "cut" / "shards" / "dump-00000.safetensors").exists()
    again = dumped(tiny_folder("llama"), prompts_file, tmp_path / "cut", spec)
    assert [path.name for path in again.dump] == [path.name for path in whole.dump]
    assert [path.read_bytes() for path in again.dump] == [path.read_bytes() for path in whole.dump]


def test_a_dump_that_the_disk_has_no_room_for_is_refused(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = dump_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(dump_module.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(RunError, match="the dump needs"):
        dumped(tiny_folder("llama"), prompts_file, tmp_path / "p", DumpSpec(layers=None, kinds=("neuron",)))


def test_force_removes_the_dump_of_the_run_before(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    folder, spec = tiny_folder("llama"), DumpSpec(layers=(0,), kinds=("neuron",), tokens=10)
    dumped(folder, prompts_file, tmp_path / "p", spec)
    foreign = tmp_path / "p" / "dump-mine.safetensors"
    foreign.write_bytes(b"x")
    model, data = ModelSpec(name=str(folder), device="cpu"), DataSpec(prompts=(str(prompts_file),))
    run = profile(ProfileSpec(model=model, data=data, output=tmp_path / "p", force=True))
    assert run.dump == ()
    assert [path.name for path in (tmp_path / "p").glob("dump-*")] == ["dump-mine.safetensors"]


def test_attention_that_cannot_be_read_is_said(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    spec = DumpSpec(layers=(0,), kinds=("attention_entropy",))
    with pytest.raises(ModelError, match="'falcon' gives no attention weights"):
        dumped(tiny_folder("falcon"), prompts_file, tmp_path / "p", spec)


def test_kinds_that_a_model_lacks_are_refused(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    for spec, said in (
        (DumpSpec(layers=(0,), kinds=("up",)), "no up projection"),
        (DumpSpec(layers=(7,), kinds=("neuron",)), "no layer 7"),
    ):
        with pytest.raises(ActsparseError, match=said):
            dumped(tiny_folder("opt"), prompts_file, tmp_path / "p", spec)
        assert not (tmp_path / "p" / "unfinished.json").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("neuron", "--dump cannot be"),
        ("0:", "--dump cannot be"),
        ("0:neurons", "no kind 'neurons'"),
        ("x:neuron", "--layers"),
    ],
)
def test_what_cannot_be_dumped_is_said(
    asked: str, said: str, tiny_folder: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["profile", "--model", str(tiny_folder("llama")), "--dump", asked, "-o", str(tmp_path / "p")]) == 1
    assert said in capsys.readouterr().err
