# SPDX-License-Identifier: Apache-2.0
"""Mode coverage on a one-step task with six equally good goals: what each method keeps of them.

`env=multigoal`: goals on a circle of radius 1.5, reward exp(-d^2 / (2 0.3^2)) of the distance to the nearest. 150
rollouts of 2,048 actions from scratch, five epochs of minibatches of 512, networks of two layers (flows: residual
blocks) of 64, learning rates 1e-3. Then 4,096 samples of the exported policy: their mean reward, and the goals that
are the nearest one of more than 3 % of all samples, within 3 widths. The exported policies of PolicyFlow and ReinFlow
are flows without the noise they explored with.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from robopost_envs.multigoal import MultiGoalConfig, distances

from robopost.artefacts.checkpoint import load_policy
from robopost.bench import Bench
from robopost.compose import compose
from robopost.loops import train

SUITE = "generative"
SAMPLES = 4096
SHARE = 0.03  # of all samples that a goal must hold to count as kept
FLOW = [
    *("policy=flow", "policy.horizon=1", "policy.steps=10", "policy.width=64", "policy.depth=2"),
    *("policy.prediction=velocity", "policy.normalise_action=bounds"),
    *("algo.hidden=[64,64]", "algo.actor_lr=1e-3", "algo.critic_lr=1e-3"),
]
POLICYFLOW = [
    *("algo=policyflow", *FLOW, "policy.solver=midpoint"),
    *("algo.noise_init=1", "algo.entropy_coef=0.001"),
]
METHODS = {
    "ppo": [
        *("algo=ppo", "policy=gaussian", "policy.hidden=[64,64]", "policy.squash=false"),
        *("policy.state_std=false", "algo.hidden=[64,64]", "algo.lr=1e-3"),
    ],
    "policyflow_0": [*POLICYFLOW, "algo.brownian_coef=0"],
    "policyflow_05": [*POLICYFLOW, "algo.brownian_coef=0.05"],
    "policyflow_25": [*POLICYFLOW, "algo.brownian_coef=0.25"],
    "fpo_05": ["algo=fpo", *FLOW, "algo.normalise_loss=false", "algo.clip=0.05"],
    "fpo_20": ["algo=fpo", *FLOW, "algo.normalise_loss=false", "algo.clip=0.2"],
    "reinflow": [
        "algo=reinflow",
        *FLOW,
        "algo.clip=0.2",
        "algo.normalise_ratio=false",
        "algo.entropy_coef=0",
    ],
}
LABELS = {
    "ppo": "Gaussian PPO",
    "policyflow_0": "PolicyFlow, c_br 0",
    "policyflow_05": "PolicyFlow, c_br 0.05",
    "policyflow_25": "PolicyFlow, c_br 0.25",
    "fpo_05": "FPO, clip 0.05",
    "fpo_20": "FPO, clip 0.2",
    "reinflow": "ReinFlow",
}


def words(method, seed, rollouts):
    """The run of one cell."""
    out = [
        *METHODS[method],
        "env=multigoal",
        "env.num_envs=256",
        "algo.rollout_steps=8",
        "algo.batch_size=512",
    ]
    out += ["algo.epochs=5", f"loop.steps={2048 * rollouts}", f"loop.log_every={2048 * 10}", f"seed={seed}"]
    out += ["loop.eval_episodes=64", "device=cpu", "accel.threads=1", "track.tensorboard=false"]
    return [*out, "track.console=false"]


def coverage(policy, config, seed=0):
    """Mean reward of `SAMPLES` samples, and the share that ends near each goal."""
    generator = torch.Generator().manual_seed(seed)
    action = policy.act({"state": torch.zeros(SAMPLES, 1)}, generator=generator).chunk[:, 0]
    away = distances(config, action.numpy())
    near = np.eye(config.goals)[away.argmin(1)] * (away.min(1) < 3 * config.width)[:, None]
    return float(np.exp(-0.5 * (away.min(1) / config.width) ** 2).mean()), near.mean(0)


def measure(method, seed, rollouts):
    """Train from scratch and look at what is left."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(compose([*words(method, seed, rollouts), f"out={folder}/run"]))
        reward, share = coverage(load_policy(Path(run)), MultiGoalConfig())
    return {"reward": reward, "modes": int((share > SHARE).sum()), "shares": share.round(4).tolist()}


def run(bench: Bench) -> None:
    """One cell per method and seed."""
    bench.packages("gymnasium")
    rollouts = bench.scale(smoke=5, small=150, paper=150)
    seeds = bench.scale(smoke=1, small=3, paper=10)
    rows, found = [], {}
    for method, label in LABELS.items():
        cells = []
        for seed in range(seeds):

            def cell(method=method, seed=seed):
                return measure(method, seed, rollouts)

            params = {"words": words(method, 0, rollouts), "samples": SAMPLES, "share": SHARE}
            cells.append(bench.cell(f"{method}/seed{seed}", cell, params=params, seed=seed))
        found[method] = cells
        join = lambda key, cells=cells: " / ".join(f"{cell[key]:.3g}" for cell in cells)  # noqa: E731
        rows.append({"method": label, "mean reward": join("reward"), "goals kept": join("modes")})
    bench.table(
        "modes",
        rows,
        caption=f"Six goals: mean reward of the exported policy and goals that hold more than 3 % of its samples, "
        f"seeds 0 to {seeds - 1} ({rollouts} rollouts).",
    )
    ours = found["policyflow_05"]
    good = [float(cell["reward"] >= 0.85 and cell["modes"] >= 3) for cell in ours]
    share = float(np.mean(good)) if all(ours) else float("nan")
    bench.figure(
        "policyflow_multigoal_seeds",
        share,
        target=0.66,
        unit="fraction",
        note=f"of {seeds} seeds, c_br 0.05: mean reward of at least 0.85 and at least 3 of 6 goals",
    )
