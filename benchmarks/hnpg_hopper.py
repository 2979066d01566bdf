# SPDX-License-Identifier: Apache-2.0
"""Hopper-v5 with 50,000 recorded transitions: HNPG against NPG without them and IQL with them.

The transitions are the first episodes of the suite's set hopper-medium (docs/suite.md). HNPG and NPG share
networks, settings (recipe hnpg/hopper) and the statistics that observations are standardised with; NPG takes
nothing else from the data, and the full step without line search (TRPO's accepted every full step in a trial,
so that its run is NPG's). IQL: networks and settings of its paper, 50,000 updates on the transitions, then as
many environment steps as the others, one update each, half of every batch recorded. The result is the return
of the last policy, deterministic, over 30 episodes, and the mean return of training episodes along the way.

    robopost collect suite=mujoco_v5/hopper-medium
    robopost bench hnpg_hopper --tier small --cells 'hnpg/*'
"""

import json
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from sides.settings import IQL_POLICY, reward_scale

from robopost.algos.online.trpo import NPGConfig
from robopost.bench import Bench, find_checkout
from robopost.compose import compose
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.track.jsonl import read_metrics

SUITE = "onpolicy"
DATA = find_checkout() / "data" / "mujoco_v5" / "hopper-medium.zarr"
TRANSITIONS = 50_000
SETTINGS = {name: ["recipe=hnpg/hopper"] for name in ("hnpg", "npg")}
SETTINGS |= {"iql": ["algo=iql", *IQL_POLICY, "env=hopper"]}


def first_episodes(path: Path, transitions: int) -> tuple[int, float]:
    """How many of the first episodes hold `transitions`, and IQL's scale of rewards for them."""
    if not path.exists():
        raise ConfigError(f"{path} is absent. Fix: robopost collect suite=mujoco_v5/hopper-medium")
    with EpisodeStore.open(path) as store:
        lengths = np.cumsum([info["length"] for info in store.episode_info])
        count = int(np.searchsorted(lengths, transitions)) + 1
        returns = [float(store.episode(i).reward.sum()) for i in range(count)]
    return count, reward_scale(returns)


def learn(algo: str, seed: int, steps: int, updates: int, episodes: int) -> dict:
    """Train and score the last policy."""
    count, scale = first_episodes(DATA, TRANSITIONS)
    with tempfile.TemporaryDirectory() as folder:
        words = [*SETTINGS[algo], f"data.path={DATA}", f"data.episodes={count}", f"seed={seed}"]
        offline = algo == "iql"
        words += [
            f"loop.steps={updates if offline else steps}",
            "loop.checkpoint_every=0",
            "loop.eval_every=0",
        ]
        words += [
            f"loop.log_every={max(1, steps // 20)}",
            f"loop.eval_episodes={episodes}",
            f"out={folder}/run",
        ]
        if offline:
            words += [f"loop.online_steps={steps}", f"data.reward_scale={scale:.6g}"]
        words += ["device=cpu", "accel.threads=1", "track.tensorboard=false", "track.console=false"]
        config = compose(words)
        if algo == "npg":  # HNPG's settings but for those that make the algorithm
            same = {f.name for f in fields(NPGConfig)} - {"name", "hybrid", "check_kl", "backtracks"}
            config = replace(config, algo=NPGConfig(**{name: getattr(config.algo, name) for name in same}))
        began = time.perf_counter()
        train(config)
        seconds = time.perf_counter() - began
        lines = [line for line in read_metrics(Path(config.out)) if "train/return" in line]
        results = sorted((Path(config.out) / "eval").glob("step_*.json"))
        last = json.loads(results[-1].read_text())
        before = json.loads(results[0].read_text())["return"]["value"] if offline else float("nan")
    return {
        "return": last["return"]["value"],
        "score": last["normalised_score"]["value"],
        "return_offline": before,
        "train_return": float(np.mean([line["train/return"] for line in lines[-5:]])),
        "train_return_all": float(np.mean([line["train/return"] for line in lines])),
        "curve": [[int(line["step"]), round(line["train/return"], 1)] for line in lines],
        "transitions": TRANSITIONS,
        "train_seconds": seconds,
    }


def run(bench: Bench) -> None:
    """One cell per algorithm and seed, and the table."""
    bench.packages("gymnasium", "mujoco")
    steps = bench.scale(smoke=4096, small=300_000, paper=1_000_000)
    updates = bench.scale(smoke=200, small=50_000, paper=500_000)
    episodes = bench.scale(smoke=2, small=30, paper=30)
    seeds = bench.scale(smoke=1, small=3, paper=5)
    rows, means = [], {}
    for algo in SETTINGS:
        cells = []
        for seed in range(seeds):

            def measure(algo=algo, seed=seed):
                return learn(algo, seed, steps, updates, episodes)

            params = {"steps": steps, "updates": updates, "episodes": episodes}
            cells.append(bench.cell(f"{algo}/seed{seed}", measure, params=params, seed=seed))
        values = np.array([cell["return"] for cell in cells])
        means[algo] = values
        offline = np.array([cell["return_offline"] for cell in cells], float)
        rows.append(
            {
                "algorithm": algo,
                "environment steps": steps,
                "mean return": float(values.mean()),
                "std of seeds": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
                "normalised score": float(np.mean([cell["score"] for cell in cells])),
                "return before going online": float(offline.mean()),
                "training return, whole run": float(np.mean([cell["train_return_all"] for cell in cells])),
                "training return, end": float(np.mean([cell["train_return"] for cell in cells])),
                "training (s)": float(np.mean([cell["train_seconds"] for cell in cells])),
            }
        )
    for other in ("npg", "iql"):
        ratio = float(means["hnpg"].mean() / means[other].mean())
        note = f"ratio of mean returns over {seeds} seeds"
        bench.figure(f"hnpg_hopper_return_vs_{other}", ratio, unit="x", note=note)
    bench.table("hopper", rows, caption="Hopper-v5 with 50,000 recorded transitions.")
