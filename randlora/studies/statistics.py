"""Which of two methods is better, and how sure that is: paired differences, corrected for the number of comparisons.

Runs are paired by seed: the same seed gives two methods the same few-shot images, order of data and augmentation. An
interval over seeds says how a difference varies with these; it takes the test images as given. With the scores of the
single examples, seeds and examples are drawn together, and the interval also covers the choice of the test set.

scipy and statsmodels do the computing; the bootstrap over two factors at once is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from randlora.errors import SettingsError

Array = np.ndarray


@dataclass(frozen=True)
class Difference:
    """A mean difference, its interval, and the two-sided p-value of a mean difference of zero."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int


def paired_difference(
    first: Mapping[int, float | Array],
    second: Mapping[int, float | Array],
    *,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Difference:
    """The mean of first - second over the seeds that both have, with the p-value of the sign-flip test.

    That p cannot fall below 2 / 2^seeds: .0625 for five seeds, .03125 for six.

    Args:
        first: by seed, a score, or the scores of all test examples (examples,) in one order.
        second: the same for the method to compare with.
        level: of the interval, between 0 and 1. It is BCa (Efron, 1987): bias-corrected and accelerated.
        resamples: of the bootstrap.
        seed: of the bootstrap's random generator.

    Raises:
        SettingsError: fewer than two shared seeds, or numbers of examples that differ.
    """
    shared = sorted(first.keys() & second.keys())
    if len(shared) < 2:
        raise SettingsError(f"{len(shared)} seeds are in both groups of runs; a paired difference needs two or more")
    shapes = {np.shape(scores[run]) for scores in (first, second) for run in shared}
    if len(shapes) > 1:
        raise SettingsError(f"the runs have scores of the shapes {sorted(shapes)}: they are of different test examples")
    differences = np.stack([np.atleast_1d(np.subtract(first[run], second[run], dtype=float)) for run in shared])
    low, high = _bca_interval(differences, level, resamples, np.random.default_rng(seed))
    return Difference(float(differences.mean()), low, high, sign_flip_p(differences.mean(1)), len(shared))


def student_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The mean of first - second over runs in one order, with Student's 95 % interval and p-value."""
    points = np.subtract(first, second)
    mean = float(points.mean())
    if np.ptp(points) <= 1e-12 * np.abs(points).max():  # no deviation to test against, but for rounding
        return Difference(mean, mean, mean, float(mean == 0), len(points))
    test = stats.ttest_1samp(points, 0.0)
    interval = test.confidence_interval(0.95)
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(points))


def sign_flip_p(differences: Sequence[float] | Array) -> float:
    """The two-sided p-value of "the signs of these paired differences are arbitrary".

    It is exact up to 16 differences, where all 2^n signs are tried, and of 65,536 random ones beyond.
    """
    result = stats.permutation_test(
        (np.asarray(differences, dtype=float),),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if len(differences) <= 16 else 2**16,
        rng=0,
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values multiplied by Holm's step-down factors (Holm, 1979), in the order given.

    Those at .05 or less control the probability of any false "better" among all comparisons at 5 %.
    """
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="holm")[1].tolist() if len(p_values) else []


@dataclass(frozen=True)
class Ranks:
    """Average ranks of methods over data sets (1 is the best), and how far apart two must be.

    `p` is Friedman's, of "all methods rank alike"; two methods differ by Nemenyi's test at 5 % where their average
    ranks are more than `critical_difference` apart (Demsar, 2006).
    """

    average: dict[str, float]
    p: float
    critical_difference: float
    data_sets: int


def average_ranks(scores: Mapping[str, Sequence[float]]) -> Ranks:
    """Ranks of methods from their scores on the same data sets, in one order; higher is better, ties share a rank.

    Raises:
        SettingsError: fewer than three methods or two data sets, or a method without a score for each of them.
    """
    counts = {len(values) for values in scores.values()}
    if len(scores) < 3 or len(counts) != 1 or min(counts) < 2:
        raise SettingsError(
            f"average ranks of {len(scores)} methods with {sorted(counts)} scores each: three methods or more are "
            "needed, each with a score on the same two data sets or more"
        )
    matrix = np.array(list(scores.values()), dtype=float)  # (methods, data sets)
    ranks = stats.rankdata(-matrix, axis=0).mean(1)
    methods, data_sets = matrix.shape
    quantile = stats.studentized_range.ppf(0.95, methods, np.inf) / math.sqrt(2)
    distance = quantile * math.sqrt(methods * (methods + 1) / (6 * data_sets))
    p = float(stats.friedmanchisquare(*matrix).pvalue)
    return Ranks(dict(zip(scores, ranks.tolist(), strict=True)), p, float(distance), data_sets)


def _bca_interval(differences: Array, level: float, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """The BCa interval of the mean of (seeds, examples), drawing seeds, and examples where there are several."""
    mean = differences.mean()
    factors = [axis for axis in (0, 1) if differences.shape[axis] > 1]
    weights = [_draw(differences.shape[axis], axis in factors, resamples, rng) for axis in (0, 1)]
    means = np.einsum("rs,se,re->r", weights[0], differences, weights[1], optimize=True)
    if np.ptp(means) == 0:
        return float(mean), float(mean)
    # The mean without one level of a factor, for the acceleration.
    left_out = [np.delete(differences, i, axis).mean() for axis in factors for i in range(differences.shape[axis])]
    sizes = [differences.shape[axis] for axis in factors for _ in range(differences.shape[axis])]
    influence = (mean - np.array(left_out)) * (np.array(sizes) - 1) / np.array(sizes)
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5) if influence.any() else 0.0
    bias = stats.norm.ppf(np.clip(((means < mean).mean() + (means <= mean).mean()) / 2, 1e-6, 1 - 1e-6))
    shifted = bias + stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(means, stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def _draw(count: int, random: bool, resamples: int, rng: np.random.Generator) -> Array:
    """How much each of `count` levels counts in each resample (resamples, count); every row sums to one."""
    if not random:
        return np.ones((resamples, count)) / count
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
