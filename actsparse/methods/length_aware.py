"""Thresholds that know how long the prompt was (ours): the prompt statistic spreads less the longer the prompt.

A threshold fitted at 256 tokens keeps fewer neurons after a shorter prompt and more after a longer one. Here it is
fitted at several lengths and interpolated between them, linearly in log P; outside of them the nearest one serves.
"""

from bisect import bisect_left
from collections.abc import Sequence
from math import log, sqrt

from jaxtyping import Float
from torch import Tensor

from actsparse.methods.prompt_statistic import PromptStatistic

SHORTEST = 16


def fitting_lengths(prompt: int, longest: int) -> list[int]:
    """The prompt lengths to fit at, ascending: powers of two from 16, the usual prompt, and the longest."""
    powers = (1 << power for power in range(SHORTEST.bit_length() - 1, longest.bit_length()))
    return sorted({prompt, longest, *(length for length in powers if length < longest)})


def threshold_at(tokens: int, lengths: Sequence[int], thresholds: Sequence[float]) -> float:
    """The threshold for a prompt of `tokens` tokens, linear in log P between the fitted lengths."""
    right = bisect_left(lengths, tokens)
    if right == len(lengths) or lengths[right] == tokens or right == 0:
        return thresholds[min(right, len(lengths) - 1)]
    low, high = lengths[right - 1], lengths[right]
    weight = (log(tokens) - log(low)) / (log(high) - log(low))
    return (1 - weight) * thresholds[right - 1] + weight * thresholds[right]


class Margin:
    """s_j * sqrt(f) less the threshold of the prompt's length: a neuron is kept from 0 up."""

    def __init__(self, statistic: PromptStatistic, lengths: Sequence[int], thresholds: Sequence[float]) -> None:
        self._statistic = statistic
        self._lengths = lengths
        self._thresholds = thresholds

    def add(self, rows: Float[Tensor, "tokens neurons"]) -> None:
        """Add prompt tokens (sink tokens left out)."""
        self._statistic.add(rows)

    def value(self) -> Float[Tensor, " neurons"]:
        """Margins [neurons], in float64."""
        s = self._statistic.value()
        return s * sqrt(len(s)) - threshold_at(self._statistic.tokens, self._lengths, self._thresholds)
