# SPDX-License-Identifier: Apache-2.0
"""Returns of 26 published MuJoCo actors and 4 Adroit policies, run as `policy=`, against the returns in their index.

Each actor acts deterministically in its own task, through the same `evaluate` as every robopost policy. A
return counts as reproduced when the difference of the means is within three standard errors of both samples
together, or within 2 %. The index was measured with the actors' original code on Gymnasium v5 (10 episodes)
and gymnasium-robotics v1 (20 episodes).

The data is found through ROBOPOST_TEST_DATA (default: ../shared/data beside the checkout).
"""

import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from robopost.bench import Bench
from robopost.compose import compose
from robopost.evaluate.rollout import evaluate
from robopost.policies.reference import load_reference
from robopost.vector import make_vec

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SUITES = ("policies_mujoco", "adroit")
SMOKE = ("hopper_trpo.npz", "swimmer_ppo.npz", "ant_trpo.npz", "door_dapg_policy.npz")
NOTES = {
    "ant_a2c.npz": "an actor that falls at once; the index's 36-step episodes come with real contact forces in the "
    "observation (-77 ± 56 over 33 steps), not with the zeros it names",
}


def measure(path, entry, episodes):
    """Mean and spread over `episodes` full episodes from seeds 0, 1, ..."""
    torch.set_num_threads(1)
    chosen = (
        ["env=robotics", f"env.id={entry['env']}"] if "Adroit" in entry["env"] else [f"env={entry['env']}"]
    )
    config = compose(["algo=bc", *chosen]).env
    config.max_steps = int(entry.get("horizon", 0))
    env = make_vec(config, min(episodes, 10))
    try:
        result = evaluate(load_reference(path, env.spec), env, episodes=episodes, seed=0)
    finally:
        env.close()
    theirs = entry["std_return"] / math.sqrt(entry["episodes"])
    error = math.hypot(result.returns.std(ddof=1) / math.sqrt(episodes), theirs)
    difference = abs(float(result.returns.mean()) - entry["mean_return"])
    return {
        "mean": float(result.returns.mean()),
        "std": float(result.returns.std()),
        "length": float(result.lengths.mean()),
        "success": None if result.successes is None else float(result.successes.mean()),
        "reproduced": bool(difference <= max(3 * error, 0.02 * abs(entry["mean_return"]))),
        "returns": result.returns.tolist(),
    }


def run(bench: Bench) -> None:
    bench.packages("gymnasium-robotics")
    episodes = bench.scale(smoke=2, small=10, paper=100)
    rows, reproduced = [], []
    for suite in SUITES:
        for entry in json.loads((DATA / suite / "index.json").read_text()):
            path = DATA / suite / entry["file"]
            if bench.tier == "smoke" and entry["file"] not in SMOKE:
                continue
            row = bench.cell(
                path.stem,
                lambda path=path, entry=entry: measure(path, entry, episodes),
                params={"episodes": episodes, "env": entry["env"]},
            )
            if not row:
                continue
            reproduced.append(row["reproduced"])
            rows.append(
                {
                    "actor": path.stem,
                    "task": entry["env"],
                    "index": f"{entry['mean_return']:.0f} ± {entry['std_return']:.0f}",
                    "ours": f"{row['mean']:.0f} ± {row['std']:.0f}",
                    "success": row["success"],
                    "reproduced": "yes" if row["reproduced"] else "no",
                    "note": NOTES.get(entry["file"], ""),
                }
            )
    bench.table(
        "reference_policies",
        rows,
        caption=f"Mean ± standard deviation over {episodes} episodes; the index has 10 (MuJoCo) or 20 (Adroit).",
    )
    bench.figure(
        "reference_policies_reproduced",
        float(np.mean(reproduced)) if reproduced else None,
        unit="fraction",
        note=f"{sum(reproduced)} of {len(reproduced)} published actors give the return of their index",
    )
