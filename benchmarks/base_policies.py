# SPDX-License-Identifier: Apache-2.0
"""Flow and diffusion policies with MLP, U-Net and transformer backbones: what fine-tuning begins with.

Tasks: the pushing and the placing arm (100 scripted demonstrations of imperfect quality), Push-T from its 5-D state
(206 human demonstrations), Hopper-v5 (suite set hopper-medium). Averaged weights (EMA) are evaluated from fixed
states: in the policy's mode, where the chain starts at zero, and sampled. Success, in Hopper the return.

The policies with the MLP backbone are what `finetune` begins with. All runs stay in data/generative/; a second call
evaluates what it finds there.

    robopost bench base_policies --tier small --cells 'arm_push/*'
"""

import math

import numpy as np
import torch
from sides.bases import BACKBONES, CLASSES, DEMONSTRATIONS, TASKS, clone_words, score, train_base

from robopost.artefacts.checkpoint import load_policy
from robopost.bench import Bench
from robopost.evaluate.statistics import bootstrap_mean, wilson

SUITE = "generative"


def measure(task, kind, backbone, seed, updates, demonstrations, episodes):
    """Train a base policy, or find it, and evaluate it in both modes."""
    folder, seconds = train_base(task, kind, backbone, seed, updates=updates, episodes=demonstrations)
    policy = load_policy(folder)
    row = {
        "train_seconds": seconds["wall"],
        "train_cpu_seconds": seconds["cpu"],
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
    }
    for mode, sampled in (("mode", False), ("sampled", True)):
        result = score(task, policy, episodes, sampled=sampled)
        values = result.returns if TASKS[task].metric == "return" else result.successes
        assert values is not None, f"{task} has a success predicate"
        row |= {mode: float(values.mean()), f"{mode}_values": [float(value) for value in values]}
    return row


def interval(task, values):
    """Mean over episodes of all seeds with its 95 % interval, as text."""
    values = np.concatenate(values)
    if TASKS[task].metric == "return":
        return bootstrap_mean(values).text(digits=0)
    return wilson(int(values.sum()), len(values)).text(percent=True)


def run(bench: Bench) -> None:
    bench.packages("gymnasium", "mujoco", "gym-pusht", "diffusers")
    torch.set_num_threads(1)
    updates = bench.scale(smoke=50, small=0, paper=0)  # 0 = the recipe's
    demonstrations = bench.scale(smoke=10, small=DEMONSTRATIONS, paper=DEMONSTRATIONS)
    episodes = bench.scale(smoke=4, small=100, paper=200)
    tasks = bench.scale(smoke=("arm_push",), small=tuple(TASKS), paper=tuple(TASKS))
    # The backbone that fine-tuning uses gets all seeds.
    seeds = bench.scale(
        smoke=dict.fromkeys(BACKBONES, 1),
        small={"mlp": 3, "unet": 1, "transformer": 1},
        paper=dict.fromkeys(BACKBONES, 3),
    )
    rows = []
    for task in tasks:
        for kind in CLASSES:
            for backbone in BACKBONES:
                cells = []
                for seed in range(seeds[backbone]):

                    def work(task=task, kind=kind, backbone=backbone, seed=seed):
                        return measure(task, kind, backbone, seed, updates, demonstrations, episodes)

                    params = {"words": clone_words(task, kind, backbone, updates), "episodes": episodes}
                    params |= {"demonstrations": demonstrations, "quality": TASKS[task].quality}
                    cells.append(
                        bench.cell(f"{task}/{kind}/{backbone}/seed{seed}", work, params=params, seed=seed)
                    )
                done = [cell for cell in cells if cell]
                rows.append({"task": task, "policy": kind, "backbone": backbone} | summary(task, done))
    caption = (
        f"{episodes} episodes per seed: success, in Hopper the return, with 95 % intervals over episodes."
    )
    bench.table("bases", rows, caption=caption)


def summary(task, done):
    """Row of the table of one policy; empty where no cell of it is measured."""
    mean = lambda key: float(np.mean([cell[key] for cell in done])) if done else math.nan  # noqa: E731
    return {
        "parameters": mean("parameters"),
        "mode": interval(task, [cell["mode_values"] for cell in done]) if done else "",
        "sampled": interval(task, [cell["sampled_values"] for cell in done]) if done else "",
        "train s (CPU)": mean("train_cpu_seconds"),
        "seeds": len(done),
    }
