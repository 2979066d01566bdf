# SPDX-License-Identifier: Apache-2.0
"""Training runs of ours and of stable-baselines3 with equal settings: whole, and in turns for timing."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robopost.accel import configure, startup_frozen
from robopost.artefacts.checkpoint import load_policy
from robopost.compose import compose
from robopost.errors import MissingExtraError
from robopost.evaluate.rollout import evaluate
from robopost.loops import LOOPS, train
from robopost.loops.run import Run

EVAL_SEED = 10_000
ROLLOUT = 2048  # transitions of one PPO rollout, all environments together
# What makes our defaults stable-baselines3's. SAC's are already.
SETTINGS = {
    "ppo": [
        "policy=gaussian",
        "policy.hidden=[64,64]",
        "policy.activation=tanh",
        "policy.init=orthogonal",
        "policy.squash=false",
        "policy.state_std=false",
    ],
    "sac": ["policy=gaussian"],
    "td3": [
        "policy=deterministic",
        "policy.hidden=[400,300]",
        "algo.hidden=[400,300]",
        "algo.actor_lr=1e-3",
        "algo.critic_lr=1e-3",
        "algo.warmup_steps=100",
    ],
}
EXPLORATION = 0.1  # std of TD3's noise: ours by default, stable-baselines3 explores with none


def words(algo: str, task: str, num_envs: int, seed: int, out: Path, threads: int = 1) -> list[str]:
    """Overrides of our run."""
    rollout = [f"algo.rollout_steps={ROLLOUT // num_envs}"] if algo == "ppo" else []
    return [
        f"algo={algo}",
        *SETTINGS[algo],
        *rollout,
        f"env={task}",
        f"env.num_envs={num_envs}",
        f"env.threads={threads}",
        f"seed={seed}",
        f"out={out}",
        "device=cpu",
        "accel.threads=1",
        "track.tensorboard=false",
        "track.console=false",
    ]


def their_model(algo: str, task: str, num_envs: int, seed: int, processes: bool = False) -> Any:
    """stable-baselines3's model, with the environments its users get from `make_vec_env`."""
    try:
        import stable_baselines3 as library
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.noise import NormalActionNoise
        from stable_baselines3.common.vec_env import SubprocVecEnv
    except ImportError as error:
        raise MissingExtraError(
            "stable_baselines3 is not installed. Fix: pip install stable-baselines3"
        ) from error
    torch.set_num_threads(1)
    # The checker of gym.make is left out: it would slow stable-baselines3 down.
    env = make_vec_env(
        task,
        num_envs,
        seed=seed,
        env_kwargs={"disable_env_checker": True},
        vec_env_cls=SubprocVecEnv if processes else None,
    )
    options: dict[str, Any] = {"seed": seed, "device": "cpu"}
    if algo == "ppo":
        options |= {"n_steps": ROLLOUT // num_envs}
    else:
        options |= {"train_freq": 1, "gradient_steps": -1}  # as many updates as transitions
    if algo == "td3":
        size = env.action_space.shape
        options |= {"action_noise": NormalActionNoise(np.zeros(size), np.full(size, EXPLORATION))}
    return getattr(library, algo.upper())("MlpPolicy", env, **options)


def ours(algo: str, task: str, num_envs: int, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """Train through the public API and evaluate the saved policy."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        more = [f"loop.steps={steps}", f"loop.log_every={max(1, steps // 20)}", "loop.eval_episodes=1"]
        config = compose([*words(algo, task, num_envs, seed, out), *more])
        began = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - began
        result = evaluate(load_policy(out), config.env, episodes=episodes, seed=EVAL_SEED)
    return summary(np.asarray(result.returns), seconds)


def theirs(algo: str, task: str, num_envs: int, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """Train stable-baselines3 and evaluate on the same start states."""
    import gymnasium as gym

    model = their_model(algo, task, num_envs, seed)
    began = time.perf_counter()
    model.learn(steps)
    seconds = time.perf_counter() - began
    model.env.close()
    env = gym.make(task)
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=EVAL_SEED + episode)
        total, done = 0.0, False
        while not done:
            action, _ = model.predict(obs, deterministic=True)
            obs, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    env.close()
    return summary(np.asarray(returns), seconds)


def summary(returns: np.ndarray, seconds: float) -> dict[str, Any]:
    """Cell form of one run."""
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "returns": [float(value) for value in returns],
        "train_seconds": seconds,
    }


class Turns:
    """A training run in a process of its own that trains when it is told to and waits otherwise.

    Each library keeps its own settings of the process (threads, denormal numbers, memory) that way, and its own
    networks, buffer and environments from one turn to the next.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args))
        self._process.start()
        theirs.close()

    def __call__(self, steps: int) -> tuple[float, float]:
        """Train for `steps` environment steps: wall seconds and CPU seconds that took."""
        self._pipe.send(steps)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


class Stop(Exception):
    """The other end of the pipe is closed."""


class Clock:
    """The training process's end of a `Turns`."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began: tuple[float, float] | None = None
        self.steps = 0  # of this turn

    def turn(self) -> None:
        """Report the turn that ended, if there was one, and wait for the next."""
        if self._began is not None:
            wall, cpu = self._began
            self._pipe.send((time.perf_counter() - wall, time.process_time() - cpu))
        try:
            self.steps = self._pipe.recv()
        except EOFError as error:
            raise Stop from error
        self._began = (time.perf_counter(), time.process_time())


class PacedRun(Run):
    """A run that waits for its turn."""

    clock: Clock
    end: int

    def after(self, *args: Any) -> bool:
        """As `Run.after`; where the turn is over, wait for the next."""
        saved = super().after(*args)
        if self.step >= self.end:
            self.clock.turn()
            self.end = self.step + self.clock.steps
        return saved


def pin(cpus: int) -> None:
    """Run on the first `cpus` CPUs, 0 = on any; processes started from here inherit it."""
    if cpus:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])


def our_turns(pipe: Connection, algo: str, task: str, num_envs: int, cpus: int = 0) -> None:
    """Target of `Turns`: our training loop; with `cpus` on so many, physics on as many threads."""
    pin(cpus)
    with tempfile.TemporaryDirectory() as folder:
        more = ["loop.steps=1000000000"]
        config = compose([*words(algo, task, num_envs, 0, Path(folder) / "run", cpus or 1), *more])
        configure(config.accel)
        run = PacedRun(config, Path(config.out))
        run.clock = Clock(pipe)
        try:
            run.clock.turn()
            run.end = run.clock.steps
            with startup_frozen():  # as in `train`
                LOOPS["onpolicy" if algo == "ppo" else "offpolicy"](run)
        except Stop:
            pass
        finally:
            run.close()


def their_turns(pipe: Connection, algo: str, task: str, num_envs: int, cpus: int = 0) -> None:
    """Target of `Turns`: stable-baselines3's `learn`, which goes on where it was.

    With `cpus` on so many, a process per environment.
    """
    pin(cpus)
    model = their_model(algo, task, num_envs, 0, processes=cpus > 0)
    clock = Clock(pipe)
    try:
        while True:
            clock.turn()
            model.learn(clock.steps, reset_num_timesteps=False)
    except Stop:
        pass
    finally:
        model.env.close()
