# SPDX-License-Identifier: Apache-2.0
"""Rollouts of chunks: decisions by hand, where episodes end inside chunks and rollouts inside decisions."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from robopost.loops.collector import Collector
from robopost.loops.decisions import collect_decisions
from robopost.loops.ranks import ALONE
from robopost.policies.base import Action
from robopost.vector import VecEnv

HORIZON, EXECUTE = 4, 3
FOREVER = (99, "time")
# Lengths and ends of the episodes of four environments.
EPISODES = [
    [FOREVER],
    [(2, "dies"), FOREVER],  # inside its first chunk
    [(4, "time"), FOREVER],  # inside its second chunk
    [(3, "dies"), (1, "both"), FOREVER],  # with its first chunk; on its first step
]


class Scripted(gym.vector.VectorEnv):
    """Observes (environment, episode, step); the i-th step since the start earns 2^i in environment 0, 3 times that in
    environment 1, and so on."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, episodes=EPISODES):
        self.episodes, self.num_envs = episodes, len(episodes)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.single_action_space = gym.spaces.Box(-1e6, 1e6, (1,), np.float32)
        self.executed = []

    def observe(self):
        return np.array([[n, self.episode[n], self.t[n]] for n in range(self.num_envs)], np.float32)

    def reset(self, *, seed=None, options=None):
        self.episode, self.t, self.index = [0] * self.num_envs, [0] * self.num_envs, 0
        return self.observe(), {}

    def step(self, actions):
        self.executed.append(actions[:, 0].tolist())
        reward = np.array([3.0**n * 2.0**self.index for n in range(self.num_envs)])
        self.index += 1
        self.t = [t + 1 for t in self.t]
        final, kinds = self.observe(), []
        for n in range(self.num_envs):
            length, kind = self.episodes[n][self.episode[n]]
            kinds.append(kind if self.t[n] == length else "")
            if kinds[-1]:
                self.episode[n], self.t[n] = self.episode[n] + 1, 0
        dies, time = (np.array([kind in (name, "both") for kind in kinds]) for name in ("dies", "time"))
        info = {"final_obs": final} if any(kinds) else {}
        return self.observe(), reward, dies, time, info


class Counting:
    """Decides for chunks that say where they were chosen: 100 environment + 10 episode + step, plus 0.1 per action."""

    needs = SimpleNamespace(gamma=0.9)

    def __init__(self, bare=False):
        spec = SimpleNamespace(action_dim=1)
        self.policy = SimpleNamespace(execute=EXECUTE, horizon=HORIZON, spec=spec)
        self.asked, self.bare = [], bare

    def decide(self, obs, generator):
        assert generator == "the policy's"
        state = obs["state"]
        name = state @ torch.tensor([100.0, 10.0, 1.0])
        self.asked.append(name.tolist())
        chunk = (name[:, None] + 0.1 * torch.arange(HORIZON))[..., None]
        if self.bare:
            return Action(chunk)
        return Action(chunk, torch.stack([name, -name], 1), torch.stack([chunk, -chunk], 1))


def collector(path="", episodes=EPISODES):
    data = SimpleNamespace(path=path, reward_scale=0.5, reward_shift=-1.0)
    ended = []
    run = SimpleNamespace(
        ranks=ALONE,
        config=SimpleNamespace(data=data),
        device=torch.device("cpu"),
        generators={"policy": "the policy's"},
        record_episode=ended.append,
        ended=ended,
    )
    made = Collector(VecEnv(Scripted(episodes)), run)
    made.obs = made.env.reset(seed=0)
    return made


def name(obs):
    return (obs["state"] @ torch.tensor([100.0, 10.0, 1.0])).tolist()


def test_decisions_by_hand():
    algo, source = Counting(), collector()
    batch = collect_decisions(source, algo, count=2)
    # Decision by decision (row), environment by environment (column); 0 where there was none.
    assert name(batch.obs) == [[0, 100, 200, 300], [3, 110, 203, 310], [0, 113, 210, 320]]
    assert batch.chunk_mask.sum(-1).tolist() == [[3, 2, 3, 3], [3, 3, 1, 1], [0, 1, 2, 2]]
    assert batch.chunk_mask.tolist()[1][2] == [True, False, False, False]
    # Steps 0 .. 5 earn 1, 2, 4, 8, 16, 32, times 3 per environment.
    earned = [[7, 3, 7, 7], [56, 28, 8, 8], [0, 32, 48, 48]]
    assert batch.reward.tolist() == [[v * 3.0**n for n, v in enumerate(row)] for row in earned]
    # What follows the last executed step: the end of an episode, never the start of the next.
    assert name(batch.next_obs) == [[3, 102, 203, 303], [6, 113, 204, 311], [0, 114, 212, 322]]
    no, yes = False, True
    assert batch.terminated.tolist() == [[no, yes, no, yes], [no, no, no, yes], [no] * 4]
    assert batch.truncated.tolist() == [[no] * 4, [no, no, yes, yes], [no] * 4]
    g, end = pytest.approx(0.9), 0.0
    assert batch.discount.tolist() == [[g, end, g, end], [g, g, g, end], [g] * 4]
    # Chunks, chains and log-probabilities are those of the observation they belong to.
    there = batch.chunk_mask.any(-1)
    chosen = torch.tensor(name(batch.obs))[there]
    torch.testing.assert_close(batch.action[there][:, 0, 0], chosen)
    assert batch.action.shape == (3, 4, HORIZON, 1)
    torch.testing.assert_close(batch.chain[there], torch.stack([batch.action, -batch.action], 2)[there])
    torch.testing.assert_close(batch.log_prob[there], torch.stack([chosen, -chosen], 1))
    for value in (batch.action, batch.chain, batch.log_prob, batch.reward, batch.obs["state"]):
        assert not value[2, 0].any()
    # Executed: the first actions of each chunk; asked: whoever had none.
    executed = [[0, 100, 200, 300], [0.1, 100.1, 200.1, 300.1], [0.2, 110, 200.2, 300.2]]
    executed += [[3, 110.1, 203, 310], [3.1, 110.2, 210, 320], [3.2, 113, 210.1, 320.1]]
    np.testing.assert_allclose(source.env.env.executed, executed, rtol=1e-6)
    assert algo.asked == [[0, 100, 200, 300], [110], [3, 203, 310], [210, 320], [113]]
    assert [figures["train/length"] for figures in source.run.ended] == [2, 3, 4, 1]
    assert source.run.ended[2]["train/return"] == 9 * 15


def test_next_rollout_begins_with_fresh_chunks_in_the_running_episodes():
    algo, source = Counting(bare=True), collector()
    collect_decisions(source, algo, count=1)
    batch = collect_decisions(source, algo, count=1)
    assert name(batch.obs) == [[3, 111, 203, 310], [0, 0, 210, 320]]
    assert name(batch.next_obs) == [[6, 114, 204, 311], [0, 0, 212, 322]]
    assert batch.chain is None
    assert batch.log_prob is None


def test_one_scale_for_recorded_and_own_rewards():
    plain = collect_decisions(collector(), Counting(), count=2)
    scaled = collect_decisions(collector(path="recorded.zarr"), Counting(), count=2)
    steps = plain.chunk_mask.sum(-1)
    torch.testing.assert_close(scaled.reward, 0.5 * plain.reward - steps)


def test_every_step_an_episode():
    """The most decisions there can be: as many as steps."""
    algo = Counting()
    batch = collect_decisions(collector(episodes=[[(1, "time")] * 9, [FOREVER]]), algo, count=2)
    assert batch.reward.shape == (6, 2)
    assert batch.truncated[:, 0].all()
    assert name(batch.next_obs)[4] == [41, 0]
    assert batch.chunk_mask.any(-1)[:, 1].tolist() == [True, True, False, False, False, False]
    assert batch.reward[:, 0].tolist() == [1, 2, 4, 8, 16, 32]
