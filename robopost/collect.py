# SPDX-License-Identifier: Apache-2.0
"""Recording episodes of an expert, a policy or noise into a store: vectorised, seeded, resumable."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from robopost.artefacts.source import open_policy
from robopost.compose import to_dict
from robopost.config import CollectConfig, TrainConfig
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore, is_store
from robopost.errors import ConfigError, DataError, EnvError
from robopost.loops.run import resolve_device
from robopost.policies.base import Policy
from robopost.policies.chunked import StepPolicy
from robopost.registry import ENVS
from robopost.vector import Arrays, VecEnv, make_vec, to_torch

NO_LIMIT = 100_000
DATA_SEED = 1_000_000  # keeps demonstrations of `data.collect` away from the seeds of training and evaluation
REPRODUCED = (
    "env",
    "policy",
    "quality",
    "noise",
    "deterministic",
    "seed",
)  # what must agree to go on with a store


class Actor(Protocol):
    """What a wave of episodes is recorded from."""

    def begin(self, seeds: list[int]) -> None:
        """New episodes everywhere; `seeds` (N,) is the randomness each slot may use."""

    def act(self, obs: Arrays) -> np.ndarray:
        """Actions (N, A) in environment units."""
        ...


@dataclass
class CollectResult:
    """What a call of `collect` recorded.

    Attributes:
        path: the store.
        episodes, steps: in the store now.
        recorded: episodes added by this call.
        returns: (recorded,) sums of rewards.
        successes: (recorded,) bool, None where the task has no success predicate.
        seconds: wall time.
    """

    path: Path
    episodes: int = 0
    steps: int = 0
    recorded: int = 0
    returns: list[float] = field(default_factory=list)
    successes: list[bool] | None = None
    seconds: float = 0.0


def collect(
    config: CollectConfig, *, policy: Policy | None = None, progress: Callable[[int], None] | None = None
) -> CollectResult:
    """Record until the store `config.out` holds `config.episodes` episodes; an unfinished store is continued.

    Episode i is reset with `seed + i` and draws its own noise from that number, so neither the number of
    parallel environments nor an interruption changes what the script and random actions record. A sampling
    policy draws per wave of `num_envs` episodes. Stored actions are the executed ones, noisy and clipped.

    Args:
        config: environment, policy, how many, where to.
        policy: acts instead of the one `config.policy` names.
        progress: called with the number of episodes in the store.

    Raises:
        ConfigError: the environment has no expert, or the store was recorded with other settings.
        DataError: `out` is no store, is being written by another process, or the disk is full.
    """
    if config.env is None:
        raise ConfigError("env is not chosen. Fix: add env=<name or Gymnasium id>")
    start = time.perf_counter()
    path = Path(config.out)
    facts = {key: value for key, value in to_dict(config).items() if key in REPRODUCED}
    facts["env"].pop("num_envs", None)
    if config.policy != "script":
        facts["quality"] = None
    if policy is not None:
        facts["policy"] = policy.registry_name
    done = _recorded(path, facts)
    result = CollectResult(path, episodes=done)
    if done < config.episodes:
        learnt, vec = open_actor(config, policy, min(config.num_envs, config.episodes - done))
        try:
            actor = make_actor(learnt, config, vec)
            with _open(path, vec, facts) as store:
                _record(store, vec, actor, config, result, progress or (lambda count: None))
        finally:
            vec.close()
    with EpisodeStore.open(path) as store:
        result.episodes, result.steps = len(store), store.num_steps
    result.seconds = time.perf_counter() - start
    return result


def ensure_data(
    config: TrainConfig, folder: Path, progress: Callable[[int], None] | None = None
) -> TrainConfig:
    """Record what `data.collect` asks for into `folder`/data.zarr and point `data.path` at it."""
    if not config.data.collect:
        return config
    if config.env is None:
        raise ConfigError(f"data.collect={config.data.collect} needs an environment. Fix: add env=<name>")
    path = folder / "data.zarr"
    wanted = CollectConfig(
        env=config.env,
        episodes=config.data.collect,
        out=str(path),
        quality=config.data.quality,
        seed=DATA_SEED + config.seed,
    )
    collect(wanted, progress=progress)
    return replace(config, data=replace(config.data, path=str(path), collect=0))


def _recorded(path: Path, facts: dict[str, Any]) -> int:
    """Episodes already in `path`, after checking that they were recorded with the same settings."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return 0
    if not is_store(path):
        raise DataError(f"out={path} exists and is no robopost store. Fix: another out=")
    with EpisodeStore.open(path) as store:
        stored = store.metadata.get("collect")
        if stored is None:
            raise ConfigError(
                f"out={path} was not recorded by collect, so it is not continued. Fix: another out="
            )
        for key, value in facts.items():
            if stored.get(key) != value:
                raise ConfigError(
                    f"out={path} was recorded with {key}={stored.get(key)}, this is {key}={value}. "
                    "Fix: another out=, or the same settings"
                )
        return len(store)


def _open(path: Path, vec: VecEnv, facts: dict[str, Any]) -> EpisodeStore:
    if is_store(path):
        return EpisodeStore.open(path, "a")
    fps = float(vec.env.metadata.get("render_fps") or 0.0)
    source = f"collected in {facts['env']['name']} with policy {facts['policy']}"
    return EpisodeStore.create(path, spec=vec.spec, fps=fps, source=source, metadata={"collect": facts})


def open_actor(config: CollectConfig, policy: Policy | None, num_envs: int) -> tuple[Policy | None, VecEnv]:
    """The policy that `config.policy` names (None for `script` and `random`) and the environments it acts in."""
    if policy is not None:
        return policy, make_vec(config.env, num_envs, history=policy.history)
    if config.policy in ("script", "random"):
        return None, make_vec(config.env, num_envs)
    return open_policy(config.policy, config.env, num_envs, device=resolve_device(config.device))


def make_actor(policy: Policy | None, config: CollectConfig, vec: VecEnv) -> Actor:
    """What acts in `vec`, with the noise that `config` asks for."""
    actor: Actor
    if policy is not None:
        actor = _Learnt(policy, vec.num_envs, config.deterministic)
    elif config.policy == "random":
        actor = _Random(vec)
    else:
        actor = _Script(config, vec.num_envs)
    return _Noisy(actor, vec, config.noise) if config.noise else actor


def _record(
    store: EpisodeStore,
    vec: VecEnv,
    actor: Actor,
    config: CollectConfig,
    result: CollectResult,
    report: Callable[[int], None],
) -> None:
    report(len(store))
    while len(store) < config.episodes:
        first = len(store)
        for index, episode in enumerate(wave(vec, actor, config.seed + first)[: config.episodes - first]):
            episode.metadata["seed"] = config.seed + first + index
            store.append(episode)
            result.recorded += 1
            result.returns.append(float(episode.reward.sum()))
            if episode.success is not None:
                result.successes = [*(result.successes or []), episode.success]
        store.flush()
        report(len(store))


def wave(vec: VecEnv, actor: Actor, seed: int) -> list[Episode]:
    """One whole episode per environment; slot i is reset with `seed + i`."""
    n, limit = vec.num_envs, vec.spec.max_steps or NO_LIMIT
    seeds = [seed + i for i in range(n)]
    obs = vec.reset(seed=seeds)
    actor.begin(seeds)
    low = np.array(vec.spec.action_low, np.float32)
    high = np.array(vec.spec.action_high, np.float32)
    latest = (lambda value: value[:, -1]) if vec.history > 1 else (lambda value: value)
    rows: list[tuple[Arrays, np.ndarray, np.ndarray]] = []
    length, terminated = np.zeros(n, int), np.zeros(n, bool)
    success: np.ndarray | None = None
    final: list[Arrays] = [{} for _ in range(n)]
    running = np.ones(n, bool)
    while running.any():
        action = np.clip(np.asarray(actor.act(obs), np.float32), low, high)
        step = vec.step(action)
        rows.append(({key: latest(value) for key, value in obs.items()}, action, step.reward))
        if step.success is not None:
            success = (np.zeros(n, bool) if success is None else success) | (step.success & running)
        ended = running & (step.done | (len(rows) >= limit))
        if len(rows) >= NO_LIMIT:
            raise EnvError(f"an episode did not end in {NO_LIMIT} steps. Fix: set env.max_steps")
        for i in np.flatnonzero(ended):
            length[i], terminated[i] = len(rows), step.terminated[i]
            final[i] = {key: latest(value)[i].copy() for key, value in step.next_obs.items()}
        running &= ~ended
        obs = step.obs
    return [
        _episode(
            rows[: length[i]], i, final[i], bool(terminated[i]), None if success is None else bool(success[i])
        )
        for i in range(n)
    ]


def _episode(
    rows: list[tuple[Arrays, np.ndarray, np.ndarray]],
    i: int,
    final: Arrays,
    terminated: bool,
    success: bool | None,
) -> Episode:
    obs = {key: np.stack([*(row[0][key][i] for row in rows), final[key]]) for key in final}
    instruction = ""
    if "instruction" in obs:
        instruction = bytes(obs["instruction"][0]).rstrip(b"\0").decode("utf-8", errors="replace")
    return Episode(
        obs=obs,
        action=np.stack([row[1][i] for row in rows]),
        reward=np.array([row[2][i] for row in rows], np.float32),
        terminated=terminated,
        truncated=not terminated,
        success=success,
        instruction=instruction,
    )


class _Random:
    def __init__(self, vec: VecEnv) -> None:
        if not vec.spec.bounded:
            raise EnvError("policy=random needs action bounds, and this environment has none")
        self.low, self.high = np.array(vec.spec.action_low), np.array(vec.spec.action_high)
        self.choices = vec.spec.choices
        self.streams: list[np.random.Generator] = []

    def begin(self, seeds: list[int]) -> None:
        self.streams = [np.random.default_rng([1, seed]) for seed in seeds]

    def act(self, obs: Arrays) -> np.ndarray:
        if self.choices:
            return np.stack([stream.integers(self.choices, size=1) for stream in self.streams])
        return np.stack([stream.uniform(self.low, self.high) for stream in self.streams])


class _Noisy:
    def __init__(self, actor: Actor, vec: VecEnv, noise: float) -> None:
        if vec.spec.choices:
            raise ConfigError(
                f"noise={noise} needs continuous actions, here are {vec.spec.choices} discrete ones. Fix: noise=0"
            )
        low, high = np.array(vec.spec.action_low), np.array(vec.spec.action_high)
        half = (high - low) / 2
        self.actor, self.std = actor, noise * np.where(np.isfinite(half), half, 1.0)
        self.streams: list[np.random.Generator] = []

    def begin(self, seeds: list[int]) -> None:
        self.actor.begin(seeds)
        self.streams = [np.random.default_rng([2, seed]) for seed in seeds]

    def act(self, obs: Arrays) -> np.ndarray:
        noise = np.stack([stream.normal(size=self.std.shape) for stream in self.streams])
        return self.actor.act(obs) + noise * self.std


class _Learnt:
    def __init__(self, policy: Policy, num_envs: int, deterministic: bool) -> None:
        self.policy = policy.eval()
        self.deterministic = deterministic
        self.stepper = StepPolicy(policy, num_envs)
        self.generator = torch.Generator(device=policy.device)

    def begin(self, seeds: list[int]) -> None:
        self.generator.manual_seed(seeds[0])
        self.stepper.reset()

    def act(self, obs: Arrays) -> np.ndarray:
        tensors = to_torch(obs, self.policy.device)
        return (
            self.stepper.act(tensors, generator=self.generator, deterministic=self.deterministic)
            .cpu()
            .numpy()
        )


class _Script:
    def __init__(self, config: CollectConfig, num_envs: int) -> None:
        expert = getattr(ENVS.get(config.env.name).target, "expert", None)
        if expert is None:
            able = ", ".join(entry.name for entry in ENVS if hasattr(entry.target, "expert"))
            raise ConfigError(
                f"policy=script: env={config.env.name} has no scripted expert. "
                f"Environments that have one: {able or 'none'}. Fix: policy=random or policy=<run>"
            )
        self.make = lambda seed: expert(config.env, num_envs, config.quality, seed)
        self.expert: Any = None

    def begin(self, seeds: list[int]) -> None:
        self.expert = self.make(seeds[0])

    def act(self, obs: Arrays) -> np.ndarray:
        return self.expert.act(obs)
