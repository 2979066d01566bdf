# SPDX-License-Identifier: Apache-2.0
"""The arm family: success of the scripted expert by quality, and environment steps per second.

Experts: 200 episodes each, recorded by the collector with dense reward and `delta_ee` control. Speeds: random actions
in one process; every cell runs on as many CPUs as it has threads.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from robopost.bench import Bench
from robopost.collect import collect
from robopost.compose import compose
from robopost.vector import make_vec

TASKS = ("arm_reach", "arm_push", "arm_pick_place", "arm_language")
QUALITIES = (1.0, 0.7, 0.5, 0.3)


def expert(task, quality, episodes):
    """Any-step success of the script."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"env={task}",
            f"quality={quality}",
            f"episodes={episodes}",
            f"out={Path(folder) / 'x.zarr'}",
        ]
        return {"success": float(np.mean(collect(compose([*words, "num_envs=50"], "collect")).successes))}


def speed(task, num_envs, threads, obs, seconds):
    """Environment steps per second."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:threads]))
    config = compose([f"env={task}", f"env.obs={obs}", f"env.threads={threads}", "out=unused"], "collect").env
    env = make_vec(config, num_envs)
    try:
        env.reset(0)
        actions = (
            np.random.default_rng(0).uniform(-1, 1, (32, num_envs, env.spec.action_dim)).astype(np.float32)
        )
        for action in actions[:4]:
            env.step(action)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            env.step(actions[done % len(actions)])
            done += 1
        return {"steps_per_s": done * num_envs / (time.perf_counter() - began)}
    finally:
        env.close()
        os.sched_setaffinity(0, before)


def run(bench: Bench) -> None:
    episodes = bench.scale(smoke=20, small=200, paper=1000)
    seconds = bench.scale(smoke=0.5, small=4.0, paper=10.0)
    rows = []
    for quality in QUALITIES:
        row = {"quality": quality}
        for task in TASKS:
            measure = lambda task=task, quality=quality: expert(task, quality, episodes)  # noqa: E731
            cell = bench.cell(f"expert/{task}/{quality}", measure, params={"episodes": episodes}, seed=0)
            row[task] = cell["success"]
        rows.append(row)
    bench.table("experts", rows, caption=f"Success of the scripted expert, {episodes} episodes.")
    rows = []
    for task in TASKS:
        row = {"task": task}
        for label, num_envs, threads, obs in (
            ("64 envs, 1 thread", 64, 1, "state"),
            ("64 envs, 2 threads", 64, 2, "state"),
            ("1 env", 1, 1, "state"),
            ("16 envs, 96 px", 16, 1, "pixels96"),
        ):
            measure = lambda t=task, n=num_envs, k=threads, o=obs: speed(t, n, k, o, seconds)  # noqa: E731
            cell = bench.cell(f"speed/{task}/{label}", measure, params={"seconds": seconds})
            row[label] = cell["steps_per_s"]
        rows.append(row)
    bench.table(
        "speed", rows, caption="Environment steps per second, state observations unless said otherwise."
    )
