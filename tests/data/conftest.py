# SPDX-License-Identifier: Apache-2.0
"""Hand-made trajectories whose every number says where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from robopost.data.batch import Spec
from robopost.data.episode import Episode

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1000.0, -1000.0), (1000.0, 1000.0), 50)


@pytest.fixture
def spec():
    return SPEC


@pytest.fixture
def make_episode():
    def make(
        index=0, steps=4, *, terminated=False, truncated=None, final=True, extras=None, images=False, **more
    ):
        """Observation t: [100 index + t, t, index]; action t: [t, index]; reward t: t + 1 + 10 index."""
        rows = np.arange(steps + final, dtype=np.float32)
        obs = {"state": np.stack([100 * index + rows, rows, np.full_like(rows, index)], 1)}
        if images:
            obs["image"] = (np.arange(len(rows) * 192).reshape(len(rows), 8, 8, 3) + index) % 251
            obs["image"] = obs["image"].astype(np.uint8)
        time = np.arange(steps, dtype=np.float32)
        return Episode(
            obs=obs,
            action=np.stack([time, np.full_like(time, index)], 1),
            reward=time + 1 + 10 * index,
            terminated=terminated,
            truncated=not terminated if truncated is None else truncated,
            extras=extras or {},
            has_final_obs=final,
            **more,
        )

    return make
