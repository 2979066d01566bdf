# SPDX-License-Identifier: Apache-2.0
"""A point that has to reach a goal in the plane, seen in 28 x 28 images, for policies that write chunks of tokens.

The point moves by 0.2 times the action and has 24 steps to come within 0.1 of the goal, which ends the episode. A chunk
is 4 actions, 8 tokens of 256 bins. The expert is a proportional controller. A teacher is cloned from many of its
chunks, a student from those of a few episodes.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.config import DataConfig, EnvConfig, LoopConfig, TrackConfig, TrainConfig
from robopost.evaluate.rollout import evaluate
from robopost.loops import train
from robopost.loops.collector import Collector
from robopost.loops.episodes import collect_episodes
from robopost.policies.base import build_policy
from robopost.registry import ENVS
from robopost.vector import make_vec

STEP, TOLERANCE, LIMIT, SIZE, GAIN = 0.2, 0.1, 24, 28, 4.0
CPU = torch.device("cpu")


@dataclass
class ReachConfig(EnvConfig):
    """Config of `token_reach`; `obs_keys` picks among `state` and `image`."""

    name: str = "token_reach"


def controller(state):
    """Actions (N, 2) for states (N, 4): position, goal."""
    return np.clip(GAIN * (state[:, 2:] - state[:, :2]), -1.0, 1.0)


def paint(state):
    """Images (N, 28, 28, 3): the point in red, the goal in green, both blurred, so that they lie between pixels."""
    axis = np.linspace(-1.2, 1.2, SIZE, dtype=np.float32)
    bump = np.exp(-0.5 * ((state[:, :, None] - axis) / 0.09) ** 2)  # (N, 4, SIZE)
    image = np.zeros((len(state), SIZE, SIZE, 3), np.uint8)
    for channel, at in enumerate((0, 2)):
        image[..., channel] = 255 * bump[:, at + 1, :, None] * bump[:, at, None, :]
    return image


class Reach(VectorEnv):
    """Position and goal uniform in [-1, 1]^2; what a copy draws follows from its seed and its episode's number."""

    def __init__(self, config: ReachConfig, num_envs: int) -> None:
        self.num_envs, self.max_steps = num_envs, LIMIT
        self.keys = config.obs_keys or ["state"]
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        spaces = {
            "state": gym.spaces.Box(-2, 2, (4,)),
            "image": gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
        }
        self.single_observation_space = gym.spaces.Dict({key: spaces[key] for key in self.keys})
        self.single_action_space = gym.spaces.Box(-1, 1, (2,))
        self.wanted = None

    def reset(self, *, seed=None, options=None):
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        self.seeds = np.array(seeds, np.int64)
        self.episode = np.zeros(self.num_envs, np.int64)
        self.time = np.zeros(self.num_envs, np.int64)
        self.state = np.zeros((self.num_envs, 4), np.float32)
        self._begin(np.ones(self.num_envs, bool))
        return self._observe(), {}

    def step(self, actions):
        self.state[:, :2] = np.clip(self.state[:, :2] + STEP * np.clip(actions, -1, 1), -1.2, 1.2)
        self.time += 1
        solved = np.linalg.norm(self.state[:, :2] - self.state[:, 2:], axis=1) < TOLERANCE
        late = ~solved & (self.time >= LIMIT)
        done, info = solved | late, {"success": solved}
        if done.any():
            info |= {"final_obs": self._observe(), "_final_obs": done}
            self._begin(done)
        return self._observe(), solved.astype(np.float32), solved, late, info

    def _begin(self, rows):
        for i in rows.nonzero()[0]:
            rng = np.random.default_rng([self.seeds[i], self.episode[i]])
            self.state[i] = rng.uniform(-1, 1, 4)
        self.episode[rows] += 1
        self.time[rows] = 0

    def _observe(self):
        out = {"state": self.state.copy()} if "state" in self.keys else {}
        if "image" in self.keys:
            out["image"] = paint(self.state)
        return out

    def get_state(self):
        return {"seeds": self.seeds, "episode": self.episode, "time": self.time, "state": self.state}

    def set_state(self, state):
        for key, value in state.items():
            setattr(self, key, value.copy())


def make_reach(config, num_envs, *, render=None):
    """A point that has to reach a goal in the plane."""
    return Reach(config, num_envs)


if "token_reach" not in ENVS:
    ENVS.register("token_reach", config=ReachConfig)(make_reach)


def demonstrations(episodes, horizon, keys, seed, noise=0.0):
    """Observations and chunks (n, horizon, 2) with masks, one per step, of the controller's episodes.

    With `noise` the executed action is disturbed: the chunks are what the controller plans from there, undisturbed.
    """
    env = Reach(ReachConfig(obs_keys=["state"]), episodes)
    state = env.reset(seed=seed)[0]["state"]
    rng, running, states = np.random.default_rng(seed), np.ones(episodes, bool), []
    for _ in range(LIMIT):
        states.append(state[running])
        action = controller(state) + noise * rng.standard_normal((episodes, 2))
        obs, _, done, late, _ = env.step(action.astype(np.float32))
        running &= ~(done | late)
        state = obs["state"]
    state = np.concatenate(states)
    plan, there, position = [], [], state.copy()
    for _ in range(horizon):
        plan.append(controller(position))
        there.append(np.linalg.norm(position[:, :2] - position[:, 2:], axis=1) >= TOLERANCE)
        position[:, :2] += STEP * plan[-1]
    full = {"state": state, "image": paint(state)}
    obs = {key: torch.from_numpy(full[key]) for key in keys}
    return obs, torch.from_numpy(np.stack(plan, 1)), torch.from_numpy(np.stack(there, 1))


def clone(policy_config, demos, updates, seed, lr=1e-3, batch=256):
    """A policy cloned from `demos`."""
    torch.manual_seed(seed)
    obs, chunk, mask = demos
    env = make_vec(ReachConfig(obs_keys=list(obs)), 1)
    policy = build_policy(policy_config, env.spec)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)
    g = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        at = torch.randint(len(chunk), (min(batch, len(chunk)),), generator=g)
        loss = policy.bc_loss({key: value[at] for key, value in obs.items()}, chunk[at], mask[at], g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy.eval()


def save(policy, folder: Path) -> str:
    """Write `policy` to `folder`; returns the path as a word."""
    save_folder(folder, policy_files(policy))
    return str(folder)


def success(policy, keys, episodes=100, seed=1_000_000):
    """Share of greedy episodes that reach the goal."""
    result = evaluate(policy, ReachConfig(obs_keys=list(keys)), episodes=episodes, seed=seed)
    return float(result.successes.mean())


def build(cls, config, policy, seed):
    """The algorithm on `policy`, without a run folder."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return cls(config, policy, policy.spec, device=CPU, generator=generator)


def iterate(algo, keys, count, seed, copies=32):
    """`count` iterations of rollout and update; yields (number, batch, seconds of collecting, scoring and learning)."""
    env = make_vec(ReachConfig(obs_keys=list(keys)), copies)
    run = SimpleNamespace(
        config=SimpleNamespace(data=DataConfig(), seed=seed),
        device=CPU,
        generators={"policy": torch.Generator().manual_seed(seed)},
        record_episode=lambda figures: None,
    )
    collector, needs, spent = Collector(env, run), algo.needs, []
    prepare = algo.prepare

    def timed(rows):
        began = time.perf_counter()
        found = prepare(rows)
        spent.append(time.perf_counter() - began)
        return found

    algo.prepare = timed
    for number in range(1, count + 1):
        began = time.perf_counter()
        batch, _ = collect_episodes(collector, algo, needs.episodes, needs.group)
        collected = time.perf_counter()
        algo.update(algo.policy.normaliser.batch(batch))
        scored = spent.pop()
        yield number, batch, (collected - began, scored, time.perf_counter() - collected - scored)
    env.close()


def learn(algo_config, policy_config, keys, out, *, steps, every=0, copies=32, seed=0, **loop):
    """`robopost train` for `steps` environment steps; returns the run folder."""
    track = TrackConfig(tensorboard=False, console=False)
    config = TrainConfig(
        algo=algo_config,
        policy=policy_config,
        env=ReachConfig(obs_keys=list(keys), num_envs=copies),
        loop=LoopConfig(
            **{"steps": steps, "eval_every": every, "log_every": 500, "eval_episodes": 100} | loop
        ),
        track=track,
        seed=seed,
        device="cpu",
        out=str(out),
    )
    return train(config)
