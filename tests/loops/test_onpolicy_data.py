# SPDX-License-Identifier: Apache-2.0
"""The on-policy loop with recorded data: resume, one reward scale, statistics, steps within episodes, bad data."""

import numpy as np
import pytest
import torch
from robopost_envs.lock import LockConfig, LockVectorEnv

from robopost.artefacts.checkpoint import latest, load_json, load_policy, load_tensors
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.data.batch import Spec
from robopost.data.store import Episode, EpisodeStore
from robopost.errors import CheckpointError, EnvError
from robopost.evaluate.rollout import evaluate
from robopost.loops import train
from robopost.policies.base import EPISODE_STEP

BASE = ["device=cpu", "loop.eval_episodes=2", "track.console=false", "track.tensorboard=false"]
LOCK = ["algo=hnpg", "env=lock", "env.horizon=4", "env.num_envs=5", "algo.hidden=[8]", "policy.hidden=[8]"]
PENDULUM = [
    "algo=hnpg",
    "env=Pendulum-v1",
    "env.num_envs=2",
    "policy=gaussian",
    "policy.squash=false",
    "policy.hidden=[8]",
    "algo.hidden=[8]",
    "algo.gamma=0.9",
    "algo.rollout_steps=10",
    "algo.critic_batch_size=6",
]


def record(path, horizon=4, seed=0):
    env = LockConfig(horizon=horizon)
    collect(CollectConfig(env=env, episodes=12, num_envs=6, quality=0.75, out=str(path), seed=seed))
    return path


@pytest.fixture(scope="module")
def locks(tmp_path_factory):
    return record(tmp_path_factory.mktemp("data") / "lock.zarr")


@pytest.fixture(scope="module")
def swings(tmp_path_factory):
    """Random rows of Pendulum's shapes, some episodes terminated, the last without its final observation."""
    path, rng = tmp_path_factory.mktemp("data") / "pendulum.zarr", np.random.default_rng(0)
    spec = Spec({"state": ((3,), "float32")}, 1, (-2.0,), (2.0,), 200)
    with EpisodeStore.create(path, spec=spec, fps=10.0, source="toy") as made:
        for index in range(3):
            rows = 20 if index == 2 else 21
            state = rng.normal(3.0, 2.0, (rows, 3)).astype(np.float32)
            action, reward = rng.uniform(-2, 2, (20, 1)), rng.normal(size=20)
            ends = index == 0
            made.append(
                Episode(
                    {"state": state},
                    action.astype(np.float32),
                    reward.astype(np.float32),
                    terminated=ends,
                    truncated=not ends,
                    has_final_obs=index < 2,
                )
            )
    return path


def run(words, out, steps=80):
    words = [
        *words,
        *BASE,
        f"out={out}",
        f"loop.steps={steps}",
        "loop.checkpoint_every=40",
        "loop.log_every=40",
    ]
    return train(compose(words))


@pytest.mark.parametrize("kind", ["lock", "pendulum"])
def test_train_2n_equals_train_n_resume_n_bitwise(kind, locks, swings, tmp_path):
    words = [*LOCK, f"data.path={locks}"] if kind == "lock" else [*PENDULUM, f"data.path={swings}"]
    run(words, tmp_path / "straight")
    run(words, tmp_path / "resumed", 40)
    train(compose([*words, *BASE, "loop.steps=80", "loop.log_every=40", f"resume={tmp_path / 'resumed'}"]))
    a, b = latest(tmp_path / "straight"), latest(tmp_path / "resumed")
    assert a.name == b.name == "step_000000080"
    left, right = (load_tensors(path / "model.safetensors") for path in (a, b))
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert load_json(a / "state.json") == load_json(b / "state.json")


def test_data_that_was_changed_is_not_gone_on_with(locks, tmp_path):
    folder = run([*LOCK, f"data.path={locks}"], tmp_path / "run", 40)
    other = record(tmp_path / "other.zarr", seed=50)
    with pytest.raises(CheckpointError, match=r"other.zarr has changed since"):
        train(compose([*LOCK, *BASE, f"data.path={other}", "loop.steps=80", f"resume={folder}"]))


def test_statistics_and_scale_of_rewards_are_those_of_the_data(swings, tmp_path, monkeypatch):
    from robopost.algos.online.hnpg import HNPG

    seen = []
    real = HNPG.update

    def update(self, batch):
        seen.append((batch, self._recorded.dataset.reward.clone()))
        return real(self, batch)

    monkeypatch.setattr(HNPG, "update", update)
    words = [*PENDULUM, f"data.path={swings}"]
    folder = run(words, tmp_path / "a", 20)
    run([*words, "data.reward_scale=0.5", "data.reward_shift=2"], tmp_path / "b", 20)
    (plain, rewards), (scaled, scaled_rewards) = seen
    assert torch.allclose(scaled.reward, 0.5 * plain.reward + 2)
    assert torch.allclose(scaled_rewards, 0.5 * rewards + 2)
    norm = load_policy(folder).normaliser
    assert norm.obs_shift_state.mean() == pytest.approx(3.0, abs=0.5)
    assert norm.provenance["obs"] == "meanstd"


def test_the_policy_is_told_the_step_and_evaluation_tells_it_too(locks, tmp_path, monkeypatch):
    from robopost.policies.stepwise import Stepwise

    steps, real = [], Stepwise.distribution

    def distribution(self, obs):
        steps.append(obs[EPISODE_STEP].tolist())
        return real(self, obs)

    monkeypatch.setattr(Stepwise, "distribution", distribution)
    folder = run([*LOCK, f"data.path={locks}", "algo.rollout_steps=8"], tmp_path / "run", 40)
    assert steps[:8] == [[t % 4] * 5 for t in range(8)]
    steps.clear()
    result = evaluate(load_policy(folder), LockConfig(horizon=4), episodes=3, seed=0)
    assert steps == [[t] * 3 for t in range(4)]
    assert result.lengths.tolist() == [4, 4, 4]


def test_nan_rewards_stop_the_run_before_its_first_update(locks, tmp_path, monkeypatch):
    real = LockVectorEnv.step

    def step(self, actions):
        obs, reward, *rest = real(self, actions)
        return obs, np.where(self.elapsed == 2, np.nan, reward), *rest

    monkeypatch.setattr(LockVectorEnv, "step", step)
    with pytest.raises(EnvError, match=r"reward is nan in environment 0"):
        run([*LOCK, f"data.path={locks}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
