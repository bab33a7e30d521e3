"""Intervals and rank correlations."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from clp_jax.array_types import Float


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: of the values.
        low: lower end.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap(
    values: Float[np.ndarray, "n"], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval:
    """The mean with a percentile bootstrap interval over prompts (Efron, 1979).

    Args:
        values: one for each prompt (the mean over its samples).
        confidence: in (0, 1).
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"bootstrap: values of shape {values.shape}, expected one for each prompt.")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of a few runs with Student's interval; infinitely wide for one run."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, -np.inf, np.inf)
    half = float(stats.t.ppf((1 + confidence) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


def rank_correlation(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Spearman's ρ, ties averaged; 0 when either does not vary."""
    x, y = np.asarray(x), np.asarray(y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)
