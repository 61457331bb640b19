"""Paired statistics against scipy's own bootstrap, enumeration by hand, and published worked examples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from randlora.errors import SettingsError
from randlora.studies.statistics import average_ranks, holm, paired_difference, sign_flip_p

DIFFERENCES = np.array([1.2, -0.3, 2.5, 0.8, 1.9, 0.1, 3.0, -0.9])


def by_seed(values: np.ndarray) -> dict[int, float]:
    return dict(enumerate(values.tolist()))


def test_the_interval_over_seeds_is_scipys_bca() -> None:
    ours = paired_difference(by_seed(DIFFERENCES), by_seed(np.zeros(8)), resamples=200_000)
    theirs = stats.bootstrap((DIFFERENCES,), np.mean, method="BCa", n_resamples=200_000, rng=1).confidence_interval
    assert ours.mean == pytest.approx(DIFFERENCES.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)
    assert ours.seeds == 8


def test_the_sign_flip_p_value_is_the_share_of_signs_by_enumeration() -> None:
    signs = np.array(list(itertools.product((1, -1), repeat=len(DIFFERENCES))))
    means = (signs * DIFFERENCES).mean(1)
    expected = (np.abs(means) >= abs(DIFFERENCES.mean()) - 1e-12).mean()
    assert sign_flip_p(DIFFERENCES) == pytest.approx(expected)


@pytest.mark.parametrize(("seeds", "smallest"), [(5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_few_seeds_cannot_give_a_small_p_value(seeds: int, smallest: float) -> None:
    # 2 / 2^seeds: only "all signs as observed" and "all reversed" are as extreme.
    assert sign_flip_p(np.linspace(1, 2, seeds)) == pytest.approx(smallest)


def test_examples_widen_the_interval_as_two_random_factors_add_their_variances() -> None:
    rng = np.random.default_rng(0)
    effects_of_seeds, effects_of_examples = rng.normal(0, 1, 40), rng.normal(0, 2, 60)
    scores = 5 + effects_of_seeds[:, None] + effects_of_examples
    zeros = dict.fromkeys(range(40), np.zeros(60))
    ours = paired_difference(dict(enumerate(scores)), zeros)
    # Oracle: the variance of a mean over two crossed factors, σ_s²/40 + σ_e²/60, with the effects' own variances.
    spread = (effects_of_seeds.var() / 40 + effects_of_examples.var() / 60) ** 0.5
    assert (ours.high - ours.low) / 2 == pytest.approx(1.96 * spread, rel=0.08)
    over_seeds = paired_difference(dict(enumerate(scores.mean(1))), dict.fromkeys(range(40), 0.0))
    assert over_seeds.mean == pytest.approx(ours.mean)
    assert over_seeds.high - over_seeds.low < 0.7 * (ours.high - ours.low)


def test_equal_differences_have_a_point_for_an_interval() -> None:
    ours = paired_difference({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert (ours.mean, ours.low, ours.high) == (1.0, 1.0, 1.0)


def test_seeds_that_only_one_method_has_take_no_part() -> None:
    ours = paired_difference({0: 2.0, 1: 3.0, 7: 99.0}, {0: 1.0, 1: 1.0, 8: -99.0})
    assert (ours.mean, ours.seeds) == (1.5, 2)
    with pytest.raises(SettingsError, match="1 seeds are in both"):
        paired_difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0})


def test_scores_of_different_examples_are_refused() -> None:
    with pytest.raises(SettingsError, match="different test examples"):
        paired_difference({0: np.zeros(3), 1: np.zeros(3)}, {0: np.zeros(2), 1: np.zeros(3)})


def test_holm_by_hand() -> None:
    # Sorted: .01·4, .02·3, .03·2, .04·1, each at least the one before, at most 1.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_average_ranks_and_the_critical_difference() -> None:
    """Demsar (JMLR 7, 2006), section 3.2.2: four classifiers on 14 data sets, critical difference 1.25 at 5 %."""
    rng = np.random.default_rng(3)
    scores = {name: rng.normal(size=14).tolist() for name in "abcd"}
    scores["a"] = [max(scores[name][i] for name in "bcd") + 1 for i in range(14)]
    ranks = average_ranks(scores)
    assert ranks.average["a"] == 1.0
    assert sum(ranks.average.values()) == pytest.approx(1 + 2 + 3 + 4)
    assert ranks.critical_difference == pytest.approx(1.25, abs=0.005)
    assert ranks.p < 0.001


def test_ties_share_a_rank() -> None:
    ranks = average_ranks({"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [0.0, 0.5]})
    assert ranks.average == {"a": 1.25, "b": 2.25, "c": 2.5}


def test_ranks_of_two_methods_are_refused() -> None:
    with pytest.raises(SettingsError, match="three methods"):
        average_ranks({"a": [1.0, 2.0], "b": [1.0, 2.0]})
