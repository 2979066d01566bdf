# SPDX-License-Identifier: Apache-2.0
import math
import time

import numpy as np
import pytest

from robopost.errors import ConfigError
from robopost.evaluate.statistics import (
    Interval,
    bootstrap_mean,
    interquartile_mean,
    paired_difference,
    running,
    t_interval,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Published examples: Newcombe (1998), table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand with z = 1.959964: centre (0.8 + z^2/20) / (1 + z^2/10), half-width 0.22658.
        (8, 10, 0.490162, 0.943318),
    ],
)
def test_wilson_matches_published_values(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_ends_stay_in_range_and_mirror():
    assert wilson(0, 100).low == 0.0
    assert wilson(100, 100).high == 1.0
    for k in range(0, 51, 10):
        a, b = wilson(k, 50), wilson(50 - k, 50)
        assert a.low == pytest.approx(1 - b.high)
    empty = wilson(0, 0)
    assert math.isnan(empty.value)
    assert (empty.low, empty.high) == (0.0, 1.0)
    with pytest.raises(ConfigError, match=r"successes=5 must lie in 0\.\.4"):
        wilson(5, 4)
    with pytest.raises(ConfigError, match="level=95"):
        wilson(1, 4, level=95)


def test_wilson_covers_the_true_rate_about_95_percent_of_the_time():
    rng = np.random.default_rng(1)
    p, n = 0.85, 40
    hits = [wilson(int(k), n) for k in rng.binomial(n, p, size=4000)]
    assert np.mean([i.low <= p <= i.high for i in hits]) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_mean_agrees_with_theory_and_is_deterministic():
    values = np.random.default_rng(0).normal(10.0, 2.0, size=400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)
    assert interval == bootstrap_mean(values)
    assert interval != bootstrap_mean(values, seed=1)
    assert bootstrap_mean([3.0, 3.0]) == Interval(3.0, 3.0, 3.0, 2)
    assert bootstrap_mean([]).to_json()["value"] is None


def test_bootstrap_exact_on_two_values():
    # The mean of two draws from {0, 1} is 0, 0.5 or 1 with chances 1/4, 1/2, 1/4: the 95% interval
    # is [0, 1], the 40% one is the point 0.5.
    assert (bootstrap_mean([0.0, 1.0]).low, bootstrap_mean([0.0, 1.0]).high) == (0.0, 1.0)
    narrow = bootstrap_mean([0.0, 1.0], level=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bootstrap_is_vectorised_and_blocks_agree(monkeypatch):
    values = np.arange(1000.0)
    start = time.perf_counter()
    whole = bootstrap_mean(values)
    assert time.perf_counter() - start < 2.0
    monkeypatch.setattr("robopost.evaluate.statistics._BLOCK", 70_000)
    assert bootstrap_mean(values).low == pytest.approx(whole.low, rel=0.02)


def test_interquartile_mean_by_hand():
    # 8 values: 2 cut at each end, the middle four are 3, 4, 5, 6.
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1000]).value == 4.5
    # 5 values: 1 cut at each end.
    assert interquartile_mean([0, 1, 2, 3, 100]).value == 2.0
    assert interquartile_mean([1.0, 2.0, 6.0]).value == 3.0  # too few to cut
    trim_mean = pytest.importorskip("scipy.stats").trim_mean
    values = np.random.default_rng(3).exponential(size=101)
    assert interquartile_mean(values).value == pytest.approx(trim_mean(values, 0.25))


def test_pairing_removes_the_spread_the_starts_share():
    rng = np.random.default_rng(0)
    start = rng.normal(0, 100, size=50)
    before, after = start + rng.normal(0, 1, 50), start + 2 + rng.normal(0, 1, 50)
    gain = paired_difference(after, before)
    assert gain.value == pytest.approx(after.mean() - before.mean())
    assert gain.low > 1.0
    assert gain.high - gain.low < 1.5
    with pytest.raises(ConfigError, match="3 values after and 2 before"):
        paired_difference([1, 2, 3], [1, 2])


def test_t_interval_of_three_seeds_by_hand():
    # mean 2, sample std 1, t(0.975, 2) = 4.302653: half-width 4.302653 / sqrt(3) = 2.484138.
    interval = t_interval([1.0, 2.0, 3.0])
    assert (interval.value, interval.low) == (2.0, pytest.approx(2 - 2.484138, abs=1e-5))
    assert t_interval([5.0]) == Interval(5.0, 5.0, 5.0, 1)


@pytest.mark.parametrize(
    ("dof", "value"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272)],
)
def test_t_quantile_matches_printed_tables(dof, value):
    assert t_quantile(0.975, dof) == pytest.approx(value, abs=1e-6)


def test_running_mean_does_not_shift_or_shrink():
    line = np.arange(10.0)
    assert np.allclose(running(line, 5), line)
    assert np.allclose(running([0, 3, 0, 3, 0], 3), [0, 1, 2, 1, 0])
    assert np.allclose(running([4.0, 8.0], 9), [4.0, 8.0])


def test_interval_text_and_overlap():
    assert wilson(8, 10).text(percent=True) == "80.0 % [49.0, 94.3]"
    assert wilson(0, 0).text() == "-"
    assert Interval(1, 0, 2, 5).overlaps(Interval(3, 2, 4, 5))
    assert not Interval(1, 0, 1.9, 5).overlaps(Interval(3, 2, 4, 5))
