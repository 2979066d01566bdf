# SPDX-License-Identifier: Apache-2.0
"""Flow and diffusion policies cloned from the 206 human Push-T demonstrations, evaluated in gym-pusht.

Policies see the 5-D state or the 20-D keypoints (history 2), predict 16 actions and execute 8. A run is
evaluated once, after its last update, over 100 fixed initial states: seeds 100000..100099, drawn and placed
as the published evaluation of Diffusion Policy does, 300 steps at 10 Hz. The score of an episode is its best
reward, coverage of the target over 0.95, clipped at 1; success is coverage above 0.95. Intervals: bootstrap
over all episodes of all seeds.

The `paper` column holds Diffusion Policy's own state numbers, which had another budget: convolutional or
transformer networks of 10 to 70 million parameters, thousands of epochs on a GPU, DDPM with 100 steps, 3 seeds
x 50 initial states; first number the best checkpoint, second the mean of the last ten. Ours: 0.45 million
parameters, minutes on a CPU, last checkpoint only, 10 sampling steps.

Two processes fill the table twice as fast: `--cells 'flow/*'` and `--cells 'diffusion/*'`.

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
FILE = DATA / "pusht_human" / "pusht_cchi_v7_replay.zarr.zip"
EVAL_SEED = 100_000
CASES = (("flow", "state"), ("flow", "keypoint"), ("diffusion", "state"), ("diffusion", "keypoint"))
HEADLINE = ("flow", "state")
# Chi et al. 2023, arXiv 2303.04137v5, table 1 (state policies), column Push-T: best / mean of last 10 checkpoints.
PAPER = {
    "flow": {},
    "diffusion": {"DiffusionPolicy-C": (0.95, 0.91), "DiffusionPolicy-T": (0.95, 0.79)},
    "others": {"LSTM-GMM": (0.67, 0.61), "IBC": (0.90, 0.84), "BET": (0.79, 0.70)},
}
SETTINGS = [
    "algo=bc",
    "policy.horizon=16",
    "policy.execute=8",
    "policy.history=2",
    "policy.width=256",
    "policy.depth=3",
    "policy.steps=10",
    "policy.normalise_obs=minmax",
    "policy.normalise_action=minmax",
    "algo.batch_size=256",
    "algo.lr=1e-3",
    "algo.padding=hold",  # actions are positions: after the end of a demonstration the hand stays
]


@functools.cache
def store():
    """The demonstrations as a robopost store in a folder that lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "pusht.zarr"
    import_source(open_source(FILE), path).close()
    return folder, path


def measure(kind, key, seed, updates, episodes):
    """Train one policy through the public API and evaluate it."""
    _, data = store()
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [*SETTINGS, f"policy={kind}", f"policy.obs_keys=[{key}]", f"data.path={data}", f"seed={seed}"]
        words += [f"loop.steps={updates}", f"algo.decay_steps={updates}", f"loop.log_every={updates}"]
        words += [
            f"out={out}",
            "env=null",
            "device=cpu",
            f"accel.threads={threads}",
            "track.tensorboard=false",
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        train(compose(words))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        policy = load_policy(out)
    env = compose(["algo=bc", "env=pusht", "env.initial=diffusion_policy", "env.max_steps=300"]).env
    result = evaluate(policy, env, episodes=episodes, seed=EVAL_SEED, deterministic=False)
    return {
        "max_coverage": float(result.max_rewards.mean()),
        "success": float(result.successes.mean()),
        "train_seconds": wall,
        "train_cpu_seconds": cpu,
        "eval_seconds": result.seconds,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "max_rewards": result.max_rewards.tolist(),
        "successes": [bool(value) for value in result.successes],
    }


def run(bench: Bench) -> None:
    bench.packages("gym-pusht", "pymunk", "diffusers")
    torch.set_num_threads(
        1
    )  # networks this small gain little from a second one: fill the table from two processes
    updates = bench.scale(smoke=200, small=12_000, paper=100_000)
    episodes = bench.scale(smoke=4, small=100, paper=100)
    seeds = bench.scale(smoke=range(1), small=range(3), paper=range(3))
    rows = []
    # Seeds outermost: an interrupted table has every case before it has more seeds.
    cells = {
        (kind, key, seed): bench.cell(
            f"{kind}/{key}/seed{seed}",
            lambda kind=kind, key=key, seed=seed: measure(kind, key, seed, updates, episodes),
            params={"updates": updates, "episodes": episodes, "settings": SETTINGS},
            seed=seed,
        )
        for seed in seeds
        for kind, key in CASES
    }
    for kind, key in CASES:
        done = [cell for (k, o, _), cell in cells.items() if (k, o) == (kind, key) and cell]
        if not done:
            continue
        scores = bootstrap_mean(np.concatenate([cell["max_rewards"] for cell in done]))
        wins = [value for cell in done for value in cell["successes"]]
        success = wilson(sum(wins), len(wins))
        row = {
            "policy": f"{kind}, {key}",
            "max coverage": scores.value,
            "95 % low": scores.low,
            "95 % high": scores.high,
            "success": success.value,
            "seeds": len(done),
            "updates": updates,
            "CPU min per seed": float(np.mean([cell["train_cpu_seconds"] for cell in done])) / 60,
        }
        papers = PAPER[kind] if key == "keypoint" else {}
        row["paper"] = "; ".join(f"{name} {best:.2f} / {last:.2f}" for name, (best, last) in papers.items())
        rows.append(row)
        if (kind, key) == HEADLINE:
            bench.figure(
                "pusht_bc_max_coverage",
                scores.value,
                interval=(scores.low, scores.high),
                unit="fraction",
                target=0.6,
                note=f"flow policy on the 5-D state, {len(done)} seeds x {episodes} episodes, {updates} updates",
            )
    rows += [
        {"policy": name, "paper": f"{name} {best:.2f} / {last:.2f}"}
        for name, (best, last) in PAPER["others"].items()
    ]
    bench.table(
        "pusht_bc",
        rows,
        caption="Paper: arXiv 2303.04137v5, table 1, keypoint observations, best / mean of last 10 checkpoints, "
        "with thousands of GPU epochs and up to 70 million parameters; ours as stated.",
    )
