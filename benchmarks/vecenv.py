# SPDX-License-Identifier: Apache-2.0
"""Vectorised MuJoCo: env-steps/s with observations and rewards, against Gymnasium and against bare physics.

Each cell pins the process to `threads` CPUs and times robopost's vector environment in turns with one of:
Gymnasium's SyncVectorEnv or AsyncVectorEnv (SAME_STEP, same number of environments, same CPUs), or
`mujoco.rollout` called closed loop: one environment step per call, preallocated arrays, no observations,
rewards or resets. Actions are random and drawn beforehand. A ratio is the median over rounds; the interval is
min-max.
"""

import os
import time
from contextlib import contextmanager

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from mujoco import rollout
from robopost_envs.adapters.gymnasium import GymnasiumConfig, make

from robopost.bench import Bench
from robopost.interleave import interleave

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Ant-v5")
HEADLINE = ("HalfCheetah-v5", 64, 2)
ACTIONS = 64


@contextmanager
def pinned(threads):
    """Run on the first `threads` CPUs; threads and processes started inside inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:threads]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def raw_stepper(task, num_envs, threads):
    """`mujoco.rollout` fed with its own last state."""
    env = gym.make(task).unwrapped
    model, nstep = env.model, env.frame_skip
    spec = int(mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state = np.zeros((num_envs, mujoco.mj_stateSize(model, spec)))
    for i, row in enumerate(state):
        env.reset(seed=i)
        mujoco.mj_getState(model, env.data, row, spec)
    trace = np.zeros((num_envs, nstep, state.shape[1]))
    control = np.zeros((num_envs, nstep, model.nu))
    data = [mujoco.MjData(model) for _ in range(threads)]
    pool = rollout.Rollout(nthread=threads if threads > 1 else 0)
    models = [model] * num_envs

    def step(action):
        control[:] = action[:, None]
        pool.rollout(models, data, state, control, skip_checks=True, nstep=nstep, state=trace)
        state[:] = trace[:, -1]

    return step, pool.close


def measure(task, num_envs, threads, seconds, rounds, against):
    """Interleaved rates of ours and one other way of stepping."""
    with pinned(threads):
        ours = make(GymnasiumConfig(id=task, threads=threads), num_envs)
        ours.reset(seed=0)
        space = ours.single_action_space
        shape = (ACTIONS, num_envs, *space.shape)
        actions = np.random.default_rng(0).uniform(space.low, space.high, shape).astype(np.float32)
        if against == "raw":
            step, close = raw_stepper(task, num_envs, threads)
        else:
            kind = {"sync": SyncVectorEnv, "async": AsyncVectorEnv}[against]
            # The checker of gym.make is left out on this side: it would slow Gymnasium down.
            one = lambda: gym.make(task, disable_env_checker=True)  # noqa: E731
            other = kind([one] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
            other.reset(seed=0)
            step, close = other.step, other.close

        def run(step):
            def go():
                done, end = 0, time.perf_counter() + seconds
                while time.perf_counter() < end:
                    step(actions[done % ACTIONS])
                    done += 1
                return done * num_envs

            return go

        try:
            return interleave(run(ours.step), run(step), rounds=rounds).row()
        finally:
            ours.close()
            close()


def run(bench: Bench) -> None:
    """Measure every cell, then the two headline figures."""
    bench.packages("mujoco", "gymnasium")
    seconds = bench.scale(smoke=0.4, small=2.0, paper=5.0)
    rounds = bench.scale(smoke=3, small=7, paper=15)
    sizes = bench.scale(smoke=(64,), small=(16, 64), paper=(16, 64, 256))
    counts = [n for n in (1, 2) if n <= len(os.sched_getaffinity(0))]
    results, rows = {}, []
    for task in bench.scale(smoke=TASKS[:1], small=TASKS, paper=TASKS):
        for threads in counts:
            for num_envs in sizes:
                row = {"task": task, "threads": threads, "num_envs": num_envs}
                for against in ("sync", "async", "raw"):
                    key = f"{task}/threads{threads}/envs{num_envs}/{against}"
                    cell = bench.cell(
                        key,
                        lambda a=(task, num_envs, threads, seconds, rounds, against): measure(*a),
                        params={"seconds": seconds, "rounds": rounds},
                    )
                    results[task, num_envs, threads, against] = cell
                    row |= {"robopost": cell["ours_per_s"], against: cell["theirs_per_s"]}
                    row[f"vs_{against}"] = cell["median"]
                rows.append(row)
    bench.table("vecenv", rows, caption="Environment steps per second and ratios, medians over rounds.")
    best = min((results[(*HEADLINE, a)] for a in ("sync", "async")), key=lambda cell: cell["median"])
    raw = results[(*HEADLINE, "raw")]
    bench.figure(
        "vecenv_halfcheetah_vs_gymnasium",
        best["median"],
        interval=(best["min"], best["max"]),
        unit="x",
        target=1.8,
        note="64 environments, 2 threads, against the better of SyncVectorEnv and AsyncVectorEnv",
    )
    bench.figure(
        "vecenv_halfcheetah_vs_raw",
        raw["median"],
        interval=(raw["min"], raw["max"]),
        unit="x",
        target=0.8,
        note="64 environments, 2 threads, against mujoco.rollout called once per environment step",
    )
