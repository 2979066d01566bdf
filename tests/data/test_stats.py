# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from robopost.data.stats import Running, finite_problem, moments, stats_shape


def test_large_mean_small_spread():
    """Summing squares in one pass would lose every digit here: (1e8)^2 against a variance of 1."""
    rows = np.random.default_rng(0).normal(size=(10_000, 2)) + 1e8
    running = Running.empty((2,))
    for part in np.array_split(rows, 37):
        running.update(part)
    result = running.result("id")
    np.testing.assert_allclose(result["std"], rows.std(0), rtol=1e-9)
    np.testing.assert_allclose(result["mean"], rows.mean(0), rtol=1e-14)
    assert result["count"] == 10_000
    assert result["source"] == "id"


def test_independent_of_the_cut():
    rows = np.random.default_rng(1).normal(size=(997, 3)).astype(np.float32)
    results = []
    for cuts in (1, 10, 997):
        running = Running.empty((3,))
        for part in np.array_split(rows, cuts):
            running.update(part)
        results.append(running.result(""))
    for other in results[1:]:
        np.testing.assert_allclose(other["std"], results[0]["std"], rtol=1e-12)
        assert np.array_equal(other["min"], results[0]["min"])


def test_json_is_exact_even_for_nan():
    running = Running.empty((3,))
    running.update(np.array([[0.1, np.nan, np.inf], [0.2, 1.0, 2.0]]))
    back = Running.from_json(json.loads(json.dumps(running.to_json(), allow_nan=False)))
    for name in ("mean", "m2", "low", "high"):
        assert np.array_equal(getattr(back, name), getattr(running, name), equal_nan=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_shows(value):
    rows = np.zeros((5000, 2), np.float32)
    rows[4321, 1] = value
    running = Running.empty((2,))
    for part in np.array_split(rows, 7):
        running.update(part)
    assert finite_problem({"a": Running.empty((1,)).result(""), "b": running.result("")}) == "b"


def test_images_per_channel():
    images = np.random.default_rng(2).integers(0, 256, (600, 8, 9, 3), dtype=np.uint8)
    running = Running.empty((3,))
    moments(images[:251], running)
    moments(images[251:], running)
    pixels = images.reshape(-1, 3)
    np.testing.assert_allclose(running.result("")["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(running.result("")["std"], pixels.std(0), rtol=1e-12)
    assert running.count == 600


def test_shapes():
    assert stats_shape((8, 8, 3), "uint8") == (3,)
    assert stats_shape((64,), "uint8") is None
    assert stats_shape((4,), "float32") == (4,)
