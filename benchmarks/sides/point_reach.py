# SPDX-License-Identifier: Apache-2.0
"""A point that has to reach a goal in the plane, a base policy that nearly never does, and ResFiT on both.

The point moves by 0.1 times the action; it has 40 steps to come within 0.05 of the goal, which ends the episode with
the only reward, 1. The base plans chunks of 10 actions of a proportional controller and executes them without looking,
with a constant bias of (+0.25, -0.25) and noise of 0.1 on them. Demonstrations are the controller's own, closed loop.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.algos.online.resfit import ResFiT, ResFiTConfig
from robopost.config import PolicyConfig
from robopost.data.batch import Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.episode import Episode
from robopost.data.mixture import MixedSampler
from robopost.policies.base import Policy
from robopost.policies.chunked import StepPolicy
from robopost.policies.residual import ResidualConfig, ResidualPolicy
from robopost.vector import VecEnv, to_torch

STEP, TOLERANCE, LIMIT, GAIN = 0.1, 0.05, 40, 2.0
BIAS, NOISE, CHUNK = (0.25, -0.25), 0.1, 10
SPEC = Spec({"state": ((4,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0), LIMIT)


def controller(position, goal):
    """Actions (N, 2) of the proportional controller."""
    return (GAIN * (goal - position)).clip(-1.0, 1.0)


class Points(VectorEnv):
    """Position and goal uniform in [-1, 1]^2; N independent copies."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gym.spaces.Box(-2, 2, (4,))
        self.single_action_space = gym.spaces.Box(-1, 1, (2,))
        self.max_steps = LIMIT

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.state = self._fresh(self.num_envs)
        self.time = np.zeros(self.num_envs, int)
        return self.state.copy(), {}

    def step(self, actions):
        self.state[:, :2] += STEP * np.clip(actions, -1, 1)
        self.time += 1
        solved = np.linalg.norm(self.state[:, :2] - self.state[:, 2:], axis=1) < TOLERANCE
        late = ~solved & (self.time >= LIMIT)
        done, info = solved | late, {"success": solved}
        if done.any():
            info |= {"final_obs": self.state.copy(), "_final_obs": done}
            self.state[done], self.time[done] = self._fresh(int(done.sum())), 0
        return self.state.copy(), solved.astype(np.float32), solved, late, info

    def _fresh(self, count):
        return self.rng.uniform(-1, 1, (count, 4)).astype(np.float32)


class Biased(Policy):
    """The base policy."""

    def __init__(self, seed: int) -> None:
        super().__init__(PolicyConfig(name="biased", horizon=CHUNK), SPEC)
        self._noise = torch.Generator().manual_seed(seed)

    def sample(self, obs, *, generator=None, deterministic=False):
        position, goal = obs["state"].split(2, -1)
        plan = []
        for _ in range(CHUNK):
            plan.append(controller(position, goal))
            position = position + STEP * plan[-1]
        chunk = torch.stack(plan, 1)
        noise = NOISE * torch.randn(chunk.shape, generator=self._noise)
        return (chunk + torch.tensor(BIAS) + noise).clamp(-1, 1), None, None


def demonstrations(count: int, seed: int) -> Dataset:
    """Episodes of the controller itself."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(count):
        states, actions = [rng.uniform(-1, 1, 4).astype(np.float32)], []
        while np.linalg.norm(states[-1][:2] - states[-1][2:]) >= TOLERANCE:
            actions.append(controller(states[-1][:2], states[-1][2:]).astype(np.float32))
            states.append(np.concatenate([states[-1][:2] + STEP * actions[-1], states[-1][2:]]))
        if actions:
            reward = np.zeros(len(actions))
            reward[-1] = 1.0
            episodes.append(Episode({"state": np.array(states)}, np.array(actions), reward, True, False))
    return Dataset.from_episodes(episodes, SPEC)


def success(policy: Policy, episodes: int = 100) -> float:
    """Share of solved episodes, all at once from the same start states."""
    env, runner = VecEnv(Points(episodes), max_steps=LIMIT), StepPolicy(policy, episodes)
    obs, solved, running = env.reset(1_000_000), np.zeros(episodes, bool), np.ones(episodes, bool)
    for _ in range(LIMIT):
        step = env.step(runner.act(to_torch(obs, "cpu"), deterministic=True).numpy())
        solved |= running & step.terminated
        running &= ~step.done
        runner.reset(torch.from_numpy(step.done))
        obs = step.obs
    return float(solved.mean())


def learn(
    seed: int, steps: int, *, every: int, scale: float = 0.5, demo_fraction: float = 0.5, **options
) -> dict:
    """ResFiT for `steps` environment steps of one copy; success by steps, 0 being the start, and that of the base."""
    torch.manual_seed(seed)
    base = Biased(seed)
    policy = ResidualPolicy(ResidualConfig(scale=scale, hidden=[128, 128]), SPEC, base)
    config = {"batch_size": 128, "hidden": [128, 128], "actor_lr": 1e-4, "critic_lr": 3e-4}
    config |= {
        "warmup_steps": 200,
        "critic_warmup": 400,
        "exploration_noise": 0.1,
        "target_range": [0.0, 1.0],
    }
    config = ResFiTConfig(**config | {"demo_fraction": demo_fraction} | options)
    streams = [torch.Generator().manual_seed(1000 * seed + i) for i in range(2)]
    algo = ResFiT(config, policy, policy.spec, device=torch.device("cpu"), generator=streams[0])
    env = policy.wrap_env(VecEnv(Points(1), max_steps=LIMIT))
    buffer = ReplayBuffer(policy.spec, max(steps, 2))
    demos = policy.label_demos(demonstrations(50, seed))
    sampler = MixedSampler(buffer, demos, demo_fraction) if demo_fraction else buffer
    obs = env.reset(seed)
    curve = {"base": success(base), 0: success(policy)}
    for now in range(1, steps + 1):
        seen = to_torch(obs, "cpu")
        warm = now <= config.warmup_steps
        action = policy.random_action(seen, streams[1]) if warm else algo.explore(seen, streams[1])
        step = env.step(action.numpy())
        buffer.add(obs, action, step.reward, step.next_obs, step.terminated, step.truncated)
        obs = step.obs
        updates = 0 if warm else round(config.updates_per_step)
        updates += config.critic_warmup if now == config.warmup_steps + 1 else 0
        for _ in range(updates):
            batch = sampler.sample(config.batch_size, streams[1], n_step=config.n_step, gamma=config.gamma)
            algo.update(policy.normaliser.batch(batch))
        if now % every == 0:
            curve[now] = success(policy)
    return curve
