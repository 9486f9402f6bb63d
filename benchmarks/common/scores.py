"""Scores of a model: its correct answers, relative to those of each task's own adapter."""

import functools

import numpy as np

RESAMPLES = 2000

Correct = dict[str, np.ndarray]
"""By task, which examples were answered correctly: bool ``(N,)``."""


def accuracy(correct: Correct) -> dict[str, float]:
    """Returns the accuracy by task."""
    return {name: float(np.mean(answers)) for name, answers in correct.items()}


def normalized(correct: Correct, alone: Correct) -> float:
    """Returns the mean over tasks of the accuracy over that of the task's own adapter."""
    return float(np.mean([np.mean(correct[name]) / np.mean(alone[name]) for name in correct]))


def resampled(correct: Correct, alone: Correct) -> np.ndarray:
    """Returns `normalized` of texts drawn with replacement, ``(RESAMPLES,)``.

    Each task's texts are drawn anew, the same for both models; and the same in each call, so that
    differences of two results are those on equal texts.
    """
    ratios = []
    for seed, name in enumerate(alone):
        if name in correct:
            drawn = _drawn(seed, len(alone[name]))
            ratios.append((drawn @ correct[name]) / (drawn @ alone[name]))
    return np.mean(ratios, axis=0)


@functools.lru_cache(maxsize=32)
def _drawn(seed: int, n: int) -> np.ndarray:
    """Returns how often each of n texts is drawn, ``(RESAMPLES, n)``."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return drawn.astype(np.int32)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the 2.5th and the 97.5th percentile."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
