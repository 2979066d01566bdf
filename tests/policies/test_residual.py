# SPDX-License-Identifier: Apache-2.0
"""Acceptance checks 1-3 of residual policies: zero start, bound, chunk queue across both kinds of endings."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.config import PolicyConfig
from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.errors import ConfigError
from robopost.policies.base import Policy
from robopost.policies.chunked import StepPolicy
from robopost.policies.flow import Flow, FlowConfig
from robopost.policies.pretrained import load_pretrained
from robopost.policies.reference import Reference, ReferenceConfig
from robopost.policies.residual import BASE_ACTION, BaseActionEnv, ResidualConfig, ResidualPolicy
from robopost.vector import VecEnv

SPEC = Spec({"state": ((2,), "float32")}, 1, (-100.0,), (100.0,), 9)


class Counting(Policy):
    """Answers with the frame index it was asked at and the following ones: chunk t, t+1, ..."""

    def sample(self, obs, *, generator=None, deterministic=False):
        start = obs["state"][..., 0]
        chunk = start[:, None] + torch.arange(self.horizon)
        return self.normaliser.action(chunk[..., None]), None, None


class Frames(VectorEnv):
    """Observation = (frame, episode). Environment 0 ends by time limit after 5 frames, 1 terminates after 6."""

    def __init__(self):
        self.num_envs = 2
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.single_action_space = gym.spaces.Box(-100, 100, (1,))
        self.limits = np.array([5, 6])

    def reset(self, *, seed=None, options=None):
        self.state = np.zeros((2, 2), np.float32)
        return self.state.copy(), {}

    def step(self, action):
        self.state[:, 0] += 1
        done = self.state[:, 0] >= self.limits
        info = {}
        if done.any():
            info = {"final_obs": self.state.copy(), "_final_obs": done}
            self.state[done, 0] = 0
            self.state[done, 1] += 1
        kind = np.array([False, True])
        return self.state.copy(), np.zeros(2, np.float32), done & kind, done & ~kind, info


@pytest.fixture
def residual(tmp_path):
    torch.manual_seed(0)
    spec = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)
    base = Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1), spec)
    save_folder(tmp_path / "base", policy_files(base))
    return ResidualPolicy(ResidualConfig(base=str(tmp_path / "base"), scale=0.3, hidden=[16]), spec)


def test_zero_start_executes_the_base_action_exactly(residual):
    obs = {"state": torch.randn(1000, 3)}
    twin = StepPolicy(residual.base, 1000)
    assert torch.equal(residual.act(obs).chunk[:, 0], twin.act(obs, deterministic=True))


def test_correction_is_bounded_after_any_training(residual):
    for parameter in residual.net.parameters():
        torch.nn.init.normal_(parameter, std=10.0)
    base = torch.rand(500, 2) * torch.tensor([2.0, 4.0]) - torch.tensor([1.0, 2.0])
    action = residual.act({"state": torch.randn(500, 3), BASE_ACTION: base}).chunk[:, 0]
    change = (action - base) / residual.normaliser.action_scale
    assert change.abs().max() <= 0.3 + 1e-6
    assert change.abs().max() > 0.25
    assert (action.abs() <= torch.tensor([1.0, 2.0])).all()


def test_base_actions_follow_frames_across_time_limit_and_termination():
    base = Counting(PolicyConfig(name="counting", horizon=4), SPEC)
    policy = ResidualPolicy.__new__(ResidualPolicy)
    torch.nn.Module.__init__(policy)
    policy.base, policy.spec = base, SPEC
    env = BaseActionEnv(VecEnv(Frames()), policy)
    obs = env.reset(0)
    for _ in range(23):
        assert np.array_equal(obs[BASE_ACTION][:, 0], obs["state"][:, 0])
        step = env.step(obs[BASE_ACTION])
        # The true final observation carries its own base action, whichever way the episode ended.
        assert np.array_equal(step.next_obs[BASE_ACTION][:, 0], step.next_obs["state"][:, 0])
        obs = step.obs


def test_the_replay_holds_the_base_action_of_every_frame():
    base = Counting(PolicyConfig(name="counting", horizon=4), SPEC)
    policy = ResidualPolicy.__new__(ResidualPolicy)
    torch.nn.Module.__init__(policy)
    policy.base = base
    policy.spec = replace(SPEC, obs=SPEC.obs | {BASE_ACTION: ((1,), "float32")})
    env = BaseActionEnv(VecEnv(Frames()), policy)
    buffer = ReplayBuffer(policy.spec, 100, 2)
    obs = env.reset(0)
    for _ in range(
        17
    ):  # three episodes: chunks of 4 are cut by a time limit after 5 and a termination after 6
        step = env.step(obs[BASE_ACTION])
        buffer.add(obs, obs[BASE_ACTION], step.reward, step.next_obs, step.terminated, step.truncated)
        obs = step.obs
    batch = buffer.transitions_at(torch.arange(34), n_step=3, gamma=0.9)
    for part in (batch.obs, batch.next_obs):
        assert torch.equal(part[BASE_ACTION], part["state"][:, :1])
    first = batch.obs[BASE_ACTION][0::2, 0].tolist()
    assert first == [0, 1, 2, 3, 4] * 3 + [0, 1]
    assert batch.obs[BASE_ACTION][1::2, 0].tolist() == ([0, 1, 2, 3, 4, 5] * 3)[:17]
    # The final observation of a time limit carries its own base action, 5, and its bootstrap.
    assert batch.next_obs[BASE_ACTION][0::2, 0].tolist()[2:5] == [5, 5, 5]
    assert batch.discount[0::2][:5].tolist() == pytest.approx([0.9**k for k in (3, 3, 3, 2, 1)])
    assert batch.discount[1::2][3:6].tolist() == [0, 0, 0]


def clock(limit=1000):
    """A published actor that answers its time feature: action 1 - t/limit, whatever it sees."""
    config = ReferenceConfig(obs_mode="time_feature", output="linear", time_limit=limit)
    policy = Reference(config, SPEC)
    policy.net[0].weight.data = torch.tensor([[0.0, 0.0, 1.0]])
    policy.net[0].bias.data.zero_()
    return policy


def test_a_base_that_reads_the_step_knows_it_in_every_episode():
    policy = ResidualPolicy.__new__(ResidualPolicy)
    torch.nn.Module.__init__(policy)
    policy.base, policy.spec = clock(limit=10), SPEC
    env = BaseActionEnv(VecEnv(Frames()), policy)
    obs = env.reset(0)
    for t in range(23):
        np.testing.assert_allclose(obs[BASE_ACTION][:, 0], 1 - obs["state"][:, 0] / 10, atol=1e-6)
        if t == 7:  # an evaluation in between
            StepPolicy(policy.base, 5).act({"state": torch.zeros(5, 2)})
        step = env.step(obs[BASE_ACTION])
        np.testing.assert_allclose(
            step.next_obs[BASE_ACTION][:, 0], 1 - step.next_obs["state"][:, 0] / 10, atol=1e-6
        )
        obs = step.obs


def test_demonstrations_are_labelled_with_their_step():
    policy = ResidualPolicy.__new__(ResidualPolicy)
    torch.nn.Module.__init__(policy)
    policy.base, policy.spec, policy.history = clock(limit=10), SPEC, 1
    policy.normaliser = policy.base.normaliser
    episodes = [
        Episode({"state": np.ones((n + 1, 2), np.float32)}, np.zeros((n, 1)), np.zeros(n), False, True)
        for n in (3, 5)
    ]
    labelled = policy.label_demos(Dataset.from_episodes(episodes, SPEC))
    expected = [1.0, 0.9, 0.8, 0.7, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
    np.testing.assert_allclose(labelled.obs[BASE_ACTION][:, 0], expected, atol=1e-6)


def test_demonstrations_are_labelled_as_if_executed():
    base = Counting(PolicyConfig(name="counting", horizon=4), SPEC)
    policy = ResidualPolicy.__new__(ResidualPolicy)
    torch.nn.Module.__init__(policy)
    policy.base, policy.spec, policy.history, policy.normaliser = base, SPEC, 1, base.normaliser
    episodes = []
    for length, terminated in ((5, False), (6, True), (5, False)):
        frames = np.stack([np.arange(length + 1), np.zeros(length + 1)], 1).astype(np.float32)
        action, reward = np.zeros((length, 1), np.float32), np.zeros(length, np.float32)
        episodes.append(Episode({"state": frames}, action, reward, terminated, not terminated))
    labelled = policy.label_demos(Dataset.from_episodes(episodes, SPEC))
    assert torch.equal(labelled.obs[BASE_ACTION][:, 0], labelled.obs["state"][:, 0])
    batch = labelled.sample(64, torch.Generator().manual_seed(0))
    assert torch.equal(batch.next_obs[BASE_ACTION][:, 0], batch.next_obs["state"][:, 0])


def test_warm_up_stays_near_the_base_action(residual):
    base = torch.zeros(200, 2)
    generator = torch.Generator().manual_seed(0)
    action = residual.random_action({"state": torch.randn(200, 3), BASE_ACTION: base}, generator)
    change = action / residual.normaliser.action_scale
    assert 0.15 < change.abs().max() <= 0.2


@pytest.mark.parametrize("mode", ["bounds", "minmax", "meanstd", "identity"])
def test_zero_start_whatever_the_base_actions_are_normalised_by(mode, tmp_path):
    spec = Spec({"state": ((3,), "float32")}, 2, (0.0, -512.0), (8.0, 512.0), 50)
    torch.manual_seed(0)
    base = Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1, normalise_action=mode), spec)
    for parameter in base.parameters():
        parameter.data.mul_(3.0)
    action = {"mean": [4.0, 0.0], "std": [0.5, 90.0], "min": [1.0, -400.0], "max": [7.0, 400.0], "count": 9}
    base.normaliser.fit({"action": action}, obs="identity", action=mode)
    save_folder(tmp_path / "base", policy_files(base))
    residual = ResidualPolicy(ResidualConfig(base=str(tmp_path / "base"), hidden=[16]), spec)
    obs = {"state": 3 * torch.randn(200, 3)}
    wanted = StepPolicy(base, 200).act(obs, deterministic=True)
    assert torch.allclose(residual.act(obs).chunk[:, 0], wanted, atol=1e-3)
    # Critics see the base action in the units of the actions beside it, whatever the environment's are.
    seen = residual.normaliser.obs(obs | {BASE_ACTION: wanted})[BASE_ACTION]
    assert torch.equal(seen, residual.normaliser.action(wanted))
    assert seen.abs().max() <= 1 + 1e-6


def test_loops_are_told_the_history_of_the_base(tmp_path):
    base = Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1, history=2), SPEC)
    save_folder(tmp_path / "base", policy_files(base))
    assert ResidualConfig(base=str(tmp_path / "base")).history == 2
    assert ResidualConfig(base=str(tmp_path / "none")).history == 1


def test_environments_need_not_offer_the_base_action(residual, tmp_path):
    save_folder(tmp_path / "saved", policy_files(residual))
    spec = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)
    assert load_pretrained(tmp_path / "saved", spec).act({"state": torch.zeros(2, 3)}).chunk.shape == (
        2,
        1,
        2,
    )


def test_only_the_correction_is_trainable(residual):
    assert all(not p.requires_grad for p in residual.base.parameters())
    assert any(p.requires_grad for p in residual.net.parameters())


def test_checkpoint_is_self_contained(residual, tmp_path):
    torch.nn.init.normal_(residual.net[-1].weight)
    save_folder(tmp_path / "saved", policy_files(residual))
    (tmp_path / "base").rename(tmp_path / "gone")
    again = load_policy(tmp_path / "saved")
    obs = {"state": torch.randn(5, 3)}
    assert torch.equal(residual.act(obs).chunk, again.act(obs).chunk)


def test_base_that_does_not_fit_is_refused(residual, tmp_path):
    config = ResidualConfig(base=str(tmp_path / "base"))
    for spec, message in (
        (Spec({"state": ((4,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0)), r"'state' of shape \(3,\)"),
        (
            Spec({"pixels": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0)),
            "observes 'state', the environment offers",
        ),
        (
            Spec({"state": ((3,), "float32")}, 3, (-1.0,) * 3, (1.0,) * 3),
            "the base policy has 2 actions, the environment has 3",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            ResidualPolicy(config, spec)
    chunky = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 3)
    with pytest.raises(ConfigError, match="chunks of 4 steps, episodes here end after 3"):
        ResidualPolicy(config, chunky)
    with pytest.raises(ConfigError, match="expects float32, got uint8"):
        ResidualPolicy(config, replace(chunky, obs={"state": ((3,), "uint8")}))
    save_folder(tmp_path / "corrected", policy_files(residual))
    with pytest.raises(ConfigError, match="the base policy is a residual policy itself"):
        ResidualPolicy(ResidualConfig(base=str(tmp_path / "corrected")), replace(chunky, max_steps=50))
    with pytest.raises(ConfigError, match=r"policy\.base is empty"):
        ResidualPolicy(ResidualConfig(), SPEC)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "action_shift",
            5.0,
            r"the base policy acts in \[4, 6\] \(action 0\), the environment's bounds are \[-1, 1\]",
        ),
        ("action_scale", 0.0, "the base policy's normaliser has action_scale with values"),
        ("obs_shift_state", float("nan"), "the base policy's normaliser has obs_shift_state with values"),
    ],
)
def test_normaliser_that_does_not_fit_is_refused(residual, tmp_path, name, value, message):
    base = residual.base
    getattr(base.normaliser, name)[0] = value
    save_folder(tmp_path / "odd", policy_files(base))
    spec = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)
    with pytest.raises(ConfigError, match=message) as caught:
        ResidualPolicy(ResidualConfig(base=str(tmp_path / "odd")), spec)
    assert "\n" not in str(caught.value)


def test_keys_the_base_does_not_read_are_not_asked_for(tmp_path):
    spec = Spec({"state": ((3,), "float32"), "image": ((8, 8, 3), "uint8")}, 2, (-1.0,) * 2, (1.0,) * 2, 50)
    base = Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1, obs_keys=["state"]), spec)
    save_folder(tmp_path / "base", policy_files(base))
    blind = replace(spec, obs={"state": spec.obs["state"]})
    policy = ResidualPolicy(ResidualConfig(base=str(tmp_path / "base"), hidden=[8]), blind)
    assert policy.act({"state": torch.zeros(2, 3)}).chunk.shape == (2, 1, 2)


def test_unbounded_base_is_rebuilt_as_it_was(tmp_path):
    torch.manual_seed(0)
    endless = Spec({"state": ((3,), "float32")}, 2, (-float("inf"),) * 2, (float("inf"),) * 2, 50)
    base = Flow(FlowConfig(horizon=4, steps=2, width=16, depth=1, normalise_action="bounds"), endless)
    save_folder(tmp_path / "base", policy_files(base))
    bounded = Spec({"state": ((3,), "float32")}, 2, (-0.1, -0.1), (0.1, 0.1), 50)
    policy = ResidualPolicy(ResidualConfig(base=str(tmp_path / "base"), hidden=[8]), bounded)
    save_folder(tmp_path / "saved", policy_files(policy))
    again = load_policy(tmp_path / "saved")
    assert again.base.clip == base.clip == float("inf")
    assert torch.equal(again.base.normaliser.action_high, base.normaliser.action_high)
