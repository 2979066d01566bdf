# SPDX-License-Identifier: Apache-2.0
"""PPO beside stable-baselines3's, whole iterations: same start, noise and minibatches give the same numbers."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from robopost.algos.online.ppo import PPO
from robopost.artefacts.checkpoint import load_policy
from robopost.compose import compose
from robopost.evaluate.rollout import evaluate
from robopost.loops import train
from robopost.loops.collector import ENV_STREAM
from robopost.loops.run import STREAMS, stream_seed

sb3 = pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed")
pytest.importorskip("mujoco")
from stable_baselines3.common.vec_env import DummyVecEnv  # noqa: E402

SEED, STEPS, ITERATIONS = 3, 256, 3
SETTINGS = [  # those of benchmarks/sb3_parity.py
    "algo=ppo",
    "policy=gaussian",
    "policy.hidden=[64,64]",
    "policy.activation=tanh",
    "policy.init=orthogonal",
    "policy.squash=false",
    "policy.state_std=false",
]


def weights(policy, value):
    """Our parameters under stable-baselines3's names, in copies."""
    out = {"log_std": policy.log_std}
    for ours, hidden, last in (
        (policy.net, "policy_net", "action_net"),
        (value.net, "value_net", "value_net"),
    ):
        linear = [layer for layer in ours if isinstance(layer, torch.nn.Linear)]
        names = [f"mlp_extractor.{hidden}.{2 * i}" for i in range(len(linear) - 1)] + [last]
        for layer, name in zip(linear, names, strict=True):
            out |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return {key: item.detach().clone() for key, item in out.items()}


@pytest.fixture
def ours(request, tmp_path, monkeypatch):
    """A run of the public API, every rollout and update of it recorded."""
    task, limit, copies = request.param
    record, update, advantages = [], PPO.update, PPO._advantages

    def spy_advantages(self, batch):
        found = advantages(self, batch)
        record[-1] |= {"advantage": found[0], "returns": found[1]}
        record[-1] |= {
            "value": self.value(batch.obs).detach(),
            "next_value": self.value(batch.next_obs).detach(),
        }
        return found

    def spy_update(self, batch):
        before = weights(self.policy, self.value)
        record.append({"batch": batch, "before": before, "stream": self.generator.get_state()})
        metrics = update(self, batch)
        record[-1]["after"] = weights(self.policy, self.value)
        return metrics

    monkeypatch.setattr(PPO, "update", spy_update)
    monkeypatch.setattr(PPO, "_advantages", spy_advantages)
    words = [*SETTINGS, f"env={task}", f"env.num_envs={copies}", f"env.max_steps={limit}", f"seed={SEED}"]
    words += [f"algo.rollout_steps={STEPS}", f"loop.steps={ITERATIONS * STEPS * copies}", "device=cpu"]
    words += [
        "loop.log_every=100",
        "loop.eval_every=300",
        "loop.checkpoint_every=300",
        "loop.eval_episodes=1",
    ]
    config = compose([*words, f"out={tmp_path / 'run'}", "track.tensorboard=false"])
    train(config)
    monkeypatch.undo()
    return config, record, load_policy(tmp_path / "run")


def record_theirs(model, ours):
    """Let a stable-baselines3 model act as ours did and collect what it computes, a dict per iteration.

    Physics is chaotic: a last-bit difference of an action is a difference in everything 50 steps later. So its
    own actions are kept for comparison and ours, already sampled, go into its rollout instead.
    """
    record, forward = [], model.policy.forward
    collect, update = model.collect_rollouts, model.train

    def weights_now():
        return {key: value.clone() for key, value in model.policy.state_dict().items()}

    def act(obs, deterministic=False):
        action, value, log_prob = forward(obs, deterministic)
        t = len(record[-1]["sampled"])
        record[-1]["sampled"].append(action)
        return ours[len(record) - 1]["batch"].chain[t, :, 0, 0], value, log_prob

    def step(actions):
        record[-1]["executed"].append(actions.copy())
        return type(model.env).step(model.env, actions)

    def collect_and_copy(*args, **kwargs):
        record.append({"sampled": [], "executed": [], "before": weights_now()})
        going_on = collect(*args, **kwargs)
        names = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs")
        record[-1] |= {
            key: getattr(model.rollout_buffer, key).copy() for key in (*names, "advantages", "returns")
        }
        return going_on

    def update_and_copy():
        update()
        record[-1]["after"] = weights_now()

    model.policy.forward, model.env.step = act, step
    model.collect_rollouts, model.train = collect_and_copy, update_and_copy
    return record


def run_theirs(config, ours, monkeypatch):
    """stable-baselines3's PPO with our initial weights, noise, order of minibatches and environment seeds."""
    copies, env = config.env.num_envs, config.env
    make = lambda: gym.make(env.id, max_episode_steps=env.max_steps)  # noqa: E731
    model = sb3.PPO("MlpPolicy", DummyVecEnv([make] * copies), n_steps=STEPS, device="cpu")
    model.policy.load_state_dict(ours[0]["before"])
    model.env.seed(stream_seed(SEED, ENV_STREAM) % 2**31)
    noise = torch.Generator().manual_seed(stream_seed(SEED, STREAMS.index("policy")))
    order = torch.Generator().set_state(ours[0]["stream"])

    def permutation(total):
        t, n = np.divmod(torch.randperm(total, generator=order).numpy(), copies)
        return n * STEPS + t  # its rows are sorted by environment, ours by time

    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal",
        lambda shape, dtype, device: torch.randn((shape[0], 1, *shape[1:]), generator=noise)[:, 0],
    )
    monkeypatch.setattr(np.random, "permutation", permutation)
    record = record_theirs(model, ours)
    model.learn(ITERATIONS * STEPS * copies)
    monkeypatch.undo()
    return model, record


def assert_close(ours, theirs, what):
    """To float32 rounding at the size of the numbers."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, what
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * (1 + np.abs(theirs).max()), err_msg=what)


def assert_same_rollout(a, b):
    """What was seen, done and stored."""
    batch = a["batch"]
    done = (batch.terminated | batch.truncated).numpy()
    assert_close(batch.chain[:, :, 0, 0], np.stack(b["sampled"]), "the sample before clipping")
    assert np.array_equal(batch.chain[:, :, 0, 0], b["actions"]), (
        "log-probabilities are of the sample before clipping"
    )
    assert np.array_equal(batch.action, np.stack(b["executed"])), "the clipped action is executed"
    assert np.abs(b["actions"]).max() > 1.5 > batch.action.abs().max(), "something was clipped"
    assert np.array_equal(batch.obs["state"], b["observations"].astype(np.float32))
    assert np.array_equal(done[:-1], b["episode_starts"][1:].astype(bool))
    # stable-baselines3 adds the bootstrap value of a time limit to the reward, we keep it apart.
    limit = (batch.truncated & ~batch.terminated).numpy()
    bootstrap = np.where(limit, 0.99 * a["next_value"].numpy(), 0)
    assert_close(batch.reward.numpy() + bootstrap, b["rewards"], "rewards")
    return int(batch.terminated.sum()), int(limit.sum())


# Hopper falls after about 20 steps, HalfCheetah only ends at the time limit; the last has both, in two environments.
CASES = [("Hopper-v5", 1000, 1), ("HalfCheetah-v5", 100, 1), ("Hopper-v5", 20, 2)]


@pytest.mark.parametrize(
    "ours", CASES, ids=lambda case: f"{case[0]}-limit{case[1]}-x{case[2]}", indirect=True
)
def test_three_iterations(ours, monkeypatch):
    config, record, policy = ours
    model, expected = run_theirs(config, record, monkeypatch)
    assert len(record) == len(expected) == ITERATIONS
    ends = np.zeros(2, int)
    for a, b in zip(record, expected, strict=True):
        ends += assert_same_rollout(a, b)
        assert_close(a["batch"].log_prob, b["log_probs"], "log-probability")
        assert_close(a["value"], b["values"], "value")
        assert_close(a["advantage"], b["advantages"], "advantage")
        assert_close(a["returns"], b["returns"], "return")
        for name, value in a["after"].items():
            assert_close(a["before"][name], b["before"][name], f"{name} before")
            assert_close(value, b["after"][name], f"{name} after")
            assert (value - a["before"][name]).abs().max() > 1e-3, f"{name} learns"
    # Each kind of end where it belongs, so that both ways to bootstrap are compared.
    assert (ends > 0).tolist() == [config.env.id == "Hopper-v5", config.env.max_steps < 1000]
    check_evaluation(config, policy, model)


def check_evaluation(config, policy, model):
    """Equal weights have equal deterministic episodes, from equal seeds to equal ends."""
    result = evaluate(policy, config.env, episodes=3, seed=50)
    env = gym.make(config.env.id, max_episode_steps=config.env.max_steps)
    for episode in range(3):
        obs, _ = env.reset(seed=50 + episode)
        total, length, done = 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            total, length, done = total + float(reward), length + 1, terminated or truncated
        assert result.lengths[episode] == length
        assert result.returns[episode] == pytest.approx(total, rel=1e-3)
