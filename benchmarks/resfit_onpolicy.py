# SPDX-License-Identifier: Apache-2.0
"""ResFiT against on-policy residual PPO on the pushing arm: environment steps to the same success, and ResFiT's gain.

Each seed clones its own flow policy from its own 100 demonstrations (quality 0.5); both sides then correct that same
policy, with the same observations, reward and largest correction (recipes arm_push/resfit and arm_push/residual_ppo).
ResFiT alone also learns from the demonstrations, as its paper has it. PPO runs 16 copies of the arm, all of whose steps
count.

What the level of a seed is was fixed before any seed of this table was measured (both recipes were chosen on others):
success of the base plus half of ResFiT's final gain, both over the same 100 deterministic episodes, which no training
has seen. A side has reached it at the first evaluation from
which on the mean of two consecutive ones (100 episodes each, the same start states on both sides) is at the level; all
environment steps up to the later one count, warm-up included. A side that doesn't reach it counts with its whole
budget: for PPO the ratio is then a lower bound, and the figure's note says in how many seeds. The ratio is PPO's steps
divided by ResFiT's (0 where ResFiT gained nothing), its value the median over seeds, its interval the smallest and the
largest.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from robopost.artefacts.checkpoint import latest, load_policy
from robopost.bench import Bench, find_checkout
from robopost.collect import collect
from robopost.compose import compose
from robopost.evaluate.rollout import evaluate
from robopost.loops import train

SUITE = "generative"
EVAL_SEED = 1_000_000  # start states that neither demonstrations nor training saw
QUIET = ["device=cpu", "accel.threads=1", "track.tensorboard=false", "track.console=false"]
SIDES = {"resfit": "arm_push/resfit", "residual_ppo": "arm_push/residual_ppo"}

# Demonstrations, updates of cloning, episodes per evaluation; per side environment steps, steps between evaluations and
# what else differs from the recipe.
FULL = {"demos": 100, "clone": 2500, "episodes": 100}
SIZES = {
    "smoke": {
        "demos": 5,
        "clone": 20,
        "episodes": 4,
        "resfit": (400, 100, ["algo.warmup_steps=200", "algo.critic_warmup=50", "algo.updates_per_step=0.5"]),
        "residual_ppo": (6720, 2240, ["algo.epochs=1"]),
    },
    "small": FULL | {"resfit": (12_000, 500, []), "residual_ppo": (300_160, 11_200, [])},
    "paper": FULL | {"resfit": (40_000, 1000, []), "residual_ppo": (2_000_320, 44_800, [])},
}


def base_of(root: Path, seed: int, size: dict) -> Path:
    """Folder with `demos.zarr` and the run `base` of a seed, made once per size."""
    folder = root / "data" / "generative" / "resfit" / f"{size['demos']}x{size['clone']}-seed{seed}"
    if latest(folder / "base") is not None:
        return folder
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    words = ["env=arm_push", f"episodes={size['demos']}", "quality=0.5", f"seed={10_000 * seed}"]
    collect(compose([*words, f"out={partial / 'demos.zarr'}"], "collect"))
    words = ["recipe=arm_push/flow_bc", f"data.path={partial / 'demos.zarr'}", f"seed={seed}"]
    words += [f"loop.steps={size['clone']}", f"loop.log_every={size['clone']}", "loop.eval_episodes=1"]
    train(compose([*words, *QUIET, f"out={partial / 'base'}"]))
    try:
        partial.rename(folder)
    except OSError:  # the other side's process was faster
        shutil.rmtree(partial)
    return folder


def success(run: Path, episodes: int) -> float:
    """Success of a run's policy on the episodes of the figures."""
    env = compose(["recipe=arm_push/flow_bc"]).env
    result = evaluate(load_policy(run), env, episodes=episodes, seed=EVAL_SEED)
    value = result.success()
    assert value is not None, "arm_push has a success predicate"
    return value.value


def words_of(side: str, seed: int, size: dict) -> list[str]:
    """What differs from the recipe."""
    steps, every, further = size[side]
    loop = [f"loop.steps={steps}", f"loop.eval_every={every}", f"loop.log_every={every}"]
    return [
        f"recipe={SIDES[side]}",
        *loop,
        f"loop.eval_episodes={size['episodes']}",
        *further,
        f"seed={seed}",
    ]


def measure(root: Path, side: str, seed: int, size: dict) -> dict:
    """Train one side once: its curve, and success before and after."""
    folder = base_of(root, seed, size)
    words = [*words_of(side, seed, size), f"policy.base={folder / 'base'}"]
    if side == "resfit":
        words += [f"data.path={folder / 'demos.zarr'}"]
    with tempfile.TemporaryDirectory() as out:
        run = Path(train(compose([*words, *QUIET, f"out={out}/run"])))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        after = success(run, size["episodes"])
    points = {line["step"]: line["eval/success"] for line in lines if "eval/success" in line}
    before = success(folder / "base", size["episodes"])
    return {"steps": list(points), "success": list(points.values()), "before": before, "after": after}


def steps_to(row: dict, level: float) -> tuple[float, bool]:
    """Steps until two consecutive evaluations average `level`, and whether they ever do (else all steps)."""
    steps, curve = row["steps"], np.asarray(row["success"])
    above = np.flatnonzero((curve[1:] + curve[:-1]) / 2 >= level)
    return (float(steps[above[0] + 1]), True) if len(above) else (float(steps[-1]), False)


def run(bench: Bench) -> None:
    """Both sides of every seed, then the ratio and the gain."""
    root = find_checkout()
    size = bench.scale(**SIZES)
    seeds = range(bench.scale(smoke=1, small=3, paper=10))
    rows, ratios, gains, bounds = [], [], [], 0
    for seed in seeds:
        cells = {}
        for side in SIDES:

            def cell(side=side, seed=seed):
                return measure(root, side, seed, size)

            recipe = compose([f"recipe={SIDES[side]}"])
            params = {"words": words_of(side, 0, size), "clone": [size["demos"], size["clone"]]}
            params |= {"algo": vars(recipe.algo), "scale": recipe.policy.scale}  # pyright: ignore
            cells[side] = bench.cell(f"{side}/seed{seed}", cell, params=params, seed=seed)
        ours, theirs = cells["resfit"], cells["residual_ppo"]
        row = {"seed": seed, "base": ours["before"], "ResFiT": ours["after"], "residual PPO": theirs["after"]}
        if ours:
            gains.append(ours["after"] - ours["before"])
            level = ours["before"] + 0.5 * gains[-1]
            row |= {"level": level, "ResFiT steps": steps_to(ours, level)[0]}
            if theirs:
                (first, reached), (second, found) = steps_to(ours, level), steps_to(theirs, level)
                ratio = second / first if gains[-1] > 0 else 0.0
                row |= {"ResFiT reached it": "yes" if reached else "no", "residual PPO steps": second}
                row |= {"residual PPO reached it": "yes" if found else "no", "ratio": ratio}
                ratios.append(ratio)
                bounds += not found
        rows.append(row)
    episodes = size["episodes"]
    caption = f"Success over {episodes} episodes; environment steps to the base plus half of ResFiT's gain."
    bench.table("steps", rows, caption=caption)
    note = f"environment steps, residual PPO / ResFiT, to base + half of ResFiT's gain; median of {len(ratios)} seeds"
    bench.figure(
        "resfit_sample_ratio_vs_onpolicy",
        float(np.median(ratios)) if ratios else None,
        interval=(min(ratios), max(ratios)) if ratios else None,
        unit="x",
        target=10,
        note=note + (f", a lower bound in {bounds}: PPO never reached it" if bounds else ""),
    )
    budget = size["resfit"][0]
    bench.figure(
        "resfit_gain_arm_push",
        float(np.mean(gains)) if gains else None,
        interval=(min(gains), max(gains)) if gains else None,
        unit="fraction",
        target=0.2,
        note=f"after minus before, {budget} environment steps, {len(gains)} seeds x {episodes} episodes",
    )
