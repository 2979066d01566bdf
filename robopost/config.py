# SPDX-License-Identifier: Apache-2.0
"""Typed schema of a run. YAML only overrides it; inside the library there are only these dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from robopost.errors import ConfigError, unknown

ONLINE_SAMPLING = ("symmetric", "uniform")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a negative seed, which random generators do not take."""
    if seed < 0:
        raise ConfigError(f"seed={seed} must be 0 or more")


def check_widths(section: str, config: Any) -> None:
    """Raise ConfigError for a hidden layer without units: the network behind it would be a constant.

    Args:
        section: where `config` stands, e.g. `"policy"`.
        config: a config dataclass (or None); its lists of layer sizes are called `hidden` or `<what>_hidden`.
    """
    for item in fields(config) if is_dataclass(config) else ():
        sizes = getattr(config, item.name)
        if f"_{item.name}".endswith("_hidden") and min(sizes, default=1) < 1:
            raise ConfigError(
                f"{section}.{item.name}={sizes}: every layer needs at least 1 unit. Fix: larger sizes, [] for none"
            )


@dataclass
class EnvConfig:
    """Base of every environment's config.

    Registered environments extend it (`name` is the registry name). `num_envs` is the number of parallel copies for
    training; evaluation makes its own.
    """

    name: str = ""
    num_envs: int = 1  # parallel copies for training
    max_steps: int = 0  # time limit, 0 = the environment's own
    obs_keys: list[str] = field(default_factory=list[str])  # empty = all the environment offers

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigError(f"env.num_envs={self.num_envs} must be at least 1")


@dataclass
class PolicyConfig:
    """Base of every policy's config (`name` is the registry name)."""

    name: str = ""
    horizon: int = 1  # length of a predicted action chunk
    execute: int = 0  # steps executed before the next query, 0 = the whole chunk
    history: int = 1  # observations the policy sees
    obs_keys: list[str] = field(default_factory=list[str])  # empty = all the environment offers
    normalise_obs: str = (
        "meanstd"  # identity | meanstd | minmax, from the dataset; online runs without one: identity
    )
    normalise_action: str = "bounds"  # identity | bounds | meanstd | minmax | quantile


@dataclass
class AlgoConfig:
    """Base of every algorithm's config (`name` is the registry name)."""

    name: str = ""


@dataclass
class DataConfig:
    """Where recorded experience comes from; empty `path` = none."""

    path: str = (
        ""  # a robopost store, or a file of any registered format (imported once into a store beside it)
    )
    format: str = "auto"  # auto = detect; see `robopost data --help`
    episodes: int = 0  # use only the first N episodes, 0 = all
    device: str = "auto"  # auto = on the training device when it fits
    reward_scale: float = 1.0  # reward * scale + shift
    reward_shift: float = 0.0
    sparse_reward: bool = (
        False  # return_to_go: a constant reward up to a time limit is taken to go on for ever
    )
    collect: int = 0  # episodes to record with the env's scripted expert at the start, when path is empty
    quality: float = 0.7  # of that expert, 0 (random) to 1

    def __post_init__(self) -> None:
        if self.collect < 0 or self.episodes < 0:
            raise ConfigError(
                f"data.collect={self.collect} and data.episodes={self.episodes} must be 0 or more"
            )
        if not 0.0 <= self.quality <= 1.0:
            raise ConfigError(f"data.quality={self.quality} must lie in 0..1")
        if self.collect and self.path:
            raise ConfigError(
                f"data.path={self.path} and data.collect={self.collect} exclude each other. Fix: set one"
            )


@dataclass
class LoopConfig:
    """Lengths and intervals of a run, in updates (offline) or environment steps (off-policy, on-policy).

    On-policy algorithms that learn from whole episodes (`vla_opd`, `grpo`) count episodes instead.

    An offline algorithm may go on online: the step counter then runs on from `steps` updates through `online_steps`
    environment steps.
    """

    steps: int = 10_000  # updates (offline), environment steps, or episodes where whole ones are learnt from
    online_steps: int = 0  # environment steps after the updates of an offline algorithm, 0 = stay offline
    online_sampling: str = (
        "symmetric"  # symmetric (half of each batch recorded, half new) | uniform (over both)
    )
    log_every: int = 500  # steps between log lines
    eval_every: int = 0  # 0 = only at the end
    eval_episodes: int = 20  # per evaluation
    eval_deterministic: bool = True  # the policy's mode; false samples, which multi-modal human data asks for
    checkpoint_every: int = 0  # 0 = only at the end
    keep_checkpoints: int = 2  # newest ones kept
    buffer_size: int = 1_000_000  # transitions, off-policy and online

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_episodes", "keep_checkpoints", "buffer_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loop.{name}={getattr(self, name)} must be at least 1")
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loop.{name}={getattr(self, name)} must be 0 (only at the end) or more")
        if self.online_steps < 0:
            raise ConfigError(f"loop.online_steps={self.online_steps} must be 0 (stay offline) or more")
        if self.online_sampling not in ONLINE_SAMPLING:
            raise unknown("loop.online_sampling", self.online_sampling, ONLINE_SAMPLING)

    @property
    def total(self) -> int:
        """Steps of the whole run, both phases."""
        return self.steps + self.online_steps


@dataclass
class TrackConfig:
    """JSONL is always written; `also` names further trackers (wandb, trackio)."""

    tensorboard: bool = True
    console: bool = True  # a table per log interval and a progress bar; False trains in silence
    also: list[str] = field(default_factory=list[str])
    project: str = "robopost"
    video_episodes: int = 0  # episodes recorded to mp4 at each evaluation


@dataclass
class AccelConfig:
    """Compilation of the update step, see `robopost/accel.py`."""

    mode: str = "auto"  # auto | eager | compile | cudagraph. auto = cudagraph on a GPU, eager on CPU
    threads: int = 0  # CPU threads of torch, 0 = torch's own choice
    fsdp: bool = False  # spread weights, gradients and optimiser state over the processes of torchrun
    stack_seeds: str = "auto"  # train all of `seeds` at once: auto (where it is faster) | on | off


@dataclass
class TrainConfig:
    """One training run. `algo`, `policy` and `env` hold the dataclass their `name` registers."""

    algo: Any = None
    policy: Any = None
    env: Any = None
    data: DataConfig = field(default_factory=DataConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    accel: AccelConfig = field(default_factory=AccelConfig)
    seed: int = 0
    seeds: int = 1  # trains seed, seed+1, ... into out/seed_<n>, at once where accel.stack_seeds says so
    device: str = "auto"
    out: str = ""  # run folder, empty = runs/<algo>-<env>-<time>
    resume: str = ""  # run folder to go on with

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_widths("algo", self.algo)
        check_widths("policy", self.policy)
        if not 0 <= self.track.video_episodes <= self.loop.eval_episodes:
            raise ConfigError(
                f"track.video_episodes={self.track.video_episodes} must lie in 0..{self.loop.eval_episodes} "
                "(loop.eval_episodes)"
            )


@dataclass
class EvalConfig:
    """What `robopost eval` does."""

    policy: str = "???"  # run folder, checkpoint, policy folder or npz actor
    env: Any = None  # default: the environment the policy was trained in
    episodes: int = 100
    seed: int = 0  # episode i is reset with seed + i
    num_envs: int = 0  # parallel environments, 0 = up to 32
    deterministic: bool = True  # the policy's mode; false samples
    video: int = 0  # episodes recorded to mp4
    draws: int = 0  # chunks drawn at every query to measure the spread of samples, 0 = none
    out: str = ""  # folder for eval.json and the video, empty = eval/ in the run folder, else evals/
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"episodes={self.episodes} must be at least 1")
        check_seed(self.seed)
        if not 0 <= self.video <= self.episodes:
            raise ConfigError(f"video={self.video} must lie in 0..{self.episodes} (episodes)")
        if self.draws < 0 or self.draws == 1:
            raise ConfigError(f"draws={self.draws} must be 0 (none) or at least 2")
        if self.num_envs < 0:
            raise ConfigError(f"num_envs={self.num_envs} must be 0 (automatic) or more")


@dataclass
class CollectConfig:
    """What `robopost collect` does."""

    env: Any = None
    policy: str = (
        "script"  # script (the environment's expert), random, or a run folder, policy folder, npz actor
    )
    episodes: int = 200
    out: str = "???"  # the store to write; an unfinished one is continued
    quality: float = 1.0  # of the scripted expert: 0 (random) to 1
    noise: float = 0.0  # std of Gaussian noise added to actions, as a share of half the action range
    deterministic: bool = False  # a learnt policy's mode
    seed: int = 0  # episode i is reset with seed + i
    num_envs: int = 16  # parallel environments
    device: str = "auto"
    suite: str = (
        ""  # record sets of a suite instead, e.g. mujoco_v5/hopper-medium or mujoco_v5; out= is their folder
    )
    scale: float = 1.0  # with suite=: share of each set's transitions

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"episodes={self.episodes} must be at least 1")
        if not 0.0 <= self.quality <= 1.0:
            raise ConfigError(f"quality={self.quality} must lie in 0..1")
        if not 0.0 < self.scale <= 1.0:
            raise ConfigError(f"scale={self.scale} must lie above 0 and at most 1")
        check_seed(self.seed)
        if self.noise < 0.0:
            raise ConfigError(f"noise={self.noise} must be 0 or more")
        if self.num_envs < 1:
            raise ConfigError(f"num_envs={self.num_envs} must be at least 1")


@dataclass
class DemoConfig:
    """What `robopost demo` does; the defaults fit six minutes on two CPU cores."""

    out: str = "runs/demo"
    seed: int = 0
    demonstrations: int = 100
    quality: float = 0.5  # of the scripted expert that demonstrates: 0 to 1
    eval_episodes: int = 100
    video_episodes: int = 4
    clone_updates: int = 0  # 0 = the recipe's
    finetune_steps: int = 0  # 0 = the recipe's

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("demonstrations", "eval_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.quality <= 1.0:
            raise ConfigError(f"quality={self.quality} must lie in 0..1")
        if not 0 <= self.video_episodes <= self.eval_episodes:
            raise ConfigError(f"video_episodes={self.video_episodes} must lie in 0..{self.eval_episodes}")
