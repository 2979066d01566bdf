# SPDX-License-Identifier: Apache-2.0
"""The one face of vectorised environments: true final observations, history, NaN, autoreset mode."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from robopost.errors import EnvError
from robopost.vector import VecEnv, make_spec


class Counter(gym.Env):
    """Observation counts steps; ends after `limit`; NaN after `nan_at`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, limit, nan_at=10**9, dictionary=False):
        self.limit, self.nan_at, self.dictionary = limit, nan_at, dictionary
        if dictionary:
            self.observation_space = gym.spaces.Dict({"state": Counter.observation_space})

    def _obs(self):
        value = np.array([np.nan if self.t >= self.nan_at else self.t], float)
        return {"state": value} if self.dictionary else value

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        self.t += 1
        return self._obs(), float(self.t), self.t >= self.limit, False, {"success": self.t >= self.limit}


def vec(*limits, history=1, mode=AutoresetMode.SAME_STEP, **kwargs):
    makers = [lambda limit=limit: Counter(limit, **kwargs) for limit in limits]
    return VecEnv(SyncVectorEnv(makers, autoreset_mode=mode), history=history)


class Chooser(gym.Env):
    """Discrete actions 5, 6 and 7; the reward is the action."""

    observation_space = gym.spaces.Box(0, 1, (1,))
    action_space = gym.spaces.Discrete(3, start=5)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), float(action), False, False, {}


def test_discrete_actions_are_rounded_indices_from_the_first_one():
    env = VecEnv(SyncVectorEnv([Chooser] * 4, autoreset_mode=AutoresetMode.SAME_STEP))
    assert (env.spec.choices, env.spec.action_low, env.spec.action_high) == (3, (0.0,), (2.0,))
    env.reset(0)
    assert env.step(np.array([[0.2], [0.9], [1.6], [2.0]])).reward.tolist() == [5, 6, 7, 7]


@pytest.mark.parametrize("dictionary", [False, True])
def test_next_obs_is_the_true_final_observation(dictionary):
    env = vec(2, 3, dictionary=dictionary)
    env.reset(0)
    seen = [env.step(np.zeros((2, 1), np.float32)) for _ in range(3)]
    assert [s.next_obs["state"][:, 0].tolist() for s in seen] == [[1, 1], [2, 2], [1, 3]]
    assert [s.obs["state"][:, 0].tolist() for s in seen] == [[1, 1], [0, 2], [1, 0]]
    assert [s.terminated.tolist() for s in seen] == [[False, False], [True, False], [False, True]]
    assert [s.success.tolist() for s in seen] == [[False, False], [True, False], [False, True]]
    assert seen[0].next_obs["state"].dtype == np.float32


def test_history_repeats_the_first_observation_and_never_crosses_episodes():
    env = vec(2, history=3)
    assert env.reset(0)["state"][0, :, 0].tolist() == [0, 0, 0]
    act = np.zeros((1, 1), np.float32)
    first, second, third = env.step(act), env.step(act), env.step(act)
    assert first.obs["state"][0, :, 0].tolist() == [0, 0, 1]
    assert second.next_obs["state"][0, :, 0].tolist() == [0, 1, 2]
    assert second.obs["state"][0, :, 0].tolist() == [0, 0, 0]
    assert third.obs["state"][0, :, 0].tolist() == [0, 0, 1]


def test_nan_names_key_and_environment():
    env = VecEnv(
        SyncVectorEnv(
            [lambda: Counter(9), lambda: Counter(9, nan_at=2)], autoreset_mode=AutoresetMode.SAME_STEP
        )
    )
    env.reset(0)
    env.step(np.zeros((2, 1), np.float32))
    with pytest.raises(EnvError, match="'state' holds NaN or infinity in environment 1"):
        env.step(np.zeros((2, 1), np.float32))


def test_other_autoreset_modes_are_refused():
    with pytest.raises(EnvError, match="SAME_STEP"):
        vec(2, mode=AutoresetMode.NEXT_STEP)


def test_unsupported_spaces_are_refused():
    box = gym.spaces.Box(-1, 1, (2,))
    with pytest.raises(EnvError, match="action space MultiDiscrete"):
        make_spec(box, gym.spaces.MultiDiscrete([3, 2]))
    with pytest.raises(EnvError, match=r"Discrete\(1\) is not supported.*at least 2"):
        make_spec(box, gym.spaces.Discrete(1))
    with pytest.raises(EnvError, match="observation 'state'"):
        make_spec(gym.spaces.Discrete(3), box)
