# SPDX-License-Identifier: Apache-2.0
"""Cloned flow and diffusion policies that fine-tuning begins with, kept under data/generative.

The seed of a base policy is also that of its demonstrations and of the fine-tuning that follows. Several processes may
ask for the same policy: one trains it, the others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robopost.artefacts.checkpoint import load_policy
from robopost.bench import find_checkout
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import EnvConfig
from robopost.data.convert import import_source, open_source
from robopost.errors import ConfigError
from robopost.evaluate.rollout import EvalResult, evaluate
from robopost.loops import train
from robopost.policies.base import Policy

ROOT = find_checkout()
FOLDER = ROOT / "data" / "generative"
SHARED = Path(os.environ.get("ROBOPOST_TEST_DATA", ROOT.parent / "shared" / "data"))
PUSHT = SHARED / "pusht_human" / "pusht_cchi_v7_replay.zarr.zip"
HOPPER = ROOT / "data" / "mujoco_v5" / "hopper-medium.zarr"
DEMO_SEED = 10_000_000  # episodes of demonstrations begin here, 10,000 seeds apart
EVAL_SEED = 1_000_000  # evaluation starts from states that neither demonstrations nor training saw
QUIET = ["device=cpu", "accel.threads=1", "track.tensorboard=false", "track.console=false"]
# Of the arms' flows, whose recipes are larger: what is fine-tuned executes its chunks whole.
SMALL = {"policy.horizon": 4, "policy.width": 128, "loop.steps": 2500}


@dataclass(frozen=True)
class Task:
    """A task of the grid.

    Attributes:
        env: words that make its environment.
        quality: of the scripted demonstrations, None where they come from elsewhere.
        metric: "success" or "return".
    """

    env: tuple[str, ...]
    quality: float | None
    metric: str = "success"


TASKS = {
    "arm_push": Task(("env=arm_push", "env.threads=1"), 0.5),
    "arm_pick_place": Task(("env=arm_pick_place", "env.threads=1"), 0.4),
    "pusht": Task(("env=pusht", "env.initial=diffusion_policy", "env.obs_keys=[state]"), None),
    "hopper": Task(("env=hopper", "env.threads=1"), None, metric="return"),
}
DEMONSTRATIONS = 100  # episodes of the script
CLASSES = ("flow", "diffusion")
# Sizes at which a backbone trains in about a minute on one core.
BACKBONES = {
    "mlp": {},
    "unet": {"policy.width": 32, "policy.depth": 2},
    "transformer": {"policy.width": 64, "policy.depth": 2},
}
SLOW = 4000  # updates of other backbones than the MLP in Push-T, a third of the recipe's


def env_of(task: str) -> EnvConfig:
    """The environment that policies of `task` are evaluated in."""
    return compose([*TASKS[task].env, "algo=bc"]).env


def demos(task: str, seed: int, episodes: int = DEMONSTRATIONS) -> Path:
    """The store of demonstrations, recorded or imported at the first call.

    Raises:
        ConfigError: a set or file that this machine can't make is absent.
    """
    quality = TASKS[task].quality
    if task == "hopper":
        if not HOPPER.exists():
            raise ConfigError(f"{HOPPER} is absent. Fix: robopost collect suite=mujoco_v5/hopper-medium")
        return HOPPER
    path = FOLDER / ("demos-pusht.zarr" if quality is None else f"demos-{task}-{episodes}-{seed}.zarr")
    with locked(path):
        if path.exists():
            return path
        if quality is None:
            if not PUSHT.exists():
                raise ConfigError(f"{PUSHT} is absent. Fix: ROBOPOST_TEST_DATA=<folder with pusht_human>")
            import_source(open_source(PUSHT), path).close()
            return path
        words = [*TASKS[task].env, f"quality={quality}", f"episodes={episodes}", "num_envs=50"]
        partial = path.with_suffix(".partial")
        collect(compose([*words, f"seed={DEMO_SEED + 10_000 * seed}", f"out={partial}"], "collect"))
        partial.rename(path)
    return path


def clone_words(task: str, kind: str, backbone: str = "mlp", updates: int = 0) -> list[str]:
    """Overrides of the run that trains a base policy, without its data and seed; `updates` 0 = the recipe's."""
    options = {"policy.backbone": backbone}
    options |= SMALL if task.startswith("arm") and kind == "flow" else {}
    options |= BACKBONES[backbone]
    options |= {"loop.steps": SLOW} if task == "pusht" and backbone != "mlp" else {}
    options |= {"loop.steps": updates, "loop.log_every": updates} if updates else {}
    return [f"recipe={task}/{kind}_bc", *(f"{key}={value}" for key, value in options.items())]


def train_base(
    task: str, kind: str, backbone: str, seed: int, *, updates: int = 0, episodes: int = DEMONSTRATIONS
) -> tuple[Path, dict[str, float]]:
    """The run of a base policy, trained at the first call; and seconds (wall, CPU) that took.

    Runs of shorter training or fewer demonstrations than a recipe's are kept apart.
    """
    name = f"{task}-{kind}-{seed}" if backbone == "mlp" else f"{task}-{kind}-{backbone}-{seed}"
    words = clone_words(task, kind, backbone, updates)
    folder = FOLDER / (f"{name}-{updates}-{episodes}" if updates else name)
    with locked(folder):
        note = folder / "trained.json"
        if note.exists() and (stored := json.loads(note.read_text()))["words"] == words:
            return folder, stored["seconds"]
        data = demos(task, seed, episodes)
        shutil.rmtree(folder, ignore_errors=True)
        wall, cpu = time.perf_counter(), time.process_time()
        # Evaluated by the caller, from fixed states.
        words_all = [*words, *QUIET, "env=null", f"data.path={data}", f"seed={seed}", f"out={folder}"]
        train(compose(words_all))
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        note.write_text(json.dumps({"words": words, "seconds": seconds}))
    return folder, seconds


def score(task: str, policy: Policy | Path, episodes: int, *, sampled: bool) -> EvalResult:
    """Evaluate samples or the mode of a policy from `EVAL_SEED` on, the same states for every policy."""
    policy = load_policy(policy) if isinstance(policy, Path) else policy
    return evaluate(policy, env_of(task), episodes=episodes, seed=EVAL_SEED, deterministic=not sampled)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of `path` between processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
