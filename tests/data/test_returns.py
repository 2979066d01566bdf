# SPDX-License-Identifier: Apache-2.0
"""Returns-to-go of recorded and of new experience."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError, DataError

SPEC = Spec({"state": ((2,), "float32")}, 1, (-1.0,), (1.0,))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Acceptance check of Cal-QL's returns: rewards, ending, returns with gamma = 0.5, and with sparse_reward.
TRAJECTORIES = {
    "terminal": ([1.0, 2.0, 4.0], "terminated", [3.0, 4.0, 4.0], [3.0, 4.0, 4.0]),
    "time-out": ([2.0, 0.0, -4.0], "truncated", [1.0, -2.0, -4.0], [1.0, -2.0, -4.0]),
    "sparse failure": ([-1.0, -1.0, -1.0], "truncated", [-1.75, -1.5, -1.0], [-2.0, -2.0, -2.0]),
    "sparse success": ([-1.0, -1.0, 0.0], "terminated", [-1.5, -1.0, 0.0], [-1.5, -1.0, 0.0]),
    "constant, terminal": ([-1.0, -1.0, -1.0], "terminated", [-1.75, -1.5, -1.0], [-1.75, -1.5, -1.0]),
}
RETURNS = ("return_to_go",)


def add_rewards(buffer, rewards, terminated, truncated):
    """One step: arrays (N,)."""
    n = buffer.num_envs
    obs = {"state": np.zeros((n, 2), np.float32)}
    flags = (np.asarray(flag, bool) for flag in (terminated, truncated))
    buffer.add(obs, np.zeros((n, 1), np.float32), np.asarray(rewards, np.float32), obs, *flags)


def returns_in(buffer, gamma=0.5):
    return buffer.transitions_at(torch.arange(len(buffer)), gamma=gamma, extra=RETURNS).extra["return_to_go"]


@pytest.mark.parametrize("sparse", [False, True])
def test_by_hand(sparse):
    """Terminal, time-out, sparse failure, and an episode that still runs: buffer and dataset agree."""
    names = list(TRAJECTORIES)
    buffer = ReplayBuffer(SPEC, 100, len(names) + 1, return_gamma=0.5, sparse_reward=sparse)
    for step in range(3):
        assert (returns_in(buffer) == -float("inf")).all() if step else True
        ends = [
            [step == 2 and TRAJECTORIES[name][1] == kind for name in names]
            for kind in ("terminated", "truncated")
        ]
        rewards = [TRAJECTORIES[name][0][step] for name in names]
        add_rewards(buffer, [*rewards, 5.0], [*ends[0], False], [*ends[1], False])
    expected = np.array([TRAJECTORIES[name][3 if sparse else 2] for name in names]).T
    got = returns_in(buffer).numpy().reshape(3, -1)
    np.testing.assert_array_equal(got[:, :-1], expected)
    assert (got[:, -1] == -np.inf).all()  # the sixth still runs

    episodes = [
        Episode(
            {"state": np.zeros((4, 2), np.float32)},
            np.zeros((3, 1), np.float32),
            np.array(rewards, np.float32),
            terminated=ending == "terminated",
            truncated=ending == "truncated",
        )
        for rewards, ending, *_ in TRAJECTORIES.values()
    ]
    recorded = Dataset.from_episodes(episodes, SPEC, sparse_reward=sparse)
    extra = recorded.transitions_at(torch.arange(15), gamma=0.5, extra=RETURNS).extra
    np.testing.assert_array_equal(extra["return_to_go"].numpy().reshape(-1, 3), expected.T)


def expected_returns(log, gamma, kept):
    """(kept, N) by a loop over (rewards, ended) of the newest steps."""
    out = np.full((kept, len(log[0][0])), -np.inf)
    for env in range(out.shape[1]):
        value = None
        for back, (rewards, ended) in enumerate(reversed(log[-kept:])):
            if ended[env]:
                value = 0.0
            if value is not None:
                value = float(rewards[env]) + gamma * value
                out[kept - 1 - back, env] = value
    return out


@pytest.mark.parametrize(
    ("num_envs", "length", "p_end"), [(1, 7, 0.3), (3, 5, 0.3), (2, 6, 0.05), (2, 4, 1.0)]
)
def test_across_the_wrap_and_a_restore(num_envs, length, p_end, tmp_path):
    """Right after every step, in episodes longer than the ring too; a restored buffer goes on bitwise."""
    make = lambda: ReplayBuffer(SPEC, length * num_envs, num_envs, return_gamma=0.9)  # noqa: E731
    buffer, log, rng = make(), [], np.random.default_rng(length)
    for step in range(60):
        rewards = rng.normal(size=num_envs).astype(np.float32)
        ended, kind = rng.random(num_envs) < p_end, rng.random(num_envs) < 0.5
        log.append((rewards, ended))
        add_rewards(buffer, rewards, ended & kind, ended & ~kind)
        kept = min(step + 1, length)
        at = (np.arange(step + 1 - kept, step + 1)) % length
        got = returns_in(buffer, 0.9).numpy().reshape(-1, num_envs)[at]
        np.testing.assert_allclose(got, expected_returns(log, 0.9, kept), rtol=1e-5)
        if step % 7 == 6:
            cursor = buffer.journal(tmp_path)
            buffer.prune(tmp_path, cursor)
            restored = make()
            restored.restore(tmp_path, cursor)
            assert torch.equal(returns_in(restored, 0.9), returns_in(buffer, 0.9))
            buffer = restored  # the rest of the run works on the restored one


def test_episodes_cut_at_a_checkpoint(tmp_path):
    """They end there, as at a time limit; the next episode starts anew."""
    buffer = ReplayBuffer(SPEC, 20, 2, return_gamma=0.5)
    add_rewards(buffer, [1, 2], [False, True], [False, False])
    add_rewards(buffer, [4, 8], [False, False], [False, False])
    buffer.cut()
    assert returns_in(buffer).tolist() == [3, 2, 4, 8]
    restored = ReplayBuffer(SPEC, 20, 2, return_gamma=0.5)
    restored.restore(tmp_path, buffer.journal(tmp_path))
    for one in (buffer, restored):
        add_rewards(one, [16, 32], [True, False], [False, False])
        assert returns_in(one).tolist() == [3, 2, 4, 8, 16, -np.inf]


def test_errors_where_they_can_not_be_right():
    buffer = ReplayBuffer(SPEC, 10, 1)
    add_rewards(buffer, [1], [True], [False])
    with pytest.raises(
        DataError, match=r"return_to_go with gamma=0\.9: the replay buffer has return_gamma=None"
    ):
        buffer.sample(1, generator(), gamma=0.9, extra=RETURNS)
    buffer = ReplayBuffer(SPEC, 10, 1, return_gamma=1.0, sparse_reward=True)
    with pytest.raises(ConfigError, match=r"algo\.gamma=1\.0 must be below 1"):
        add_rewards(buffer, [1], [False], [True])
