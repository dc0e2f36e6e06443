"""The statistical engine: right on known distributions, and honest when it cannot know."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import stats


def noisy_pairs(ratio, count, noise, seed, drift=0.0):
    """Pairs whose true ratio is known; both sides share the machine's drift."""
    rng = np.random.default_rng(seed)
    mood = np.exp(drift * np.sin(np.linspace(0, 9, count)))
    base = 1e-3 * mood * np.exp(noise * rng.standard_normal(count))
    new = 1e-3 * ratio * mood * np.exp(noise * rng.standard_normal(count))
    return base, new


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_promises():
    covered = 0
    for seed in range(200):
        result = stats.compare_pairs(*noisy_pairs(1.1, 60, 0.1, seed))
        covered += result.low <= 1.1 <= result.high
    assert covered >= 180  # 95 % promised; the block bootstrap of a median is known to fall a little short


def test_few_pairs_get_an_interval_that_still_covers():
    covered = 0
    for seed in range(200):
        result = stats.compare_pairs(*noisy_pairs(1.1, 4, 0.1, seed))
        covered += result.low <= 1.1 <= result.high
    assert covered >= 182


def test_shared_drift_cancels_in_pairs_but_not_in_separate_samples():
    base, new = noisy_pairs(1.05, 200, 0.01, 3, drift=0.5)
    paired, separate = stats.compare_pairs(base, new), stats.compare_samples(base, new)
    assert paired.verdict == "slower"
    assert (paired.high - paired.low) < 0.1 * (separate.high - separate.low)


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.0, "same"), (1.1, "slower"), (0.9, "faster"), (1.021, "undecidable")]
)
def test_verdicts(ratio, verdict):
    assert stats.compare_pairs(*noisy_pairs(ratio, 400, 0.01, 1)).verdict == verdict


def test_noise_is_undecidable_not_same():
    assert stats.compare_pairs(*noisy_pairs(1.0, 12, 0.5, 1)).verdict == "undecidable"


def test_one_pair_decides_nothing():
    result = stats.compare_pairs([1.0], [3.0])
    assert (result.verdict, result.ratio, result.low, result.high) == (
        "undecidable",
        pytest.approx(3),
        0,
        math.inf,
    )


def test_identical_samples_are_the_same_and_few_samples_are_undecidable():
    assert stats.compare_samples([1.0, 2.0], [1.0, 2.0]).verdict == "same"
    assert stats.compare_samples([1.0, 2.0], [3.0, 4.0]).verdict == "undecidable"


def test_student_quantiles_are_scipys():
    from scipy.stats import t

    expected = [t.ppf(0.975, degrees) for degrees in range(1, stats.FEW - 1)]
    assert pytest.approx(expected, abs=1e-4) == stats._STUDENT_T


def test_the_block_bootstrap_agrees_with_scipys_on_independent_data():
    from scipy.stats import bootstrap

    values = np.random.default_rng(5).lognormal(size=300)
    _, low, high = stats.median_interval(values)
    reference = bootstrap((np.log(values),), np.median, n_resamples=2000, method="percentile", rng=1)
    expected = np.exp(reference.confidence_interval)
    assert (low, high) == pytest.approx(tuple(expected), rel=0.05)


def test_blocks_widen_the_interval_of_rounds_that_depend_on_each_other():
    rng = np.random.default_rng(0)
    walk = np.repeat(rng.standard_normal(40), 10)  # each mood lasts ten rounds
    shuffled = rng.permutation(walk)
    width = [stats.median_interval(np.exp(0.1 * values)) for values in (walk, shuffled)]
    assert width[0][2] / width[0][1] > 1.3 * (width[1][2] / width[1][1] - 1) + 1


@pytest.mark.parametrize(
    ("base", "new", "message"),
    [
        ([], [1.0], "non-empty"),
        ([1.0], [1.0, 2.0], "equal lengths"),
        ([0.0], [1.0], "positive"),
        ([1.0], [math.nan], "finite"),
    ],
)
def test_bad_input_is_named(base, new, message):
    with pytest.raises(ValueError, match=message):
        stats.compare_pairs(base, new)


seconds = st.floats(1e-7, 1e3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=40), st.floats(0.1, 10))
def test_invariants(pairs, factor):
    base, new = zip(*pairs, strict=True)
    result = stats.compare_pairs(base, new)
    assert result.low <= result.ratio * (1 + 1e-12)
    assert result.ratio <= result.high * (1 + 1e-12)
    scaled = stats.compare_pairs(np.multiply(base, factor), np.multiply(new, factor))
    assert scaled.ratio == pytest.approx(result.ratio)  # units do not matter
    swapped = stats.compare_pairs(new, base)
    assert swapped.ratio == pytest.approx(1 / result.ratio)


def test_resamples_are_runs_of_neighbours():
    rows = stats.resamples(27, np.random.default_rng(0), draws=200)
    assert rows.shape == (200, 27)
    steps = (np.diff(rows, axis=1) % 27 == 1).reshape(200, 26)
    inside = np.arange(26) % 3 != 2  # blocks of the cube root of 27
    assert steps[:, inside].all()
    assert np.bincount(rows.ravel(), minlength=27).min() > 100  # each round is drawn, also across the end


def test_few_rounds_widen_an_interval_as_students_t_does():
    from scipy.stats import t

    assert stats.small_sample_factor(5) == pytest.approx(t.ppf(0.975, 4) / 1.96, rel=1e-4)
    assert stats.small_sample_factor(stats.FEW) == 1.0
    with pytest.raises(ValueError, match="2 rounds or more"):
        stats.small_sample_factor(1)
