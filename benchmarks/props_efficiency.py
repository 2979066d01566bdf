# SPDX-License-Identifier: Apache-2.0
"""Data efficiency of PROPS against PPO: steps to 90 % of PPO's final return, area under the curve, cost per step.

Hopper-v5 and the pushing arm, one environment, 300k steps. Both sides share all settings of PPO's update (recipes
props/hopper and the same with algo=ppo); PROPS learns from two rollouts that a behaviour policy collects, PPO from one.
A curve is the mean return of 10 deterministic episodes every two rollouts, which start from the same seeds on both
sides. PPO's final return is the mean over seeds and over the last five points of its curves. The steps to 90 % of
it are read off the mean curve over seeds, smoothed over five points; a side that never gets there counts with all its
steps, which for PROPS is a lower bound above 1. The area is the mean of the curve. Intervals resample seeds, each side
on its own. `ppo_buffer`, PPO on two rollouts without a behaviour policy, tells what the buffer alone does (paper tier).

One cell per (task, algorithm, seed):

    robopost bench props_efficiency --tier small --cells 'Hopper-v5/props/*'
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

from robopost.bench import Bench
from robopost.compose import compose
from robopost.loops import train

SUITE = "onpolicy"
TASKS = {"Hopper-v5": "props/hopper", "arm_push": "props/arm_push"}
PPO_ONLY = ("rollout_steps", "epochs", "lr", "entropy_coef", "target_kl", "lr_decay_updates")
LAST = 5  # points of the curve that make its end


def words(task, algo, seed, steps, episodes):
    """What differs between the sides."""
    recipe = compose([f"recipe={TASKS[task]}"]).algo
    rollouts = steps // recipe.rollout_steps
    out = [f"recipe={TASKS[task]}", f"loop.steps={rollouts * recipe.rollout_steps}", f"seed={seed}"]
    if algo == "ppo":
        # The recipe's own settings are dropped with its algorithm: say them again.
        out += ["algo=ppo", *(f"algo.{name}={getattr(recipe, name)}" for name in PPO_ONLY)]
        out += [f"algo.batch_size={recipe.batch_size // recipe.buffer_batches}"]
    elif algo == "ppo_buffer":
        out += ["algo.behaviour_epochs=0"]
    if recipe.lr_decay_updates:
        out += [f"algo.lr_decay_updates={rollouts}"]
    every = max(1, min(2, rollouts // 3)) * recipe.rollout_steps
    out += [f"loop.eval_every={every}", f"loop.eval_episodes={episodes}", f"loop.log_every={every}"]
    return [*out, "device=cpu", "accel.threads=1", "track.tensorboard=false", "track.console=false"]


def measure(task, algo, seed, steps, episodes):
    """Train once; the curve and what it cost."""
    with tempfile.TemporaryDirectory() as folder:
        config = compose([*words(task, algo, seed, steps, episodes), f"out={folder}/run"])
        began = time.process_time()
        run = train(config)
        seconds = time.process_time() - began
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    points = {line["step"]: line["eval/return"] for line in lines if "eval/return" in line}
    evaluating = sum(line.get("time/eval", 0.0) for line in lines)
    total = {
        key: sum(line.get(f"time/{key}", 0.0) for line in lines) for key in ("collect", "behaviour", "update")
    }
    done = config.loop.steps
    return {
        "steps": list(points),
        "returns": list(points.values()),
        "cpu_ms_per_step": 1000 * (seconds - evaluating) / done,
        "behaviour_ms_per_step": 1000 * total["behaviour"] / done,
        "update_ms_per_step": 1000 * total["update"] / done,
    }


def smooth(curve):
    """Mean of up to `LAST` points up to each one."""
    return np.array([curve[max(0, i - LAST + 1) : i + 1].mean() for i in range(len(curve))])


def steps_to(steps, curves, goal):
    """First step at which the smoothed mean of `curves` (S, P) reaches `goal`; the last where none does."""
    above = np.flatnonzero(smooth(curves.mean(0)) >= goal)
    return float(steps[above[0]] if len(above) else steps[-1])


def figures(steps, ppo, other):
    """(steps to 90 % of PPO's end: other / PPO, area: other / PPO, final return: other / PPO) from curves (S, P)."""
    end = ppo[:, -LAST:].mean()
    ratio = steps_to(steps, other, 0.9 * end) / steps_to(steps, ppo, 0.9 * end)
    return np.array([ratio, other.mean() / ppo.mean(), other[:, -LAST:].mean() / end])


def resampled(steps, ppo, other, draws=2000):
    """(draws, 3) of `figures`, seeds of both sides drawn with replacement."""
    rng = np.random.default_rng(0)
    pick = lambda curves: curves[rng.integers(len(curves), size=len(curves))]  # noqa: E731
    return np.array([figures(steps, pick(ppo), pick(other)) for _ in range(draws)])


def run(bench: Bench) -> None:
    """All cells, then ratios; a task with a missing cell leaves them empty."""
    bench.packages("gymnasium", "mujoco")
    steps = bench.scale(smoke=8192, small=300_000, paper=1_000_000)
    seeds = bench.scale(smoke=1, small=6, paper=10)
    episodes = bench.scale(smoke=2, small=10, paper=20)
    algos = bench.scale(smoke=["ppo", "props"], small=["ppo", "props"], paper=["ppo", "ppo_buffer", "props"])
    rows, found, spread = [], [], []
    for task in TASKS:
        curves, when = {}, np.zeros(0)
        for algo in algos:
            cells = []
            for seed in range(seeds):

                def cell(task=task, algo=algo, seed=seed):
                    return measure(task, algo, seed, steps, episodes)

                params = {"words": words(task, algo, 0, steps, episodes)}
                cells.append(bench.cell(f"{task}/{algo}/seed{seed}", cell, params=params, seed=seed))
            whole = all(isinstance(cell["returns"], list) for cell in cells)
            when = np.asarray(cells[0]["steps"]) if whole else when
            curves[algo] = np.array([cell["returns"] for cell in cells]) if whole else None
            costs = ("cpu_ms_per_step", "behaviour_ms_per_step", "update_ms_per_step")
            rows.append({"task": task, "algorithm": algo, "seeds": seeds})
            rows[-1] |= {key: float(np.mean([cell[key] for cell in cells])) for key in costs}
        ppo = curves["ppo"]
        for row, algo in zip(rows[-len(algos) :], algos, strict=True):
            curve = curves[algo]
            known = ppo is not None and curve is not None
            row["steps to 90 % of PPO"] = (
                steps_to(when, curve, 0.9 * ppo[:, -LAST:].mean()) if known else np.nan
            )
            row["area"] = float(curve.mean()) if curve is not None else np.nan
            row["final return"] = float(curve[:, -LAST:].mean()) if curve is not None else np.nan
        if ppo is None or curves["props"] is None:
            found.append(np.full(3, np.nan))
            spread.append(np.full((1, 3), np.nan))
            continue
        found.append(figures(when, ppo, curves["props"]))
        spread.append(resampled(when, ppo, curves["props"]))
    value = np.mean(found, axis=0)
    short = min(map(len, spread))
    low, high = np.quantile(np.mean([part[:short] for part in spread], axis=0), [0.025, 0.975], axis=0)
    names = ("props_steps_to_90_vs_ppo", "props_area_vs_ppo", "props_return_vs_ppo")
    for index, name in enumerate(names):
        better, bar = ("lower", 0.9) if index == 0 else ("higher", None)
        note = f"PROPS / PPO, mean of {', '.join(TASKS)}, {seeds} seeds, {steps} steps"
        span = (float(low[index]), float(high[index]))
        bench.figure(name, float(value[index]), interval=span, unit="x", target=bar, better=better, note=note)
    bench.table(
        "efficiency", rows, caption="Learning curves and CPU time per environment step, means over seeds."
    )
