# SPDX-License-Identifier: Apache-2.0
"""Evaluation: whole episodes from known seeds, in parallel, counted without bias."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robopost.config import EnvConfig
from robopost.errors import ConfigError, EnvError
from robopost.evaluate.scores import References, find_references, load_references
from robopost.evaluate.smoothness import MotionLog, Smoothness
from robopost.evaluate.statistics import Interval, bootstrap_mean, interquartile_mean, wilson
from robopost.evaluate.video import Clip, Recorder, write_grid
from robopost.policies.base import Policy
from robopost.policies.chunked import StepPolicy
from robopost.progress import progress_bar
from robopost.vector import Step, VecEnv, make_vec, to_torch

MAX_PARALLEL = 32
NO_LIMIT = 100_000  # steps after which an episode of an environment without a time limit counts as endless


@dataclass
class EvalResult:
    """What `evaluate` measured, one entry per episode, in the order of the episode seeds.

    Attributes:
        returns: (E,) undiscounted sum of rewards.
        successes: (E,) bool, True when any step reported success; None where the task has no predicate.
        lengths: (E,) environment steps.
        max_rewards: (E,) largest single reward, e.g. the best coverage in Push-T.
        seconds: wall time of the rollouts, without making the environment.
        seed: episode i was reset with `seed + i`.
        references: what a normalised score of this task is relative to; None where no suite has the task.
        smoothness: of the executed actions; None where they are discrete or without bounds.
    """

    returns: np.ndarray
    successes: np.ndarray | None
    lengths: np.ndarray
    max_rewards: np.ndarray
    seconds: float
    env: str = ""
    seed: int = 0
    num_envs: int = 1
    deterministic: bool = True
    video: str = ""
    references: References | None = None
    smoothness: Smoothness | None = None
    clips: list[Clip] = field(default_factory=list, repr=False)

    @property
    def episodes(self) -> int:
        """Number of episodes."""
        return len(self.returns)

    def success(self, level: float = 0.95) -> Interval | None:
        """Success rate with its Wilson interval, or None where the task has no success predicate."""
        return None if self.successes is None else wilson(int(self.successes.sum()), self.episodes, level)

    def mean_return(self, level: float = 0.95) -> Interval:
        """Mean return with its bootstrap interval."""
        return bootstrap_mean(self.returns, level)

    def score(self, level: float = 0.95) -> Interval | None:
        """Normalised score with the interval of the mean return, or None without `references`."""
        return None if self.references is None else self.references.interval(self.mean_return(level))

    def metrics(self) -> dict[str, float]:
        """Scalars for the trackers, under the metric names all algorithms share."""
        ret = self.mean_return()
        out = {
            "eval/return": ret.value,
            "eval/return_low": ret.low,
            "eval/return_high": ret.high,
            "eval/length": float(self.lengths.mean()),
            "eval/max_reward": float(self.max_rewards.mean()),
            "time/eval": self.seconds,
        }
        success = self.success()
        if success is not None:
            out |= {
                "eval/success": success.value,
                "eval/success_low": success.low,
                "eval/success_high": success.high,
            }
        score = self.score()
        if score is not None:
            out["eval/normalised_score"] = score.value
        return out | (self.smoothness.metrics() if self.smoothness is not None else {})

    def to_json(self) -> dict[str, Any]:
        """Raw episodes and their summary; `from_json` reverses it (without clips)."""
        success, score = self.success(), self.score()
        scored: dict[str, Any] | None = None
        if score is not None and self.references is not None:
            named = {key: getattr(self.references, key) for key in ("suite", "version", "task")}
            scored = named | score.to_json()
        return {
            "env": self.env,
            "episodes": self.episodes,
            "seed": self.seed,
            "num_envs": self.num_envs,
            "deterministic": self.deterministic,
            "seconds": round(self.seconds, 3),
            "video": self.video,
            "success": success.to_json() if success else None,
            "return": self.mean_return().to_json(),
            "normalised_score": scored,
            "return_iqm": interquartile_mean(self.returns).to_json(),
            "max_reward": bootstrap_mean(self.max_rewards).to_json(),
            "length": bootstrap_mean(self.lengths).to_json(),
            "smoothness": self.smoothness.to_json() if self.smoothness is not None else None,
            "raw": {
                "returns": [float(v) for v in self.returns],
                "successes": None if self.successes is None else [bool(v) for v in self.successes],
                "lengths": [int(v) for v in self.lengths],
                "max_rewards": [float(v) for v in self.max_rewards],
            },
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> EvalResult:
        """Rebuild from `to_json` output. The references are those of the installed version."""
        raw, scored, smooth = data["raw"], data.get("normalised_score"), data.get("smoothness")
        return cls(
            returns=np.asarray(raw["returns"], np.float64),
            successes=None if raw["successes"] is None else np.asarray(raw["successes"], bool),
            lengths=np.asarray(raw["lengths"], np.int64),
            max_rewards=np.asarray(raw["max_rewards"], np.float64),
            seconds=data["seconds"],
            env=data["env"],
            seed=data["seed"],
            num_envs=data["num_envs"],
            deterministic=data["deterministic"],
            video=data["video"],
            references=load_references(scored["suite"])[scored["task"]] if scored else None,
            smoothness=Smoothness.from_json(smooth) if smooth else None,
        )

    def summary(self) -> list[str]:
        """Lines for the console."""
        lines = []
        success = self.success()
        if success is not None and self.successes is not None:
            lines.append(
                f"success  {success.text(percent=True)}  ({int(self.successes.sum())} of {self.episodes})"
            )
        lines.append(f"return   {self.mean_return().text()}")
        score = self.score()
        if score is not None and self.references is not None:
            lines.append(f"score    {score.text()}  ({self.references.label})")
        lines.append(
            f"length   {self.lengths.mean():.1f} steps, {self.episodes} episodes in {self.seconds:.1f} s"
        )
        if self.smoothness is not None and self.smoothness.line():
            lines.append(f"motion   {self.smoothness.line()}")
        return lines


def evaluate(
    policy: Policy,
    env: EnvConfig | VecEnv,
    *,
    episodes: int,
    seed: int,
    num_envs: int = 0,
    deterministic: bool = True,
    video: Path | None = None,
    video_episodes: int = 0,
    draws: int = 0,
    progress: bool | Callable[[int], None] = False,
) -> EvalResult:
    """Run `episodes` whole episodes and count each exactly once.

    Episodes run in waves: each slot of the vectorised environment is reset with its own `seed + i`, and only
    the slot's first episode counts. Taking the first N episodes to finish instead would favour short ones:
    falls in a locomotion task, successes in one that ends on success.

    Args:
        policy: evaluated in eval mode; its training mode is restored.
        env: config of the environment to make and close, or one already made (kept open; needs a render mode
            for video). Its `history` must be the policy's.
        episodes: how many.
        seed: episode i is reset with `seed + i`, whatever `num_envs` is. Stochastic policies draw from a
            generator of their own, seeded with `seed`, so their numbers also depend on `num_envs`.
        num_envs: parallel environments, 0 = at most 32 in equal waves.
        deterministic: passed to the policy.
        video: mp4 to write, or None. Frames of the first `video_episodes` are kept in `clips` either way.
        video_episodes: number of episodes to record.
        draws: chunks drawn at every query to see how far samples for one observation lie apart, 0 = none. It takes
            `draws` times the policy's time and changes no episode.
        progress: True for a progress bar, or a function called with the number of finished episodes.

    Raises:
        ConfigError: a count is out of range.
        EnvError: the environment gives NaN, or an episode does not end.
    """
    if episodes < 1:
        raise ConfigError(f"eval.episodes={episodes} must be at least 1")
    if draws < 0 or draws == 1:
        raise ConfigError(f"eval: draws={draws} must be 0 (none) or at least 2")
    if not 0 <= video_episodes <= episodes or num_envs < 0:
        raise ConfigError(
            f"eval: video_episodes={video_episodes} must lie in 0..{episodes}, num_envs={num_envs} in 0.."
        )
    if isinstance(env, VecEnv):
        vec, own = env, False
    else:
        count = min(num_envs, episodes) or _even_waves(episodes)
        vec = make_vec(env, count, history=policy.history, render="rgb_array" if video_episodes else None)
        own = True
    if vec.history != policy.history:
        raise ConfigError(
            f"eval: the environment stacks {vec.history} observations, the policy sees {policy.history}"
        )
    # A gymnasium environment is one registered name with many ids.
    name = str(getattr(env, "id", "") or env.name) if isinstance(env, EnvConfig) else ""
    training = policy.training
    policy.eval()
    try:
        with _progress(progress, episodes) as report:
            result = _waves(policy, vec, episodes, seed, deterministic, video_episodes, draws, report)
    finally:
        policy.train(training)
        if own:
            vec.close()
    result.env = name
    result.references = find_references(env) if isinstance(env, EnvConfig) else None
    if video is not None and result.clips:
        write_grid(result.clips, video)
        result.video = video.name
    return result


def _waves(
    policy: Policy,
    vec: VecEnv,
    episodes: int,
    seed: int,
    deterministic: bool,
    video_episodes: int,
    draws: int,
    report: Callable[[int], None],
) -> EvalResult:
    n = vec.num_envs
    limit = vec.spec.max_steps or NO_LIMIT
    low, high = np.asarray(vec.spec.action_low), np.asarray(vec.spec.action_high)
    returns, max_rewards = np.zeros(episodes), np.full(episodes, -np.inf)
    lengths, successes = np.zeros(episodes, np.int64), np.zeros(episodes, bool)
    has_success = False
    generator = torch.Generator(device=policy.device)
    generator.manual_seed(seed)
    stepper = StepPolicy(policy, n)
    motion = MotionLog(vec, policy, episodes, draws=draws, seed=seed)
    stepper.watch = motion.watch
    recorder = Recorder(video_episodes, vec.spec.max_steps, vec.env.metadata.get("render_fps"))
    start = time.perf_counter()
    finished = 0
    for first in range(0, episodes, n):
        # A last wave may have spare slots: they run on further seeds and are never counted.
        running = np.arange(first, first + n) < episodes
        index = np.minimum(np.arange(first, first + n), episodes - 1)
        obs = vec.reset(seed=[seed + first + i for i in range(n)])
        stepper.reset()
        counted = running.copy()
        motion.begin(obs, running)
        steps = 0
        while running.any():
            if first < video_episodes:
                recorder.frames(vec, first, running, steps)
            action = stepper.act(
                to_torch(obs, policy.device), generator=generator, deterministic=deterministic
            )
            # The environment's bounds, which a policy trained on data without declared ones doesn't know.
            executed = np.clip(action.cpu().numpy(), low, high).astype(np.float32)
            vec.want_images(stepper.asks & running)
            step = vec.step(executed)
            motion.step(executed, step.next_obs)
            steps += 1
            at = index[running]
            returns[at] += step.reward[running]
            max_rewards[at] = np.maximum(max_rewards[at], step.reward[running])
            lengths[at] = steps
            if step.success is not None:
                has_success = True
                successes[at] |= step.success[running]
                recorder.successes(first, running, step.success, steps)
            ended = running & (step.done | (steps >= limit))
            if steps >= NO_LIMIT and running.any():
                raise EnvError(f"an episode did not end in {NO_LIMIT} steps. Fix: set env.max_steps")
            if ended.any():
                finished += int(ended.sum())
                report(finished)
                running &= ~ended
            _after(step, stepper)
            obs = step.obs
        vec.want_images(None)
        motion.end(index, counted, lengths[index])
    return EvalResult(
        returns=returns,
        successes=successes if has_success else None,
        lengths=lengths,
        max_rewards=max_rewards,
        seconds=time.perf_counter() - start,
        seed=seed,
        num_envs=n,
        deterministic=deterministic,
        smoothness=motion.result(),
        clips=recorder.clips(successes if has_success else None),
    )


def _after(step: Step, stepper: StepPolicy) -> None:
    """Forget the policy's state of slots whose episode ended, so that nothing leaks into the next one."""
    if step.done.any():
        stepper.reset(torch.from_numpy(step.done))


def _even_waves(episodes: int) -> int:
    """Environments per wave: as few waves as `MAX_PARALLEL` allows, all of nearly the same size."""
    return math.ceil(episodes / math.ceil(episodes / MAX_PARALLEL))


def _progress(
    progress: bool | Callable[[int], None], total: int
) -> AbstractContextManager[Callable[[int], None]]:
    if progress is True:
        return progress_bar("evaluating", total)
    return nullcontext(progress or (lambda done: None))
