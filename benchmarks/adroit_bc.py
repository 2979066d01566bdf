# SPDX-License-Identifier: Apache-2.0
"""Behaviour cloning on the 25 human demonstrations of Adroit door; success in AdroitHandDoor-v1.

A run is evaluated once, after its last update, over 100 episodes from seeds 10000, 10001, ... The humans took
269 steps on average while the task's own limit is 200, so policies that keep their pace are cut off: success
is reported for 200 steps and for 300. Replaying the recorded actions from the recorded initial states opens
the door in 32 % of the episodes.

The data is found through ROBOPOST_TEST_DATA (default: ../shared/data beside the checkout).
"""

import functools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from robopost.artefacts.checkpoint import load_policy
from robopost.bench import Bench
from robopost.compose import compose
from robopost.data.convert import import_source, open_source
from robopost.evaluate.rollout import evaluate
from robopost.evaluate.statistics import bootstrap_mean, wilson
from robopost.loops import train

DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FILE = DATA / "adroit" / "door_human_demos.npz"
EVAL_SEED = 10_000
CASES = {
    "deterministic": ["policy=deterministic", "policy.hidden=[256,256]"],
    "gaussian": ["policy=gaussian", "policy.hidden=[256,256]", "policy.squash=false"],
    "flow": [
        "policy=flow",
        "policy.width=256",
        "policy.depth=3",
        "policy.horizon=16",
        "policy.execute=8",
        "policy.history=2",
        "algo.padding=hold",  # actions are joint positions
    ],
}
HEADLINE = "flow"
LIMITS = (200, 300)


@functools.cache
def store():
    """The demonstrations as a robopost store in a folder that lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "door.zarr"
    import_source(open_source(FILE), path).close()
    return folder, path


def measure(case, seed, updates, episodes):
    """Train one policy through the public API and evaluate it at both time limits."""
    _, data = store()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["algo=bc", *CASES[case], f"data.path={data}", f"seed={seed}", "env=null", f"out={out}"]
        words += [f"loop.steps={updates}", f"algo.decay_steps={updates}", f"loop.log_every={updates}"]
        words += ["device=cpu", f"accel.threads={threads}", "track.tensorboard=false"]
        began = time.process_time()
        train(compose(words))
        cpu = time.process_time() - began
        policy = load_policy(out)
    row = {"train_cpu_seconds": cpu}
    for limit in LIMITS:
        env = compose(["algo=bc", "env=adroit_door", f"env.max_steps={limit}"]).env
        result = evaluate(policy, env, episodes=episodes, seed=EVAL_SEED, deterministic=case != "flow")
        row[f"success_{limit}"] = [bool(value) for value in result.successes]
        row[f"returns_{limit}"] = result.returns.tolist()
    return row


def run(bench: Bench) -> None:
    bench.packages("gymnasium-robotics")
    torch.set_num_threads(1)
    updates = bench.scale(smoke=100, small=10_000, paper=50_000)
    episodes = bench.scale(smoke=2, small=100, paper=100)
    rows = []
    for case in CASES:
        cells = [
            bench.cell(
                f"{case}/seed{seed}",
                lambda case=case, seed=seed: measure(case, seed, updates, episodes),
                params={"updates": updates, "episodes": episodes, "settings": CASES[case]},
                seed=seed,
            )
            for seed in bench.scale(smoke=range(1), small=range(3), paper=range(5))
        ]
        done = [cell for cell in cells if cell]
        if not done:
            continue
        row = {"policy": case}
        for limit in LIMITS:
            wins = [value for cell in done for value in cell[f"success_{limit}"]]
            success = wilson(sum(wins), len(wins))
            row |= {
                f"success, {limit} steps": success.value,
                f"95 % low, {limit}": success.low,
                f"95 % high, {limit}": success.high,
            }
            if case == HEADLINE and limit == 300:
                bench.figure(
                    "adroit_door_bc_success",
                    success.value,
                    interval=(success.low, success.high),
                    unit="fraction",
                    note=f"flow policy, 25 human demonstrations, {len(done)} seeds x {episodes} episodes, 300 steps",
                )
        returns = bootstrap_mean(np.concatenate([cell["returns_200"] for cell in done]))
        # D4RL's reference returns of door: random -56.51, expert 2880.57 (d4rl/infos.py, door-human).
        score = 100 * (returns.value + 56.512833) / (2880.5693 + 56.512833)
        row |= {"return, 200 steps": returns.value, "D4RL score": score, "seeds": len(done)}
        row["CPU min per seed"] = float(np.mean([cell["train_cpu_seconds"] for cell in done])) / 60
        rows.append(row)
    bench.table(
        "adroit_bc",
        rows,
        caption="BC on 25 human demonstrations. D4RL score: the environment is AdroitHandDoor-v1 of "
        "gymnasium-robotics, not D4RL's door-v0.",
    )
