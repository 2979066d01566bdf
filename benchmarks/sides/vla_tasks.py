# SPDX-License-Identifier: Apache-2.0
"""Tasks, demonstrations and cloned policies of the VLA studies, kept under data/vla; each is made at the first call."""

import shutil
from pathlib import Path

import numpy as np
from sides.bases import QUIET, ROOT, locked
from sides.vla_backbone import backbone_errors, make_backbone

from robopost.artefacts.checkpoint import LATEST, load_policy
from robopost.bench import Bench
from robopost.collect import collect
from robopost.compose import compose
from robopost.evaluate.rollout import evaluate
from robopost.evaluate.statistics import t_interval
from robopost.loops import train
from robopost.results import params_hash

FOLDER = ROOT / "data" / "vla"
RUNS = ROOT / "runs" / "vla"
DEMO_SEED = 20_000_000  # episodes of demonstrations begin here, 100,000 seeds apart
EVAL_SEED = 3_000_000
SEEN = ["env=arm_language", "env.obs=state+pixels96", "env.terminate_on_success=true", "env.threads=1"]
STEPS = 60  # control steps of an episode; the script needs 8 to touch, 14 to lift, 29 to put
ENV = [*SEEN, f"env.max_steps={STEPS}"]
FRAMES = 1500  # recorded episodes that the backbone learns from


def demos(name: str, words: list[str], episodes: int, seed: int = 0, quality: float | None = 0.95) -> Path:
    """A store of episodes in `arm_language` with the settings `words`; names must be unique per settings.

    Scripted, or by the policy that `words` name (`quality` None).
    """
    path = FOLDER / f"demos-{name}-{episodes}-{seed}.zarr"
    with locked(path):
        if not path.exists():
            partial = path.with_suffix(".partial")
            begin = DEMO_SEED + 100_000 * seed
            facts = [f"episodes={episodes}", "num_envs=50", f"seed={begin}"]
            facts += [f"quality={quality}"] if quality is not None else []
            collect(compose([*ENV, *words, *facts, f"out={partial}"], "collect"))
            partial.rename(path)
    return path


def backbone(ground_steps: int, point_steps: int, episodes: int = FRAMES) -> tuple[Path, dict[str, float]]:
    """The backbone's folder and its errors."""
    folder = FOLDER / f"backbone-{episodes}-{ground_steps}-{point_steps}"
    with locked(folder):
        if not folder.exists():
            frames = demos("frames", ["env.split=train"], episodes, seed=90)
            make_backbone(frames, ENV, folder, ground_steps=ground_steps, point_steps=point_steps)
    return folder, backbone_errors(folder)


def clone(name: str, start: Path, data: Path, steps: int, seed: int, *more: str) -> Path:
    """The run of a policy that goes on from `start` by behaviour cloning of `data`."""
    words = [
        "algo=bc",
        "policy=pretrained",
        "algo.batch_size=64",
        "algo.lr=1e-3",
        "algo.ema=0.99",
        f"algo.decay_steps={steps}",
        f"loop.steps={steps}",
        f"loop.log_every={max(1, steps // 20)}",
        f"loop.checkpoint_every={max(1, steps // 5)}",
        *more,
    ]
    # What it depends on is in its name: other sizes never meet in one folder.
    folder = (
        FOLDER / f"{name}-{seed}-{params_hash({'start': start.name, 'data': data.name, 'words': words})[:8]}"
    )
    with locked(folder):
        if not (folder / "trained").exists():
            paths = [f"policy.path={start}", f"data.path={data}"]
            resumed = (folder / "checkpoints" / LATEST).exists()
            if not resumed:
                shutil.rmtree(folder, ignore_errors=True)
            paths.append(f"resume={folder}" if resumed else f"out={folder}")
            train(compose([*words, *QUIET, "env=null", f"seed={seed}", *paths]))
            (folder / "trained").touch()
    return folder


def score(policy, words: list[str], episodes: int, offset: int = 0) -> list[float]:
    """Success of each greedy episode in the tasks that `words` choose, from the same start states for every policy.

    Another `offset` gives other start states.
    """
    policy = load_policy(policy) if isinstance(policy, Path) else policy
    env = compose([*ENV, *words, "algo=bc"]).env
    result = evaluate(policy, env, episodes=episodes, seed=EVAL_SEED + offset)
    assert result.successes is not None
    return [float(value) for value in result.successes]


def shown(values: list[float], seeds: list[int]) -> str:
    """Mean and interval of successes, one per seed, for a table; empty where a seed is missing."""
    if len(values) < len(seeds):
        return ""
    if len(values) == 1:
        return f"{100 * values[0]:.1f} %"
    found = t_interval(values)
    return f"{100 * found.value:.1f} % [{100 * max(0, found.low):.1f}, {100 * min(1, found.high):.1f}]"


def figure(
    bench: Bench, name: str, values: list[float], seeds: list[int], target: float, note: str, **more: str
) -> None:
    """A figure with one value per seed; empty where a seed is missing."""
    whole = len(values) == len(seeds)
    found = t_interval(values) if whole and len(values) > 1 else None
    bench.figure(
        name,
        float(np.mean(values)) if whole else None,
        interval=(found.low, found.high) if found else None,
        unit="fraction",
        target=target,
        note=f"{note}; {len(seeds)} seeds, 95 % t interval",
        **more,
    )
