"""HU4 and M2: gradients against finite differences, rows against a naive computation, no trace left in the model."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from tiny import FFN, LAYERS, token_ids
from torch import Tensor

from actsparse.cli.app import main
from actsparse.data.texts import TextReader
from actsparse.models.load import LoadedModel
from actsparse.models.taps import tapped
from actsparse.pipelines.probes.reading import NeuronReader
from actsparse.pipelines.probes.text import ProbeTexts, probe_texts
from actsparse.pipelines.profile import profile
from actsparse.results import Site, SiteKind
from actsparse.specs import DataSpec, ModelSpec, ProfileSpec
from actsparse.store.runs import ProfileRun

N, SINK, BLOCK = 3, 4, 48


def data_of(corpus: Path) -> DataSpec:
    return DataSpec(corpus=str(corpus), limit=N, block_length=BLOCK, prompt_length=24)


def probed(folder: Path, corpus: Path, output: Path, **options: object) -> ProfileRun:
    model = ModelSpec(name=str(folder), device="cpu")
    return profile(ProfileSpec(model=model, data=data_of(corpus), output=output, probes=("gradients",), **options))


def texts_of(loaded: LoadedModel, corpus: Path) -> ProbeTexts:
    reader = TextReader(data_of(corpus), loaded.tokenizer, loaded.record.max_positions, lambda _line: None)
    return probe_texts(reader, ("gradients",), loaded.record.vocab_size)


def loss_of(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """The sum of the NLL of every token but the first, written out."""
    logits = loaded.model(input_ids=ids[None]).logits[0].double()
    picked = logits[:-1].log_softmax(dim=-1)[torch.arange(len(ids) - 1), ids[1:]]
    return -picked.sum()


def naive_gradients(loaded: LoadedModel, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """(activations, dL/da) [positions, neurons] of every layer, through gradients of all weights too."""
    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable:
        def hook(_module: torch.nn.Module, args: tuple[Tensor]) -> None:
            args[0].retain_grad()
            inputs[layer] = args[0]

        return hook

    handles = [layer.down.register_forward_pre_hook(keep(layer.index)) for layer in loaded.sites.layers]
    loss_of(loaded, ids).backward()
    for handle in handles:
        handle.remove()
    loaded.model.zero_grad(set_to_none=True)
    return {
        layer: (a.detach().view(len(ids), -1).double(), a.grad.view(len(ids), -1).double())  # type: ignore[union-attr]
        for layer, a in inputs.items()
    }


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_gradients_are_finite_differences(family: str, tiny_loaded: Callable) -> None:
    loaded = tiny_loaded(family)
    ids = token_ids(1, 12, seed=3)[0]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    NeuronReader(loaded, tuple(range(LAYERS))).read_gradients(
        ids[None], lambda place, a, gradient: found.update({place: (a[0], gradient[0])})
    )
    for layer, position in product(range(LAYERS), (0, 5, 10)):
        gradient = found[layer][1][position]
        neuron = int(gradient.abs().argmax())
        losses = []
        for step in (-0.02, 0.02):

            def nudge(
                site: Site, a: Tensor, step: float = step, at: tuple = (layer, position, neuron)
            ) -> Tensor | None:
                if site.layer != at[0]:
                    return None
                moved = a.clone()
                moved[0, at[1], at[2]] += step
                return moved

            with tapped(loaded.sites, {SiteKind.NEURON: nudge}), torch.no_grad():
                losses.append(float(loss_of(loaded, ids)))
        assert float(gradient[neuron]) == pytest.approx((losses[1] - losses[0]) / 0.04, rel=0.05, abs=1e-3)
    assert not found[0][1][-1].any()


def test_the_model_is_left_as_it_was(tiny_loaded: Callable) -> None:
    loaded = tiny_loaded("llama")
    before = [parameter.requires_grad for parameter in loaded.model.parameters()]
    NeuronReader(loaded, (1,)).read_gradients(token_ids(1, 9), lambda *_: None)
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_are_those_of_a_naive_computation(
    family: str, tiny_folder: Callable, tiny_loaded: Callable, corpus_file: Path, tmp_path: Path
) -> None:
    run, loaded = probed(tiny_folder(family), corpus_file, tmp_path / "p"), tiny_loaded(family)
    blocks = texts_of(loaded, corpus_file).pool[:N]
    top = {layer: [0.0, 0] for layer in range(LAYERS)}
    exact = {layer: [0.0, 0] for layer in range(LAYERS)}
    theta: dict[int, list[tuple[float, float]]] = {layer: [] for layer in range(LAYERS)}
    for ids in blocks:
        for layer, (a, gradient) in naive_gradients(loaded, ids).items():
            norms = loaded.sites.layers[layer].down_matrix(FFN).double().norm(dim=0)
            total = torch.zeros(FFN, dtype=torch.float64)
            for t in range(SINK, BLOCK - 1):
                signed = a[t].sign() * gradient[t]
                chosen = (a[t].abs() * norms).topk(round(0.2 * FFN)).indices
                active = [i for i in chosen.tolist() if a[t, i] != 0]
                top[layer][0] += float(signed[active].sum())
                top[layer][1] += len(active)
                exact[layer][0] += float(signed[a[t] != 0].sum())
                exact[layer][1] += int((a[t] != 0).sum())
                salience = (a[t] * gradient[t]).abs()
                if t > SINK:
                    diversity = len(set(ids[: t + 1].tolist())) / (t + 1)
                    theta[layer].append((diversity, 1 - spearmanr(total, salience).statistic))
                total += salience
    rows = {(m["metric"], m["layer"], m["param"]): m["value"] for m in run.measures.iter_rows(named=True)}
    for layer in range(LAYERS):
        assert rows["m2", layer, "r=0.2"] == pytest.approx(top[layer][0] / top[layer][1], rel=1e-3, abs=1e-6)
        values = [value for _, value in theta[layer]]
        assert rows["hu4", layer, ""] == pytest.approx(sum(values) / len(values), abs=2e-3)
        for place in range(5):
            mine = [value for diversity, value in theta[layer] if min(4, int(diversity * 5)) == place]
            expected = pytest.approx(sum(mine) / len(mine), abs=2e-3) if mine else None
            assert rows["hu4", layer, f"bin={place / 5:g}"] == expected
        if family == "opt":
            assert rows["m2", layer, "exact=true"] == pytest.approx(
                exact[layer][0] / exact[layer][1], rel=1e-3, abs=1e-6
            )
    assert ("m2", 0, "exact=true" if family == "llama" else "exact=false") not in rows
    assert {("m2_low", None, "r=0.2"), ("hu4_high", None, "")} <= rows.keys()


def test_the_option_asks_for_the_probe(
    tiny_folder: Callable, corpus_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = ["profile", "--model", str(tiny_folder("llama")), "--corpus", str(corpus_file), "--block-length", "48"]
    assert main([*argv, "-n", "2", "--gradients", "--probes", "none", "-o", str(tmp_path / "p")]) == 0
    assert "gradients" not in capsys.readouterr().err.split("left out:")[1]
    found = ProfileRun.open(tmp_path / "p").measures["metric"].unique().to_list()
    assert {"hu4", "m2"} <= set(found)
    assert "hu1" not in found
