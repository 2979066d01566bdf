# SPDX-License-Identifier: Apache-2.0
"""PROPS in the on-policy loop: plain PPO where nothing is asked of it, renewal on total steps, what does not fit."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from robopost.algos.online.props import PROPS, PROPSConfig
from robopost.artefacts.checkpoint import latest, load_json, load_tensors
from robopost.compose import compose
from robopost.errors import ConfigError, EnvError
from robopost.loops import train

POLICY = [
    "policy.hidden=[16]",
    "policy.squash=false",
    "policy.state_std=false",
    "policy.activation=tanh",
    "policy.init=orthogonal",
]
QUIET = ["loop.eval_episodes=1", "track.tensorboard=false", "track.console=false"]


@pytest.mark.parametrize("copies", [1, 3])
def test_without_behaviour_epochs_and_with_one_batch_it_is_ppo_bit_for_bit(copies, tmp_path):
    pytest.importorskip("mujoco")
    words = ["env=InvertedPendulum-v5", f"env.num_envs={copies}", "algo.rollout_steps=64", "loop.steps=768"]
    words += ["algo.target_kl=0.02", "algo.entropy_coef=0.01", "loop.log_every=192"]
    words += [*POLICY, *QUIET]
    train(compose(["algo=ppo", *words, f"out={tmp_path}/ppo"]))
    plain = ["algo.buffer_batches=1", "algo.behaviour_epochs=0", "algo.behaviour_steps=32"]
    train(compose(["algo=props", *words, *plain, f"out={tmp_path}/props"]))
    ppo, props = (latest(tmp_path / name) for name in ("ppo", "props"))
    left, right = (load_tensors(path / "policy.safetensors") for path in (ppo, props))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    left, right = (load_tensors(path / "model.safetensors") for path in (ppo, props))
    assert all(torch.equal(left[key], right[key]) for key in left), (
        "value function, optimiser and random streams"
    )
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("ppo", "props")]
    for one, other in zip(*lines, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert {k: v for k, v in one.items() if "time" not in k} == {
            k: v for k, v in other.items() if "time" not in k
        }


@pytest.mark.parametrize(
    ("copies", "times"), [(1, [0, 8, 16]), (2, [0, 4, 8, 12, 16, 20]), (6, [0, 2, 3, 4, 6, 7])]
)
def test_behaviour_policy_is_renewed_on_the_steps_of_all_copies(copies, times, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    asked, actors, real = [], [], PROPS.behaviour

    def behaviour(self, rows):
        asked.append(len(rows))
        actors.append(real(self, rows))
        return actors[-1]

    monkeypatch.setattr(PROPS, "behaviour", behaviour)
    words = [
        "env=InvertedPendulum-v5",
        f"env.num_envs={copies}",
        "algo.rollout_steps=24",
        "algo.behaviour_steps=8",
    ]
    words += ["algo.behaviour_minibatches=1", "algo.behaviour_epochs=2", "algo.batch_size=8", *POLICY, *QUIET]
    train(compose(["algo=props", *words, f"loop.steps={48 * copies}", f"out={tmp_path}/run"]))
    assert len(asked) == 2 * 24 * copies // 8
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    assert asked[: len(times)] == times
    assert all(actor is actors[0] for actor in actors)


def test_discrete_actions_go_through_the_whole_loop_and_resume_bitwise(tmp_path):
    words = [
        "env=CartPole-v1",
        "env.num_envs=2",
        "policy=categorical",
        "policy.hidden=[16]",
        "loop.steps=512",
    ]
    words += [
        "algo=props",
        "algo.rollout_steps=64",
        "algo.behaviour_steps=16",
        "algo.batch_size=32",
        *QUIET,
    ]
    words += ["loop.checkpoint_every=256", "algo.behaviour_lr=1e-2", "algo.behaviour_minibatches=2"]
    train(compose([*words, f"out={tmp_path}/straight"]))
    train(compose([*words, "loop.steps=256", f"out={tmp_path}/resumed"]))
    train(compose([*words, f"resume={tmp_path}/resumed"]))
    one, other = (latest(tmp_path / name) for name in ("straight", "resumed"))
    left, right = (load_tensors(path / "model.safetensors") for path in (one, other))
    assert left.keys() == right.keys()
    assert left["window/chain"].shape == (128, 2, 1, 1, 1)
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert load_json(one / "state.json") == load_json(other / "state.json")
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/behaviour", "policy/behaviour_steps", "policy/behaviour_kl"} <= set().union(*lines)


# -- what does not fit ------------------------------------------------------------------------------------------------


class Broken(gym.Env):
    """Rewards turn into NaN."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.zeros(2, np.float32), math.nan if self.t > 3 else 0.0, False, self.t >= 9, {}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (
            ["env=InvertedPendulum-v5", "algo.rollout_steps=100", "algo.behaviour_steps=64"],
            ConfigError,
            r"every 64 environment steps.*rollout_steps=100 x env.num_envs=1\. Fix: a divisor of 100",
        ),
        (["env=CartPole-v1"], ConfigError, r"policy=gaussian.*2 discrete actions. Fix: policy=categorical"),
        (
            ["env=InvertedPendulum-v5", "policy=categorical"],
            ConfigError,
            r"categorical.*1 continuous.*policy=gaussian",
        ),
        (
            ["env=InvertedPendulum-v5", "policy=deterministic"],
            ConfigError,
            r"log-probability.*Fix: policy=gaussian",
        ),
        (
            ["env=InvertedPendulum-v5", "policy.state_std=true", "algo.sampling_error=true"],
            ConfigError,
            r"algo.sampling_error=true needs a closed form.*Fix: policy=gaussian policy.state_std=false",
        ),
        (["env=test/Broken-v0"], EnvError, r"reward is nan in environment 0"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_first_update(words, error, message, tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    if "test/Broken-v0" not in gym.registry:
        gym.register("test/Broken-v0", lambda **kwargs: Broken())
    monkeypatch.setattr(PROPS, "update", lambda *args: pytest.fail("updated"))
    with pytest.raises(error, match=message) as caught:
        train(compose(["algo=props", "loop.steps=4096", *words, *QUIET, f"out={tmp_path}/run"]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "rose"}, r"algo.sampling.*'rose'.*ros"),
        ({"behaviour_steps": 0}, r"algo.behaviour_steps=0 must be at least 1"),
        ({"behaviour_clip": 0.0}, r"algo.behaviour_clip=0.0 must be above 0"),
        ({"behaviour_epochs": -1}, r"algo.behaviour_epochs=-1 must be 0 or more"),
        ({"sampling": "ros", "advantage_weighted": True}, r"ROS has no weights"),
        ({"clip": 0.0}, r"algo.clip=0.0 must be above 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PROPSConfig(**options)


def test_off_policy_algorithms_refuse_discrete_actions(tmp_path):
    words = ["algo=sac", "policy=categorical", "env=CartPole-v1", f"out={tmp_path}/run"]
    with pytest.raises(
        ConfigError, match=r"algo=sac needs continuous actions, here are 2 discrete ones. Fix: algo=ppo"
    ):
        train(compose(words))
