"""Router training: losses against loops, learning of what can be learnt, early stop, determinism, divergence."""

import math

import pytest
import torch
from torch import Tensor

from actsparse.core.router_training import (
    DivergedError,
    Examples,
    RouterWeights,
    Schedule,
    corrected,
    recall_at,
    soft_bce,
    train,
    weighted_bce,
)

TOKENS, HIDDEN, UNITS, KEPT = 400, 8, 20, 6


def linear_task(seed: int = 0) -> Examples:
    """Which of 20 units are in the top 6 of a random linear map: a router can know all of it."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(UNITS, HIDDEN, generator=generator)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    scores = x @ truth.T
    labels = scores >= scores.topk(KEPT).values[:, -1:]
    return Examples(x[:300], labels[:300], x[300:], labels[300:], KEPT)


def learn(examples: Examples, loss=weighted_bce, **schedule) -> tuple:
    counted: list[int] = []
    start = RouterWeights.drawn(HIDDEN, HIDDEN, UNITS, 0)
    plan = Schedule(**({"epochs": 30, "batch": 32, "rate": 0.01} | schedule))
    return train(start, examples, loss, plan, counted.append), counted, plan


def test_the_loss_is_the_weighted_cross_entropy_of_the_definition() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.5, -0.5]])
    labels = torch.tensor([[True, False, False], [False, True, False]])
    unused, total = 2 / 6 + 0.005, 0.0
    for row, truth in zip(logits.tolist(), labels.tolist(), strict=True):
        for logit, yes in zip(row, truth, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total -= math.log(p) if yes else unused * math.log(1 - p)
    assert float(weighted_bce(logits, labels)) == pytest.approx(total / 6, rel=1e-5)


def test_soft_targets_are_scaled_to_the_largest_of_their_token() -> None:
    logits = torch.tensor([[0.3, -1.2], [1.0, 2.0]])
    naive = 0.0
    for row, target in zip(logits.tolist(), [(1.0, 0.25), (0.0, 0.0)], strict=True):
        for logit, y in zip(row, target, strict=True):
            p = 1 / (1 + math.exp(-logit))
            naive -= y * math.log(p) + (1 - y) * math.log(1 - p)
    assert float(soft_bce(logits, torch.tensor([[8.0, 2.0], [0.0, 0.0]]))) == pytest.approx(naive / 4, rel=1e-5)


def test_recall_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(3)
    scores, labels = torch.randn(30, 9, generator=generator), torch.rand(30, 9, generator=generator) < 0.3
    labels[4] = False
    naive = []
    for row, truth in zip(scores.tolist(), labels.tolist(), strict=True):
        used = {i for i, yes in enumerate(truth) if yes}
        if used:
            top = set(sorted(range(9), key=lambda i: -row[i])[:4])
            naive.append(len(top & used) / min(4, len(used)))
    assert recall_at(scores, labels, 4).tolist() == pytest.approx(naive)


def test_corrected_recall_is_0_at_chance_and_1_at_best() -> None:
    assert corrected(0.3, 3, 10) == pytest.approx(0.0)
    assert corrected(1.0, 3, 10) == pytest.approx(1.0)
    assert corrected(1.0, 10, 10) == 1.0


def test_what_is_linear_is_learnt() -> None:
    found, _, _ = learn(linear_task())
    assert corrected(found.recall, KEPT, UNITS) > 0.85
    held = linear_task()
    again = recall_at(found.weights.logits(held.held_x), held.held_labels, KEPT)
    assert found.recall == pytest.approx(float(again.mean()))


def test_what_is_noise_is_not_learnt_and_stops_early() -> None:
    task = linear_task()
    generator = torch.Generator().manual_seed(9)
    shuffled = Examples(
        task.x,
        task.target[torch.randperm(300, generator=generator)],
        task.held_x,
        task.held_labels[torch.randperm(100, generator=generator)],
        KEPT,
    )
    found, counted, plan = learn(shuffled, patience=2)
    assert corrected(found.recall, KEPT, UNITS) < 0.3
    assert len(found.recalls) < plan.epochs
    assert len(found.recalls) - found.epoch == 2
    assert sum(counted) == plan.steps(300) * plan.epochs


def test_the_best_epoch_is_kept_not_the_last() -> None:
    found, _, _ = learn(linear_task(), rate=0.3, epochs=8, patience=8)
    assert found.recall == max(found.recalls)
    assert found.recalls[found.epoch - 1] == found.recall


def test_training_is_deterministic_under_a_seed() -> None:
    one, again, other = (learn(linear_task(), epochs=2, seed=seed)[0].weights for seed in (5, 5, 6))
    assert torch.equal(one.first, again.first)
    assert torch.equal(one.second, again.second)
    assert not torch.equal(one.second, other.second)


def test_a_tanh_stands_between_the_layers_only_when_asked() -> None:
    weights = RouterWeights.drawn(4, 3, 5, 1)
    x = torch.randn(2, 4)
    assert torch.allclose(weights.logits(x), x @ weights.first.T @ weights.second.T)
    curved = RouterWeights(weights.first, weights.second, tanh=True)
    assert torch.allclose(curved.logits(x), torch.tanh(x @ weights.first.T) @ weights.second.T)
    assert weights.numel == 3 * 4 + 5 * 3


def test_a_rate_that_is_too_high_is_an_error_not_a_router() -> None:
    with pytest.raises(DivergedError, match=r"epoch 1"):
        learn(linear_task(), rate=1e38)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_no_numbers_are_an_error(value: float) -> None:
    task = linear_task()
    x: Tensor = task.x.clone()
    x[3, 2] = value
    with pytest.raises(DivergedError, match="an input is infinite or no number before training"):
        learn(Examples(x, task.target, task.held_x, task.held_labels, KEPT))
