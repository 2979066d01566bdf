# SPDX-License-Identifier: Apache-2.0
"""Combination lock: environment steps to half of the optimal reward, HNPG against TRPO, RLPD and with useless data.

H = 5 and 10 (20 joins in the paper tier), and H = 2, which on-policy data alone can solve: there useless data
may not hurt, on longer locks it can't help. Every seed is a lock of its own (combination, network, noise) with
5,000 recorded episodes of the optimal policy with epsilon = 1/H; "useless" replaces them by uniformly random
actions. 1,000 environment steps per iteration. A lock counts as solved at the first step at which the mean
share of episodes with the optimal reward, over the last 20 iterations (of 1,000 steps), exceeds one half; a
seed that never gets there counts with ten times its steps in the figures and is left out of the table's means.
Recorded steps are not counted. `hnpg` and `trpo`: networks and settings of the released code, see
docs/algorithms/hnpg.md; TRPO has no recorded data. `rlpd`: configs/algo/rlpd.yaml with networks 64-64 and one
update per environment step instead of 256-256 and 20, which would take days per seed here; half the steps,
three seeds in the small tier.

One cell per horizon, algorithm and seed, so that several processes can fill the table:

    robopost bench hnpg_lock --tier small --cells 'h5/hnpg/*'
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from robopost_envs.lock import LockConfig

from robopost.bench import Bench
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.loops import train
from robopost.track.jsonl import read_metrics

SUITE = "onpolicy"
EPISODES = 5000
WINDOW = 20  # iterations of 1,000 steps
RLPD = [
    "algo=rlpd",
    "policy.hidden=[64,64]",
    "algo.hidden=[64,64]",
    "algo.updates_per_step=1",
    "algo.policy_delay=1",
    "algo.warmup_steps=1000",
]
SETTINGS = {
    "hnpg": ["algo=hnpg"],
    "trpo": ["algo=trpo"],
    "rlpd": RLPD,
    "hnpg_useless": ["algo=hnpg"],
    "rlpd_useless": RLPD,
}
LABELS = {
    "hnpg": "HNPG",
    "trpo": "TRPO, no recorded data",
    "rlpd": "RLPD",
    "hnpg_useless": "HNPG, useless data",
    "rlpd_useless": "RLPD, useless data",
}


def learn(horizon: int, algo: str, seed: int, steps: int, episodes: int) -> dict:
    """Record data, train, and read the share of optimal episodes per 1,000 steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = list(SETTINGS[algo])
        if algo != "trpo":
            data = Path(folder) / "data.zarr"
            collect(
                CollectConfig(
                    env=LockConfig(horizon=horizon, combination=seed),
                    episodes=episodes,
                    quality=0.0 if "useless" in algo else 1 - 1 / horizon,
                    num_envs=min(250, episodes),
                    out=str(data),
                    seed=1_000_000 * (1 + seed),
                )
            )
            words.append(f"data.path={data}")
        copies = 10 if "rlpd" in algo else 1000 // horizon
        words += ["env=lock", f"env.horizon={horizon}", f"env.combination={seed}", f"env.num_envs={copies}"]
        words += [f"loop.steps={steps}", "loop.log_every=1000", "loop.eval_episodes=500", f"seed={seed}"]
        words += ["loop.eval_deterministic=false", "device=cpu", "accel.threads=1", "track.tensorboard=false"]
        config = compose([*words, "track.console=false", f"out={folder}/run"])
        began = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - began
        lines = [line for line in read_metrics(Path(config.out)) if "train/success" in line]
        final = [line["eval/success"] for line in read_metrics(Path(config.out)) if "eval/success" in line][
            -1
        ]
    curve = np.array([line["train/success"] for line in lines])
    at = [int(line["step"]) for line in lines]
    means = np.convolve(curve, np.full(WINDOW, 1 / WINDOW), "valid")
    solved = np.flatnonzero(means > 0.5)
    return {
        "steps": at[int(solved[0]) + WINDOW - 1] if len(solved) else steps,
        "solved": float(len(solved) > 0),
        "success": float(curve[-WINDOW:].mean()),
        "eval_success": float(final),
        "curve": [round(float(value), 4) for value in curve[:: max(1, len(curve) // 60)]],
        "train_seconds": seconds,
    }


def run(bench: Bench) -> None:
    """All cells, then figures."""
    budget = {
        2: bench.scale(smoke=3000, small=100_000, paper=100_000),
        5: bench.scale(smoke=3000, small=200_000, paper=400_000),
        10: bench.scale(smoke=3000, small=400_000, paper=1_000_000),
        20: bench.scale(smoke=0, small=0, paper=3_000_000),
    }
    seeds = bench.scale(smoke=1, small=5, paper=5)
    rlpd_seeds = bench.scale(
        smoke=1, small=3, paper=5
    )  # its ten critics take twenty times as long as all of HNPG
    episodes = bench.scale(smoke=200, small=EPISODES, paper=50_000)
    rows, cells = [], {}
    for horizon, most in budget.items():
        for algo in SETTINGS if most else ():
            slow, small = algo.startswith("rlpd"), bench.tier == "small"
            if (small and (horizon, algo) == (10, "rlpd_useless")) or (slow and horizon == 2):
                continue
            steps = most // 2 if slow and small else most
            group = []
            for seed in range(rlpd_seeds if slow else seeds):

                def measure(horizon=horizon, algo=algo, seed=seed, steps=steps):
                    return learn(horizon, algo, seed, steps, episodes)

                params = {"steps": steps, "episodes": episodes}
                group.append(bench.cell(f"h{horizon}/{algo}/seed{seed}", measure, params=params, seed=seed))
            cells[horizon, algo] = group
            pick = lambda key, group=group: np.array([cell[key] for cell in group], float)  # noqa: E731
            reached = pick("steps")[pick("solved") != 0]  # NaN of cells that are not there stays
            rows.append(
                {
                    "H": horizon,
                    "algorithm": LABELS[algo],
                    "solved": float(pick("solved").sum()),
                    "of": len(group),
                    "steps to 50 %": float(reached.mean()) if len(reached) else float("nan"),
                    "least": float(reached.min()) if len(reached) else float("nan"),
                    "most": float(reached.max()) if len(reached) else float("nan"),
                    "budget": steps,
                    "final share of optimal episodes": float(pick("success").mean()),
                    "training (s)": float(pick("train_seconds").mean()),
                }
            )
    for horizon, target in ((5, 150_000), (10, 300_000)):
        group = cells[horizon, "hnpg"]
        solved = np.array([cell["solved"] for cell in group])
        steps = np.array([cell["steps"] for cell in group]) * np.where(solved == 0, 10, 1)
        note = f"mean and range over {len(group)} seeds, mean over {WINDOW} iterations above one half"
        bench.figure(
            f"hnpg_lock_h{horizon}_steps",
            float(steps.mean()),
            interval=(float(steps.min()), float(steps.max())),
            unit="steps",
            target=target,
            better="lower",
            note=note if not solved.sum() < len(group) else f"{note}; {solved.sum():.0f} solved",
        )
    alone = np.array([cell["success"] for cell in cells[5, "trpo"]])
    bench.figure(
        "hnpg_no_offline_lock_h5_success",
        float(alone.mean()),
        interval=(float(alone.min()), float(alone.max())),
        unit="fraction",
        target=0.05,
        better="lower",
        note=f"share of optimal episodes after {budget[5]} steps without recorded data, {len(alone)} seeds",
    )
    bench.table("lock", rows, caption="Environment steps to half of the optimal reward.")
