# SPDX-License-Identifier: Apache-2.0
"""Measure the reference returns of suite mujoco_v5: `python scripts/suite_references.py`.

Per task 100 episodes of uniform actions and 100 of the best published actor (arm_push: of the scripted expert),
deterministic, from seeds 0, 1, ... The means go to `robopost/evaluate/references/mujoco_v5.json`, from where
normalised scores are computed. Raise VERSION when an expert changes. The actors are found through
ROBOPOST_TEST_DATA.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np

from robopost.collect import make_actor, open_actor, wave
from robopost.compose import compose
from robopost.evaluate.scores import FOLDER
from robopost.suite import actor_folder

VERSION = 1
EXPERTS = {
    "hopper": "hopper_trpo",
    "halfcheetah": "halfcheetah_tqc",
    "walker2d": "walker2d_tqc",
    "arm_push": "script",
}


def measure(env: str, policy: str, episodes: int) -> dict:
    """Mean, spread and success of one policy."""
    path = str(actor_folder() / f"{policy}.npz") if policy not in ("random", "script") else policy
    words = [f"env={env}", f"policy={path}", "deterministic=true", "quality=1.0", "out=-"]
    config = compose(words, "collect")
    at_once = 25
    learnt, vec = open_actor(config, None, at_once)
    actor = make_actor(learnt, config, vec)
    recorded = [episode for seed in range(0, episodes, at_once) for episode in wave(vec, actor, seed)][
        :episodes
    ]
    vec.close()
    returns = np.array([float(episode.reward.sum(dtype=np.float64)) for episode in recorded])
    row = {
        "policy": policy,
        "mean": round(float(returns.mean()), 3),
        "std": round(float(returns.std()), 3),
        "length": round(float(np.mean([len(episode) for episode in recorded])), 1),
        "episodes": episodes,
    }
    if recorded[0].success is not None:
        row["success"] = float(np.mean([episode.success for episode in recorded]))
    return row


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, default=FOLDER / "mujoco_v5.json")
    args = parser.parse_args()
    tasks = {}
    for env, expert in EXPERTS.items():
        config = compose([f"env={env}", "out=-"], "collect").env
        tasks[env] = {"env": getattr(config, "id", "") or config.name}
        tasks[env] |= {
            "random": measure(env, "random", args.episodes),
            "expert": measure(env, expert, args.episodes),
        }
    data = {
        "suite": "mujoco_v5",
        "version": VERSION,
        "source": "scripts/suite_references.py",
        "packages": {name: version(name) for name in ("mujoco", "gymnasium")},
        "tasks": tasks,
    }
    args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
