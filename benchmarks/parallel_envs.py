# SPDX-License-Identifier: Apache-2.0
"""PPO, SAC and TD3 with 1, 8 and 64 environments: training speed and return beside stable-baselines3.

HalfCheetah-v5, CPU, stable-baselines3's hyper-parameters on both sides (`sides/sb3.py`), TD3 with exploration noise of
0.1 on both. What an environment step costs in updates does not depend on the number of environments: PPO's rollouts
hold 2048 transitions in all (2048 / N steps of N environments), 10 epochs over minibatches of 64; SAC and TD3 do one
update of batch 256 per environment step (stable-baselines3: train_freq=1, gradient_steps=-1).

`speed/...`: environment steps per second of training as a whole: acting, stepping, storing, updates and each
library's own bookkeeping; without construction, the 100 random steps, evaluation and checkpoints. Each library trains
in a process of its own on one thread, in short turns A B A B, one always waiting; stable-baselines3 steps its
environments with DummyVecEnv, its default and on one CPU the faster choice. Rates are steps per second of CPU time,
which other load on the machine disturbs least; `wall ratio` is the same from the clock on the wall. The figures are the
smallest of the three medians. `speed/.../2 CPUs` pins both sides to two CPUs: our physics on two threads,
stable-baselines3 with SubprocVecEnv, one process per environment; CPU time of several processes says little, so its
rates are of wall time. These cells need a machine that does nothing else:
`robopost bench parallel_envs --tier small --cells 'speed/*'`.

`learn/...`: mean return of the last policy over deterministic episodes, after the same number of environment steps.
"""

import statistics

import numpy as np
from sides.sb3 import ROLLOUT, Turns, our_turns, ours, their_turns, theirs

from robopost.bench import Bench
from robopost.interleave import Ratio

SUITE = "onpolicy"
TASK = "HalfCheetah-v5"
ALGORITHMS = ("ppo", "sac", "td3")
COUNTS = (1, 8, 64)
TARGETS = {"ppo": 2.0, "sac": 1.5, "td3": None}


def speed(algo, num_envs, steps, rounds, cpus=0):
    """Interleaved turns of both trainings; ratios of CPU time, and of wall time."""
    sides = [Turns(target, algo, TASK, num_envs, cpus) for target in (our_turns, their_turns)]
    try:
        for side in sides:
            side(steps)  # construction, random steps, first allocations
        turns = [[side(steps) for side in sides] for _ in range(rounds)]
    finally:
        for side in sides:
            side.close()
    wall, cpu = (
        Ratio(*(tuple(steps / turn[side][kind] for turn in turns) for side in (0, 1))) for kind in (0, 1)
    )
    row = (wall if cpus else cpu).row()
    return row | {"wall_median": statistics.median(wall.ratios), "wall_rounds": list(wall.ratios)}


def run_speed(bench: Bench) -> None:
    """Every algorithm at every number of environments on one thread, and PPO on two CPUs."""
    rounds = bench.scale(smoke=2, small=9, paper=15)
    steps = {
        "ppo": bench.scale(smoke=1, small=2, paper=4) * ROLLOUT,
        "sac": bench.scale(smoke=128, small=512, paper=1024),
        "td3": bench.scale(smoke=128, small=512, paper=1024),
    }
    rows = []
    for algo in ALGORITHMS:
        ratios = {}
        cases = [(count, 0) for count in COUNTS] + ([(8, 2)] if algo == "ppo" else [])
        for count, cpus in cases:
            key = f"speed/{algo}/{count}" + (f"/{cpus} CPUs" if cpus else "")
            row = bench.cell(
                key,
                lambda a=(algo, count, steps[algo], rounds, cpus): speed(*a),
                params={"steps": steps[algo], "rounds": rounds, "task": TASK},
            )
            if not cpus:
                ratios[count] = row
            rows.append(
                {
                    "algorithm": algo,
                    "environments": count,
                    "CPUs": cpus or 1,
                    "robopost (1/s)": row["ours_per_s"],
                    "stable-baselines3 (1/s)": row["theirs_per_s"],
                    "ratio": row["median"],
                    "min": row["min"],
                    "max": row["max"],
                    "wall ratio": row["wall_median"],
                }
            )
        for count, row in ratios.items():
            span = (row["min"], row["max"])
            bench.figure(f"{algo}_steps_vs_sb3_{count}", row["median"], interval=span, unit="x")
        medians = [row["median"] for row in ratios.values()]
        # NaN, an empty figure, while one of the three is missing.
        worst = float("nan") if np.isnan(medians).any() else min(ratios, key=lambda n: ratios[n]["median"])
        row = ratios.get(worst, {"median": worst, "min": worst, "max": worst})
        note = f"CPU time, 1 thread, updates included, smallest of the medians at {COUNTS} environments"
        bench.figure(
            f"{algo}_steps_vs_sb3",
            row["median"],
            interval=(row["min"], row["max"]),
            unit="x",
            target=TARGETS[algo],
            note=note,
        )
    bench.table("speed", rows, caption="Environment steps per second of training, medians over rounds.")


def run_returns(bench: Bench) -> None:
    """Every algorithm at every number of environments after the same number of environment steps."""
    sac = bench.scale(smoke=256, small=10_000, paper=100_000)
    steps = {"ppo": bench.scale(smoke=ROLLOUT, small=100_000, paper=1_000_000), "sac": sac, "td3": sac}
    seeds = {
        "ppo": bench.scale(smoke=1, small=3, paper=5),
        "sac": bench.scale(smoke=1, small=2, paper=5),
        "td3": bench.scale(smoke=1, small=2, paper=5),
    }
    episodes = bench.scale(smoke=1, small=10, paper=20)
    rows = []
    for algo in ALGORITHMS:
        for count in COUNTS:
            row = {"algorithm": algo, "environments": count, "steps": steps[algo], "seeds": seeds[algo]}
            for side, name in ((ours, "robopost"), (theirs, "stable-baselines3")):
                values = []
                for seed in range(seeds[algo]):
                    cell = bench.cell(
                        f"learn/{algo}/{count}/{side.__name__}/seed{seed}",
                        lambda s=side, a=(algo, TASK, count, seed, steps[algo], episodes): s(*a),
                        params={"steps": steps[algo], "episodes": episodes, "task": TASK},
                        seed=seed,
                    )
                    values.append(cell["return_mean"])
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
                row |= {name: float(np.mean(values)), f"{name}, std of seeds": spread}
            rows.append(row)
    bench.table("returns", rows, caption="Mean return of the last policy, mean over seeds.")


def run(bench: Bench) -> None:
    """Speed, then returns."""
    bench.packages("stable-baselines3", "gymnasium", "mujoco")
    run_speed(bench)
    run_returns(bench)
