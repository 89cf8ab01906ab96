import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from actsparse.core.hu1 import (
    HistoryContexts,
    choose_contexts,
    control_contexts,
    history_share,
    hu1,
    hu1_control,
)
from actsparse.core.hu2 import CodeLengths, code_length, count_types, hu2, type_labels
from actsparse.core.hu4 import hu4, theta_uncertainty, token_diversity
from actsparse.core.overlap import (
    firing_counts,
    paired_overlaps,
    popularity_rate,
    squared_sizes,
    topk_masks,
    uniform_rate,
)
from actsparse.core.root_cause import root_cause, signed_gradient_sum
from actsparse.errors import DataError

NEURONS = 200
UNIFORM = uniform_rate(NEURONS)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_stream(tokens: int, vocabulary: int, seed: int) -> torch.Tensor:
    # Squares make the ids as unequal as words are.
    return (torch.rand(tokens, generator=seeded(seed)).square() * vocabulary).long()


def masks_of(keys: torch.Tensor, seed: int = 0, neurons: int = NEURONS, density: float = 0.2) -> torch.Tensor:
    """Random masks that are equal where the keys are equal, [*keys, neurons]."""
    table = topk_masks(torch.rand(int(keys.max()) + 1, neurons, generator=seeded(seed)), density)
    return table[keys]


def spaced_contexts(types: int, histories: int) -> HistoryContexts:
    """Contexts without common text, type by type."""
    ends = torch.arange(types * histories) * 100
    return HistoryContexts(
        tokens=torch.zeros(len(ends), 64, dtype=torch.long),
        types=torch.arange(types).repeat_interleave(histories),
        ends=ends,
        length=64,
    )


class TestContexts:
    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000), length=st.sampled_from([4, 16, 64]))
    def test_the_choice_agrees_with_a_scan_per_type(self, seed, length):
        stream = random_stream(1500, 20, seed)
        kept, ids = {}, stream.tolist()
        for token in range(20):
            last, ends = -math.inf, []
            for end in range(length - 1, 1500):
                if ids[end] == token and end - last >= length:
                    ends.append(end)
                    last = end
            if len(ends) > 1:
                kept[token] = ends
        best = sorted(kept, key=lambda token: (-len(kept[token]), token))[:8]
        found = choose_contexts(stream, length=length)
        assert found.ends.tolist() == [end for token in best for end in kept[token][:8]]
        assert found.types.tolist() == [token for token in best for _ in kept[token][:8]]
        for row, end in zip(found.tokens, found.ends.tolist(), strict=True):
            assert torch.equal(row, stream[end - length + 1 : end + 1])

    def test_equal_counts_prefer_the_lower_id(self):
        stream = torch.tensor([9, 3, 7, 5] * 4)
        assert choose_contexts(stream, length=4, types=2).types.unique_consecutive().tolist() == [5, 3]
        assert choose_contexts(torch.tensor([9, 3, 7, 5] * 4 + [0, 0, 0]), length=4, types=2).types[-1] == 3

    def test_bos_stands_in_front(self):
        stream = random_stream(800, 10, 0)
        plain, fed = choose_contexts(stream), choose_contexts(stream, bos=77)
        assert fed.tokens.shape == (plain.tokens.shape[0], 65)
        assert (fed.tokens[:, 0] == 77).all()
        assert torch.equal(fed.tokens[:, 1:], plain.tokens)

    def test_a_short_stream_is_refused_with_a_hint(self):
        with pytest.raises(DataError, match="two contexts of 64") as caught:
            choose_contexts(torch.arange(200))
        assert "longer corpus" in caught.value.hint

    def test_overlapping_windows_are_those_that_share_text(self):
        contexts = HistoryContexts(
            tokens=torch.zeros(3, 64, dtype=torch.long),
            types=torch.tensor([1, 1, 2]),
            ends=torch.tensor([63, 127, 126]),
            length=64,
        )
        assert contexts.overlapping.tolist() == [[True, False, True], [False, True, True], [True, True, True]]

    def test_controls_keep_the_first_four_and_the_last_token(self):
        stream = random_stream(3000, 50, 1)
        contexts = choose_contexts(stream, bos=99)
        controls = control_contexts(contexts, stream, seed=2)
        for control in (controls.shuffled, controls.random, controls.none):
            assert torch.equal(control[:, :4], contexts.tokens[:, :4])
            assert torch.equal(control[:, -1], contexts.types)
        assert controls.none.shape == (len(contexts.types), 5)
        assert controls.shuffled.shape == controls.random.shape == contexts.tokens.shape

    def test_shuffling_keeps_the_tokens_and_random_does_not(self):
        stream = random_stream(3000, 50, 1)
        contexts = choose_contexts(stream)
        controls = control_contexts(contexts, stream)
        assert torch.equal(controls.shuffled.sort(dim=1).values, contexts.tokens.sort(dim=1).values)
        assert (controls.shuffled != contexts.tokens).any(dim=1).all()
        assert not torch.equal(controls.random.sort(dim=1).values, contexts.tokens.sort(dim=1).values)
        assert set(controls.random.unique().tolist()) <= set(stream.tolist())

    def test_other_token_puts_every_type_after_the_first_types_histories(self):
        stream = random_stream(3000, 50, 1)
        contexts = choose_contexts(stream)
        types = contexts.types.unique_consecutive()
        first = contexts.tokens[contexts.types == types[0]]
        grid = control_contexts(contexts, stream).other_token
        assert grid.shape == (len(types), len(first), 64)
        for row, token in zip(grid, types, strict=True):
            assert torch.equal(row[:, :-1], first[:, :-1])
            assert (row[:, -1] == token).all()


class TestHU1:
    types = torch.arange(8).repeat_interleave(8)

    def test_a_mask_that_the_token_decides_has_none(self):
        found = hu1(torch.stack([masks_of(self.types, seed) for seed in range(3)]), self.types, UNIFORM)
        assert [layer.value for layer in found.layers] == pytest.approx([0, 0, 0], abs=1e-6)
        assert found.mean.value == pytest.approx(0, abs=1e-6)
        assert found.mean.n == 64

    def test_a_mask_that_the_history_decides_has_all(self):
        keys = torch.arange(64)
        found = hu1(torch.stack([masks_of(keys, seed) for seed in range(6)]), self.types, UNIFORM)
        assert found.mean.value == pytest.approx(1, abs=0.02)
        assert found.mean.touches(1.0)

    def test_a_static_hot_set_counts_for_kappa_u_and_not_for_kappa_p(self):
        scores = torch.randn(20, 64, NEURONS, generator=seeded(0))
        scores[..., :30] += 3
        masks = topk_masks(scores, 0.2)
        squares = torch.cat([squared_sizes(layer) for layer in masks])
        rates = popularity_rate(torch.stack([firing_counts(layer) for layer in masks]), squares)
        plain, corrected = hu1(masks, self.types, UNIFORM), hu1(masks, self.types, rates)
        assert plain.mean.value is not None
        assert plain.mean.value < 0.55
        assert corrected.mean.value == pytest.approx(1, abs=0.03)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_it_agrees_with_loops_over_pairs(self, seed):
        types = torch.tensor([4, 4, 4, 2, 2, 7, 7, 7])
        masks = torch.rand(2, 8, 25, generator=seeded(seed)) < 0.3
        masks[0, 1] = False
        rates = torch.tensor([0.04, 0.06])
        found = hu1(masks, types, rates)
        for layer in range(2):
            means = []
            for token in (2, 4, 7):
                rows = [row for row in range(8) if types[row] == token]
                kappas = [
                    float(paired_overlaps(masks[layer, i], masks[layer, j]).kappa(rates[layer]))
                    for i in rows
                    for j in rows
                    if i < j
                ]
                means.append(torch.tensor(kappas).nanmean())
            assert found.layers[layer].value == pytest.approx(1 - float(torch.stack(means).nanmean()), abs=1e-6)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_permuting_neurons_changes_nothing(self, seed):
        masks = torch.rand(1, 64, 30, generator=seeded(seed)) < 0.3
        order = torch.randperm(30, generator=seeded(seed + 1))
        before, after = hu1(masks, self.types, 1 / 30), hu1(masks[..., order], self.types, 1 / 30)
        assert after.mean.value == pytest.approx(before.mean.value)
        assert after.mean.low == pytest.approx(before.mean.low)

    def test_the_identical_context_gives_exactly_zero(self):
        masks = masks_of(torch.arange(64))[None]
        found = hu1_control(masks, masks, self.types, UNIFORM)
        assert found.mean.value == pytest.approx(0, abs=1e-6)
        assert found.mean.high == pytest.approx(0, abs=1e-6)

    def test_a_control_is_averaged_within_types_first(self):
        types = torch.tensor([1, 1, 1, 2])
        natural = masks_of(torch.tensor([0, 1, 2, 3]))[None]
        control = natural.clone()
        control[0, 3] = natural[0, 0]
        expected = 1 - (1 + float(paired_overlaps(natural[0, 3], natural[0, 0]).kappa(UNIFORM))) / 2
        assert hu1_control(natural, control, types, UNIFORM).mean.value == pytest.approx(expected, abs=1e-6)

    def test_unrelated_controls_give_one(self):
        natural = torch.stack([masks_of(torch.arange(64), seed) for seed in range(4)])
        control = torch.stack([masks_of(torch.arange(64), seed + 10) for seed in range(4)])
        assert hu1_control(natural, control, self.types, torch.full((4,), UNIFORM)).mean.value == pytest.approx(
            1, abs=0.03
        )


class TestHistoryShare:
    contexts = spaced_contexts(8, 8)
    token = torch.arange(8)[:, None].expand(8, 8)
    history = torch.arange(8)[None, :].expand(8, 8)

    def test_masks_of_the_token_have_share_zero(self):
        found = history_share(masks_of(self.contexts.types)[None], self.contexts, masks_of(self.token)[None], UNIFORM)
        assert found.token.mean.value == pytest.approx(1, abs=1e-6)
        assert found.share.mean.value == pytest.approx(0, abs=0.05)

    def test_masks_of_the_history_have_share_one(self):
        found = history_share(masks_of(torch.arange(64))[None], self.contexts, masks_of(self.history)[None], UNIFORM)
        assert found.history.mean.value == pytest.approx(1, abs=1e-6)
        assert found.share.mean.value == pytest.approx(1, abs=0.05)

    def test_masks_of_both_lie_between_and_a_hot_set_cancels(self):
        def mixed(token: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
            parts = [masks_of(token, 1, 90), masks_of(history, 2, 90)]
            hot = torch.ones(*token.shape, 20, dtype=torch.bool)
            return torch.cat([*parts, hot], dim=-1)[None]

        natural = mixed(self.contexts.types, torch.arange(64))
        found = history_share(natural, self.contexts, mixed(self.token, self.history), UNIFORM)
        assert found.share.mean.value == pytest.approx(0.5, abs=0.06)
        assert found.share.mean.touches(0.5)
        assert found.base.mean.value is not None
        assert found.base.mean.value > 0.2

    def test_the_base_leaves_out_windows_that_share_text(self):
        ends = torch.tensor([63, 200, 64, 400])
        contexts = HistoryContexts(
            tokens=torch.zeros(4, 64, dtype=torch.long), types=torch.tensor([1, 1, 2, 2]), ends=ends, length=64
        )
        natural = masks_of(torch.tensor([0, 1, 0, 2]))[None]
        grid = masks_of(torch.tensor([[0, 1], [3, 4]]))[None]
        kappas = [
            float(paired_overlaps(natural[0, i], natural[0, j]).kappa(UNIFORM)) for i, j in ((0, 3), (1, 2), (1, 3))
        ]
        found = history_share(natural, contexts, grid, UNIFORM)
        assert found.base.mean.value == pytest.approx(sum(kappas) / 3, abs=1e-6)

    def test_no_trace_of_either_has_no_share(self):
        natural = masks_of(torch.zeros(64, dtype=torch.long))[None]
        grid = masks_of(torch.zeros(8, 8, dtype=torch.long))[None]
        assert history_share(natural, self.contexts, grid, UNIFORM).share.mean.value is None

    def test_the_mean_share_is_that_of_the_layer_means(self):
        natural = torch.stack([masks_of(self.contexts.types), masks_of(torch.arange(64))])
        grid = torch.stack([masks_of(self.token), masks_of(self.history)])
        found = history_share(natural, self.contexts, grid, UNIFORM)
        means = [part.mean.value for part in (found.history, found.token, found.base)]
        history, token, base = (value or math.nan for value in means)
        assert found.share.mean.value == pytest.approx((history - base) / (history + token - 2 * base))


def entropy_by_hand(outcomes: list[bool]) -> float:
    counts = [outcomes.count(True), outcomes.count(False)]
    seen = [count / len(outcomes) for count in counts if count]
    return -sum(share * math.log(share) for share in seen) + (len(seen) - 1) / (2 * len(outcomes))


class TestHU2:
    @staticmethod
    def lengths(masks: torch.Tensor, tokens: torch.Tensor, sequences: int = 1) -> CodeLengths:
        labels = type_labels(tokens)
        types = len(labels.types)
        typed, shuffled = (count_types(masks, part, types) for part in (labels.labels, labels.shuffled))
        nats: dict[str, list[float]] = {"typed": [], "shuffled": [], "untyped": []}
        parts = zip(*(x.tensor_split(sequences) for x in (masks, labels.labels, labels.shuffled)), strict=True)
        for of_masks, of_labels, of_shuffled in parts:
            one, other = (count_types(of_masks, part, types) for part in (of_labels, of_shuffled))
            nats["typed"].append(code_length(one, typed))
            nats["shuffled"].append(code_length(other, shuffled))
            nats["untyped"].append(code_length(one.untyped, typed.untyped))
        return CodeLengths(**{name: torch.tensor([of], dtype=torch.float64) for name, of in nats.items()})

    def ratio(self, masks: torch.Tensor, tokens: torch.Tensor, sequences: int = 1) -> dict[str, float | None]:
        found = hu2(self.lengths(masks, tokens, sequences))
        values = {"value": found.value, "uncorrected": found.uncorrected, "shuffled": found.shuffled}
        return {name: of.mean.value for name, of in values.items()}

    def test_a_mask_that_the_token_decides_leaves_nothing_open(self):
        tokens = torch.randint(8, (2000,), generator=seeded(0))
        found = self.ratio(masks_of(tokens), tokens)
        assert found["uncorrected"] == 0.0
        assert found["value"] == pytest.approx(0, abs=0.01)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000), density=st.sampled_from([0.1, 0.5]))
    def test_a_mask_that_ignores_the_token_leaves_all_open(self, seed, density):
        tokens = torch.randint(20, (2000,), generator=seeded(seed))
        found = self.ratio(torch.rand(2000, 100, generator=seeded(seed + 1)) < density, tokens)
        assert found["value"] == pytest.approx(1, abs=0.005)

    def test_the_value_weighs_neurons_by_their_entropy(self):
        tokens = torch.randint(5, (3000,), generator=seeded(0))
        free = torch.rand(3000, 60, generator=seeded(1)) < 0.2
        decided = masks_of(tokens, neurons=40, density=0.5)
        silent = torch.zeros(3000, 50, dtype=torch.bool)
        found = self.ratio(torch.cat([free, decided, silent], dim=1), tokens)
        open_entropy, all_entropy = (
            sum(entropy_by_hand(column) for column in part.mT.tolist())
            for part in (free, torch.cat([free, decided], dim=1))
        )
        assert found["value"] == pytest.approx(open_entropy / all_entropy, abs=0.005)

    def test_entropies_agree_with_loops(self):
        tokens = random_stream(600, 6, 3)
        masks = torch.rand(600, 7, generator=seeded(4)) < 0.3
        labels = type_labels(tokens)
        found = self.ratio(masks, tokens)
        frequent = [token for token in range(6) if int((tokens == token).sum()) >= 50]
        assert labels.types.tolist() == frequent
        used = [place for place in range(600) if int(tokens[place]) in frequent]
        total = conditional = 0.0
        for neuron in range(7):
            column = masks[:, neuron].tolist()
            total += entropy_by_hand([column[place] for place in used])
            for token in frequent:
                within = [column[place] for place in used if tokens[place] == token]
                conditional += len(within) / len(used) * entropy_by_hand(within)
        assert float(self.lengths(masks, tokens).untyped) == pytest.approx(total * len(used))
        assert found["uncorrected"] == pytest.approx(conditional / total)
        assert found["value"] == pytest.approx((found["uncorrected"] or 0) + 1 - (found["shuffled"] or 0))

    @settings(max_examples=5, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_permuting_neurons_or_renaming_types_changes_nothing(self, seed):
        tokens = torch.randint(4, (800,), generator=seeded(seed))
        masks = torch.rand(800, 12, generator=seeded(seed + 1)) < torch.rand(4, 12, generator=seeded(seed + 2))[tokens]
        order = torch.randperm(12, generator=seeded(seed + 3))
        plain, moved, renamed = (
            self.ratio(*of) for of in ((masks, tokens), (masks[:, order], tokens), (masks, 9 - tokens))
        )
        assert moved == pytest.approx(plain)
        assert renamed["uncorrected"] == pytest.approx(plain["uncorrected"])

    def test_sequences_share_out_what_all_tokens_take(self):
        tokens = random_stream(600, 6, 3)
        masks = torch.rand(600, 7, generator=seeded(4)) < 0.3
        whole, parts = self.lengths(masks, tokens), self.lengths(masks, tokens, 5)
        assert parts.typed.shape == (1, 5)
        for name in ("typed", "shuffled", "untyped"):
            assert float(getattr(parts, name).sum()) == pytest.approx(float(getattr(whole, name)))

    def test_what_a_sequence_adds_is_what_its_weight_changes(self):
        """The value moves as the contribution says when a sequence counts a little more."""
        tokens = torch.randint(3, (1200,), generator=seeded(5))
        masks = masks_of(tokens, neurons=30, density=0.4) ^ (torch.rand(1200, 30, generator=seeded(6)) < 0.2)
        masks[:300] ^= torch.rand(300, 30, generator=seeded(7)) < 0.2
        copies = 30
        many = masks.repeat(copies, 1), tokens.repeat(copies)
        plain = self.ratio(*many)["uncorrected"]
        moved = self.ratio(torch.cat([many[0], masks[:300]]), torch.cat([many[1], tokens[:300]]))["uncorrected"]
        lengths = self.lengths(*many, 4 * copies)
        weights = torch.ones_like(lengths.typed)
        weights[0, 0] = 2
        predicted = float((weights * lengths.typed).sum() / (weights * lengths.untyped).sum())
        assert moved - plain == pytest.approx(predicted - plain, rel=0.01)
        assert abs(predicted - plain) > 5e-4

    def test_intervals_cover_the_truth_where_sequences_differ(self):
        """Each sequence sets a part of its neurons by itself; HU2 of very many sequences is the truth."""
        neurons, length, types = 40, 200, 3
        by_type = masks_of(torch.arange(types), neurons=neurons, density=0.5)

        def draw(sequences: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = torch.randint(types, (sequences, length), generator=seeded(seed))
            own = torch.rand(sequences, 1, 1, generator=seeded(seed + 1))
            masks = torch.where(
                torch.rand(sequences, length, neurons, generator=seeded(seed + 2)) < own, by_type[tokens],
                torch.rand(sequences, length, neurons, generator=seeded(seed + 3)) < 0.5,
            )  # fmt: skip
            return masks.flatten(0, 1), tokens.flatten()

        truth = self.ratio(*draw(1500, 1))["value"]
        found = [hu2(self.lengths(*draw(24, 10 * run), 24), resamples=300).value.mean for run in range(1, 101)]
        held = sum(one.low <= truth <= one.high for one in found)
        assert held >= 86
        assert sum(one.high - one.low for one in found) / 100 < 0.4

    def test_rare_types_are_left_out_and_the_limit_takes_the_most_frequent(self):
        tokens = torch.tensor([5] * 60 + [2] * 70 + [9] * 49 + [1] * 60 + [4] * 50)
        labels = type_labels(tokens)
        assert labels.types.tolist() == [1, 2, 4, 5]
        assert (labels.labels == -1).sum() == 49
        assert torch.equal(labels.labels == -1, labels.shuffled == -1)
        assert torch.equal(labels.labels.sort().values, labels.shuffled.sort().values)
        assert not torch.equal(labels.labels, labels.shuffled)
        assert type_labels(tokens, limit=2).types.tolist() == [1, 2]

    def test_counts_merge(self):
        tokens = torch.randint(4, (400,), generator=seeded(0))
        masks = torch.rand(400, 9, generator=seeded(1)) < 0.4
        labels = type_labels(tokens).labels
        whole = count_types(masks, labels, 4)
        merged = count_types(masks[:150], labels[:150], 4).merge(count_types(masks[150:], labels[150:], 4))
        assert torch.equal(whole.active, merged.active)
        assert torch.equal(whole.tokens, merged.tokens)
        assert whole.active[2].tolist() == masks[tokens == 2].sum(dim=0).tolist()

    @pytest.mark.parametrize("always", [False, True])
    def test_a_neuron_that_rounding_flips_in_a_second_pass_costs_little(self, always):
        tokens = torch.randint(5, (1000,), generator=seeded(0))
        masks = torch.rand(1000, 30, generator=seeded(1)) < 0.2
        masks[:, 0] = always
        again = masks.clone()
        again[7, 0] = not always
        labels = type_labels(tokens).labels
        whole, flipped = (count_types(part, labels, 5) for part in (masks, again))
        plain = code_length(whole, whole)
        seen = int((tokens == tokens[7]).sum())
        others = -(seen - 1) * math.log(1 - 0.5 / seen)
        assert code_length(flipped, whole) - plain == pytest.approx(math.log(2 * seen) + others)
        assert code_length(flipped.untyped, whole.untyped) - plain < plain

    def test_neurons_that_never_vary_have_no_ratio(self):
        tokens = torch.zeros(100, dtype=torch.long)
        found = self.ratio(torch.ones(100, 3, dtype=torch.bool), tokens)
        assert set(found.values()) == {None}


class TestHU4:
    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 1000))
    def test_the_recursion_agrees_with_spearman_step_by_step(self, seed):
        salience = torch.rand(9, 20, generator=seeded(seed)).relu()
        salience[:, ::3] = 0.0
        salience[4] = 0.0
        found = theta_uncertainty(salience).tolist()
        theta = torch.zeros(20, dtype=torch.float64)
        assert math.isnan(found[0])
        for position in range(9):
            if position and position != 4:
                rho = float(spearmanr(theta.numpy(), salience[position].double().numpy())[0])
                assert found[position] == pytest.approx(1 - rho)
            theta += salience[position].double()
        assert math.isnan(found[4])

    def test_steady_salience_is_certain_and_reversed_salience_the_opposite(self):
        steady = torch.arange(1.0, 11.0).expand(5, 10).clone()
        assert theta_uncertainty(steady)[1:].tolist() == pytest.approx([0] * 4)
        steady[1] = steady[1].flip(0)
        assert float(theta_uncertainty(steady)[1]) == pytest.approx(2)

    def test_unrelated_salience_tells_nothing(self):
        found = theta_uncertainty(torch.rand(100, 500, generator=seeded(0)))
        assert float(found.nanmean()) == pytest.approx(1, abs=0.02)

    def test_permuting_neurons_changes_nothing(self):
        salience = torch.rand(20, 30, generator=seeded(1))
        moved = theta_uncertainty(salience[:, torch.randperm(30, generator=seeded(2))])
        torch.testing.assert_close(moved, theta_uncertainty(salience), equal_nan=True)

    def test_diversity_counts_distinct_ids_so_far(self):
        tokens = random_stream(50, 12, 0)
        expected = [len(set(tokens[: t + 1].tolist())) / (t + 1) for t in range(50)]
        assert token_diversity(tokens).tolist() == pytest.approx(expected)

    def test_bins_split_the_mean(self):
        values = torch.rand(2, 6, 40, generator=seeded(0), dtype=torch.float64)
        values[:, :, 0] = math.nan
        diversity = torch.rand(6, 40, generator=seeded(1), dtype=torch.float64)
        diversity[0, 1] = 1.0
        found = hu4(values, diversity)
        assert found.uncertainty.layers[1].value == pytest.approx(float(values[1].nanmean()))
        assert [(part.low, part.high) for part in found.bins] == [
            (0, 0.2),
            (0.2, 0.4),
            (0.4, 0.6),
            (0.6, 0.8),
            (0.8, 1),
        ]
        assert sum(part.tokens for part in found.bins) == 240
        for part in found.bins:
            inside = (diversity >= part.low) & ((diversity < part.high) | (part.high == 1))
            assert part.uncertainty.layers[0].value == pytest.approx(float(values[0][inside].nanmean()))

    def test_an_empty_bin_has_no_value(self):
        found = hu4(torch.rand(1, 3, 5, generator=seeded(0)), torch.full((3, 5), 0.9))
        assert found.bins[0].uncertainty.mean.value is None
        assert found.bins[4].uncertainty.mean.value is not None


class TestRootCause:
    def test_the_sum_agrees_with_a_loop(self):
        activations, gradients = torch.randn(2, 6, 9, generator=seeded(0))
        masks = torch.rand(6, 9, generator=seeded(1)) < 0.4
        expected = sum(
            math.copysign(1, float(activations[t, i])) * float(gradients[t, i])
            for t in range(6)
            for i in range(9)
            if masks[t, i]
        )
        total, count = signed_gradient_sum(activations, gradients, masks)
        assert total == pytest.approx(expected, abs=1e-5)
        assert count == int(masks.sum())

    def test_permuting_neurons_or_turning_signs_together_changes_nothing(self):
        activations, gradients = (torch.randn(30, 12, generator=seeded(seed)) for seed in (1, 2))
        masks = torch.rand(30, 12, generator=seeded(3)) < 0.2
        plain = signed_gradient_sum(activations, gradients, masks)
        order = torch.randperm(12, generator=seeded(4))
        assert signed_gradient_sum(activations[:, order], gradients[:, order], masks[:, order]) == pytest.approx(plain)
        assert signed_gradient_sum(-activations, -gradients, masks) == pytest.approx(plain)

    def test_neurons_that_the_loss_wants_smaller_give_a_positive_mean(self):
        activations = torch.randn(12, 30, 9, generator=seeded(0))
        gradients = 0.5 * activations.sign() + torch.randn(12, 30, 9, generator=seeded(1))
        masks = topk_masks(activations.abs(), 0.2)
        parts = [signed_gradient_sum(*rows) for rows in zip(activations, gradients, masks, strict=True)]
        sums, counts = torch.tensor(parts, dtype=torch.float64).mT
        found = root_cause(torch.stack([sums, -sums]), torch.stack([counts, counts]))
        assert found.layers[0].value == pytest.approx(0.5, abs=0.1)
        assert not found.layers[0].touches(0.0)
        assert found.layers[1].value == pytest.approx(-(found.layers[0].value or 0))
