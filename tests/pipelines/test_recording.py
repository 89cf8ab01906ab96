"""Recording: what enters the statistics, in any batch, and after an interruption."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from listening import Listener
from tiny import FFN, HEADS, LAYERS, make_model, make_tokenizer, save_tiny, token_ids
from torch import Tensor

from actsparse.data.sequences import Sequences
from actsparse.errors import ModelError
from actsparse.models.load import LoadedModel, load
from actsparse.models.taps import tapped
from actsparse.pipelines import recording as recording_module
from actsparse.pipelines.batches import PaddingSide
from actsparse.pipelines.profile import profile
from actsparse.pipelines.profile_state import MOMENT_KINDS, ProfileState
from actsparse.pipelines.progress import Silent
from actsparse.pipelines.recording import Recorder, Shards, record_sequences
from actsparse.results import Site, SiteKind, TextRecord
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec

LENGTHS = (30, 7, 18, 3, 25, 12, 4, 21)
SINK = 4


def texts() -> Sequences:
    ids = tuple(token_ids(1, length, seed=length)[0] for length in LENGTHS)
    record = TextRecord(role="profile", source="t", sha256="0", sequences=len(ids), tokens=sum(LENGTHS))
    return Sequences(ids, record)


def recorded(
    loaded: LoadedModel,
    *,
    batch_size: int | None,
    folder: Path | None = None,
    progress: Silent | None = None,
    text: Sequences | None = None,
    side: PaddingSide = "right",
) -> ProfileState:
    return record_sequences(
        loaded,
        text or texts(),
        layers=tuple(range(LAYERS)),
        slots=24,
        seed=0,
        batch_size=batch_size,
        what="recording",
        progress=progress or Silent(),
        shards=None if folder is None else Shards(folder, "state"),
        padding_side=side,
    )


def naive_rows(loaded: LoadedModel) -> dict[Site, Tensor]:
    """Every activation that counts, each sequence alone and without padding."""
    rows: dict[Site, list[Tensor]] = {}

    def keep(site: Site, x: Tensor) -> None:
        rows.setdefault(site, []).append(x[0, SINK:].double())

    kinds = [kind for kind in MOMENT_KINDS if loaded.record.gated or kind is not SiteKind.UP]
    with tapped(loaded.sites, dict.fromkeys(kinds, keep)), torch.no_grad():
        for ids in texts().ids:
            loaded.model(input_ids=ids[None], use_cache=False)
    return {site: torch.cat(parts) for site, parts in rows.items()}


@pytest.mark.parametrize(
    ("family", "batch_size", "side"),
    [(family, size, "right") for family in ("llama", "opt", "gpt2", "phi3", "falcon") for size in (1, 3, None)]
    + [(family, None, "left") for family in ("llama", "opt", "gpt2", "gpt_neo", "gptj", "falcon", "bloom", "mpt")],
)
def test_statistics_are_those_of_each_sequence_alone(
    family: str, batch_size: int | None, side: PaddingSide, tiny_loaded: Callable
) -> None:
    loaded = tiny_loaded(family)
    state = recorded(loaded, batch_size=batch_size, side=side)
    naive = naive_rows(loaded)
    tokens = sum(max(0, length - SINK) for length in LENGTHS)
    assert (state.sequences, state.tokens) == (len(LENGTHS), tokens)
    assert state.moments.keys() == naive.keys()
    for site, x in naive.items():
        found = state.moments[site]
        assert found.count == x.numel()
        assert found.total_abs == pytest.approx(float(x.abs().sum()), rel=1e-4)
        assert found.total_square == pytest.approx(float(x.square().sum()), rel=1e-4)
        assert found.largest == pytest.approx(float(x.abs().max()), rel=1e-4)
        assert found.total == pytest.approx(float(x.sum()), rel=1e-4, abs=1e-3)
    for layer, sums in state.neurons.items():
        a = naive[Site(layer=layer, kind=SiteKind.NEURON)]
        torch.testing.assert_close(sums.total_abs, a.abs().sum(0), rtol=1e-4, atol=1e-5)
        griffin = ((a / a.norm(dim=1, keepdim=True)) ** 2).sum(0)
        torch.testing.assert_close(sums.share_square, griffin, rtol=1e-4, atol=1e-6)
        assert int(sums.position_tokens.sum()) == tokens
        norms = loaded.sites.layers[layer].down_matrix(loaded.record.intermediate_size).double().norm(dim=0)
        top = (a.abs() * norms).topk(max(1, int(0.2 * a.shape[1] + 0.5)), dim=1).indices
        active = torch.bincount(top.flatten(), minlength=a.shape[1])
        assert int((sums.active - active).abs().sum()) <= 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_head_norms_against_one_head_at_a_time(family: str, tiny_loaded: Callable) -> None:
    loaded = tiny_loaded(family)
    state, o = recorded(loaded, batch_size=2), naive_rows(loaded)
    groups, width = loaded.record.kv_heads, loaded.record.head_dim
    for layer, sums in state.heads.items():
        x = o[Site(layer=layer, kind=SiteKind.ATTN_OUT)]
        matrix = loaded.sites.layers[layer].output_matrix(x.shape[1]).double()
        outputs = [x[:, h * width : (h + 1) * width] @ matrix[:, h * width : (h + 1) * width].T for h in range(HEADS)]
        naive = torch.stack([output.norm(dim=1).sum() for output in outputs])
        torch.testing.assert_close(sums.heads, naive, rtol=1e-3, atol=1e-4)
        per = HEADS // groups
        together = torch.stack([sum(outputs[g * per : (g + 1) * per]).norm(dim=1).sum() for g in range(groups)])
        torch.testing.assert_close(sums.groups, together, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_sample_is_the_same_for_every_batch_size_and_padding(side: PaddingSide, tiny_loaded: Callable) -> None:
    one = recorded(tiny_loaded("llama"), batch_size=1).reservoir
    other = recorded(tiny_loaded("llama"), batch_size=4, side=side).reservoir
    assert sorted(zip(one.keys, one.positions, strict=True)) == sorted(zip(other.keys, other.positions, strict=True))
    assert one.used == other.used == 24
    assert sorted(one.keys.tolist()) == sorted(other.keys.tolist())
    torch.testing.assert_close(one.rows(1), other.rows(1), atol=1e-5, rtol=1e-4)


def test_errors_of_cett_are_over_the_sequences_of_the_sample(tiny_loaded: Callable) -> None:
    sample = recorded(tiny_loaded("llama"), batch_size=3).reservoir
    assert len(set(sample.texts.tolist())) > 3
    rows, places, texts_of = sample.rows(1), sample.places, sample.texts
    whole = {}
    loaded = tiny_loaded("llama")
    keep = {SiteKind.NEURON: lambda _site, x: whole.setdefault(digest, x[0].clone()) is None or None}
    with tapped(loaded.sites, keep, (1,)), torch.no_grad():
        for ids in texts().ids:
            digest = np.uint64(recording_module._digest(ids)).view(np.int64).item()
            loaded.model(input_ids=ids[None], use_cache=False)
    for row, place, text in zip(rows, places.tolist(), texts_of.tolist(), strict=True):
        torch.testing.assert_close(row, whole[text][place], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("whole", "own"), [(100, 60), (7, 7), (10, 0), (2479, 1659)])
def test_a_team_is_never_shown_further_than_it_is(whole: int, own: int) -> None:
    share = recording_module._Share(whole, own)
    parts = [own // 3, own // 3, own - 2 * (own // 3)]
    shown = [share.more(part) for part in parts]
    assert min(shown) >= 0
    assert sum(shown) == (whole if own else 0)


def test_two_recordings_merge_into_one(tiny_loaded: Callable) -> None:
    loaded, whole = tiny_loaded("llama"), recorded(tiny_loaded("llama"), batch_size=1)
    parts = [recorded(loaded, batch_size=1, text=texts().take(chosen)) for chosen in ((0, 1, 2), (3, 4, 5, 6, 7))]
    parts[0].merge(parts[1])
    assert (parts[0].tokens, parts[0].sequences) == (whole.tokens, whole.sequences)
    for site, moments in whole.moments.items():
        assert torch.equal(parts[0].moments[site].histogram.counts, moments.histogram.counts)
        assert parts[0].moments[site].total_square == pytest.approx(moments.total_square, rel=1e-9)
    assert torch.equal(parts[0].reservoir.rows(0), whole.reservoir.rows(0))


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_an_interrupted_recording_resumes_to_the_same_bits(
    stop: int, tiny_loaded: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "CHECKPOINT_SECONDS", -1.0)
    loaded = tiny_loaded("llama")
    whole = recorded(loaded, batch_size=2).tensors()
    with pytest.raises(KeyboardInterrupt):
        recorded(loaded, batch_size=2, folder=tmp_path, progress=Listener("recording", stop))
    again = Listener("recording", 0)
    resumed = recorded(loaded, batch_size=2, folder=tmp_path, progress=again).tensors()
    assert any("resuming: " in note for note in again.notes) == (stop > 1)
    assert resumed.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_resuming_with_another_batch_size_counts_nothing_twice(
    tiny_loaded: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "CHECKPOINT_SECONDS", -1.0)
    loaded = tiny_loaded("llama")
    whole = recorded(loaded, batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        recorded(loaded, batch_size=2, folder=tmp_path, progress=Listener("recording", 3))
    resumed = recorded(loaded, batch_size=3, folder=tmp_path)
    assert (resumed.sequences, resumed.tokens) == (whole.sequences, whole.tokens)
    site = Site(layer=0, kind=SiteKind.NEURON)
    assert resumed.moments[site].count == whole.moments[site].count == whole.tokens * FFN


def spec_of(folder: Path, prompts: Path, output: Path, **options: object) -> ProfileSpec:
    return ProfileSpec(
        model=ModelSpec(name=str(folder), device="cpu"),
        data=DataSpec(prompts=(str(prompts),)),
        output=output,
        **options,
    )


def test_profile_twice_is_up_to_date(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    spec = spec_of(tiny_folder("llama"), prompts_file, tmp_path / "p")
    first = profile(spec)
    stamps = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    listener = Listener("recording", 1)
    second = profile(spec, listener)
    assert any("up to date" in note for note in listener.notes)
    assert second.manifest == first.manifest
    assert stamps == {path.name: path.stat().st_mtime_ns for path in second.path.iterdir()}


def test_an_interrupted_profile_resumes_to_the_same_tables(
    tiny_folder: Callable, prompts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "CHECKPOINT_SECONDS", -1.0)
    folder = tiny_folder("llama")
    whole = profile(spec_of(folder, prompts_file, tmp_path / "whole", batch_size=4))
    spec = spec_of(folder, prompts_file, tmp_path / "cut", batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        profile(spec, Listener("recording", 3))
    assert (tmp_path / "cut" / "unfinished.json").exists()
    assert not (tmp_path / "cut" / "manifest.json").exists()
    again = profile(spec)
    assert again.measures.equals(whole.measures)
    assert again.neurons.equals(whole.neurons)
    assert again.heads.equals(whole.heads)
    assert not (again.path / "shards").exists()


def test_a_profile_of_some_layers_has_these_only(tiny_folder: Callable, prompts_file: Path, tmp_path: Path) -> None:
    run = profile(spec_of(tiny_folder("opt"), prompts_file, tmp_path / "p", layers=(1,)))
    assert run.neurons["layer"].unique().to_list() == [1]
    assert run.neurons.height == FFN
    assert set(run.measures["layer"].drop_nulls().to_list()) == {1}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in whose second layer one neuron's up projection gives infinities."""
    folder = tmp_path_factory.mktemp("models") / "broken"
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 3e38
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_infinite_activations_are_named_and_counted_and_stand_in_no_share(
    broken: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run = profile(spec_of(broken, prompts_file, tmp_path / "p"))
    said = [text for text in run.warnings if "layer 1, up" in text]
    counted = run.measures.filter(metric="not_finite", layer=1, kind="up")["value"].to_list()
    assert counted[0] > 0
    assert said == [f"layer 1, up: {int(counted[0])} activations are NaN or infinite"]
    assert run.measures.filter(metric="not_finite", layer=0).height == 0
    assert run.measures.filter(metric="rms", layer=1, kind="up")["value"].is_finite().all()
    assert run.measures.filter(metric="zero_frac")["value"].max() == 0.0
    assert set(run.measures.filter(metric="position_zero_frac")["layer"]) == {0}


def test_strict_stops_at_infinite_activations(broken: Path, prompts_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"layer 1, \w+: \d+ activations are NaN or infinite"):
        profile(spec_of(broken, prompts_file, tmp_path / "p", strict=True))
    assert not (tmp_path / "p" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {"num_key_value_heads": 1}), ("falcon", {"multi_query": True})]
)
def test_multi_query_attention_holds_no_matrix_of_all_heads(family: str, changes: dict, tmp_path: Path) -> None:
    """Its one KV group's output is that of the projection, whose weights the model holds anyway."""
    loaded = load(ModelSpec(name=str(save_tiny(family, tmp_path / "m", **changes)), device="cpu"))
    assert loaded.record.kv_heads == 1
    state = recorded(loaded, batch_size=4)
    width = loaded.record.head_dim
    per_layer = 4 * HEADS * width**2 + 4 * FFN
    assert Recorder(loaded, state, seed=0).constant_bytes == LAYERS * per_layer
    assert LAYERS * per_layer < LAYERS * 4 * (HEADS * width) ** 2
    rows = naive_rows(loaded)
    for layer in range(LAYERS):
        outputs = rows[Site(layer=layer, kind=SiteKind.ATTN_OUT)].double()
        weight = loaded.sites.layers[layer].output_matrix(HEADS * width).double()
        norms = (outputs @ weight.T).norm(dim=1).sum()
        assert float(state.heads[layer].groups) == pytest.approx(float(norms), rel=1e-5)
