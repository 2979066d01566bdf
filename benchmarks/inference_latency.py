# SPDX-License-Identifier: Apache-2.0
"""Latency of one predicted chunk, p50 and p99: flow, diffusion and Gaussian policies, batch 1.

`Policy.act` from raw observation to executable chunk, sampled, at the observations, actions and chunks of the recipes
arm_push/flow_bc (25 numbers, 3 actions, chunks of 8, 4 executed) and pusht/flow (2 x 20 numbers, 2 actions, chunks of
16, 8 executed). Backbones: the recipes' MLP (3 residual blocks of 256), a U-Net of 64, 128 and 256 channels, a
transformer of 3 blocks of 128. Weights are random: they don't change the time.

On the CPU with one thread; the policies of a cell are asked in turn, so that load and clock drift hit all of them, and
the weights of one don't stay in the cache for its next call, as in a robot that does other work in between. On a GPU
also with the whole sampler captured as a CUDA graph, observation and chunk copied to and from the device each time.
"""

import time
from functools import partial

import numpy as np
import torch

from robopost import accel
from robopost.bench import Bench
from robopost.config import AccelConfig
from robopost.data.batch import Spec
from robopost.policies.base import build_policy
from robopost.policies.diffusion import DiffusionConfig
from robopost.policies.flow import FlowConfig
from robopost.policies.gaussian import GaussianConfig

SUITE = "generative"
TASKS = {
    "arm_push": (
        Spec({"state": ((25,), "float32")}, 3, (-1.0,) * 3, (1.0,) * 3, 70),
        {"horizon": 8, "execute": 4},
    ),
    "pusht": (
        Spec({"keypoint": ((20,), "float32")}, 2, (0.0,) * 2, (512.0,) * 2, 300),
        {"horizon": 16, "execute": 8, "history": 2},
    ),
}
BACKBONES = {"mlp": (256, 3), "unet": (64, 3), "transformer": (128, 3)}  # width, depth
SAMPLERS = {
    **{f"flow, rectified, K = {k}": partial(FlowConfig, steps=k) for k in (1, 2, 4, 10)},
    **{f"flow, shortcut, K = {k}": partial(FlowConfig, steps=k, variant="shortcut") for k in (1, 4)},
    **{f"diffusion, DDIM, K = {k}": partial(DiffusionConfig, steps=k) for k in (5, 10)},
    "diffusion, DDPM, K = 20": partial(DiffusionConfig, steps=20, sampler="ddpm"),
}
GAUSSIAN = "gaussian, 256-256"
WARMUP = 20


def policies(task, backbone, device="cpu"):
    """Name -> policy of one backbone, the Gaussian beside the MLPs."""
    spec, chunk = TASKS[task]
    width, depth = BACKBONES[backbone]
    torch.manual_seed(0)
    made = {
        name: build_policy(config(backbone=backbone, width=width, depth=depth, **chunk), spec)
        for name, config in SAMPLERS.items()
    }
    if backbone == "mlp":
        made[GAUSSIAN] = build_policy(GaussianConfig(**chunk), spec)
    return {name: policy.to(device).eval() for name, policy in made.items()}


def observation(task):
    """One raw observation as the environment gives it: numpy, without a device."""
    spec, chunk = TASKS[task]
    history = (chunk["history"],) if "history" in chunk else ()
    rng = np.random.default_rng(0)
    return {
        key: rng.standard_normal((1, *history, *shape), dtype=np.float32)
        for key, (shape, _) in spec.obs.items()
    }


def asker(policy, obs, device, mode="eager"):
    """A function that turns the numpy observation into a numpy chunk."""
    generator = torch.Generator(device=device).manual_seed(0)
    step = lambda tensors: {"chunk": policy.act(tensors, generator=generator).chunk}  # noqa: E731
    run = accel.accelerate(step, mode, device=torch.device(device), generators=(generator,))
    shape = (policy.horizon, policy.spec.action_dim)

    def ask():
        tensors = {key: torch.from_numpy(value).to(device) for key, value in obs.items()}
        return run(tensors)["chunk"].reshape(shape).cpu().numpy()

    return ask


def latencies(asked, calls):
    """Name -> seconds (2, calls) of every function of `asked`, called in turn: by the clock, and of this thread."""
    seconds = {name: np.empty((2, calls)) for name in asked}
    for _ in range(WARMUP):
        for ask in asked.values():
            ask()
    for call in range(calls):
        for name, ask in asked.items():
            start, began = time.perf_counter(), time.thread_time()
            ask()
            seconds[name][:, call] = time.perf_counter() - start, time.thread_time() - began
    return seconds


def measure(task, backbone, calls, device="cpu", mode="eager"):
    """A cell: per sampler p50 and p99 in milliseconds, and millions of parameters."""
    made, obs = policies(task, backbone, device), observation(task)
    taken = latencies({name: asker(policy, obs, device, mode) for name, policy in made.items()}, calls)
    return {
        name: {
            "p50_ms": 1e3 * float(np.quantile(clock, 0.5)),
            "p99_ms": 1e3 * float(np.quantile(clock, 0.99)),
            # Without the time other processes have taken: far above it the machine was busy.
            "thread_p50_ms": 1e3 * float(np.quantile(thread, 0.5)),
            "parameters_m": sum(p.numel() for p in made[name].parameters()) / 1e6,
        }
        for name, (clock, thread) in taken.items()
    }


def rows(cells):
    """Table rows from (backbone column name, cell) pairs; what a cell lacks stays empty."""
    out = []
    for name in (*SAMPLERS, GAUSSIAN):
        row = {"policy": name}
        for column, cell in cells:
            found = cell.get(name) or {}
            for key, unit in (("p50_ms", "p50"), ("p99_ms", "p99")):
                row[f"{column} {unit} (ms)"] = found.get(key)
        out.append(row)
    return out


def run(bench: Bench) -> None:
    """All samplers and backbones on one CPU thread, and on a GPU where there is one."""
    bench.packages("torch", "diffusers")
    calls = bench.scale(smoke=30, small=500, paper=5000)
    before = torch.get_num_threads()
    accel.configure(AccelConfig(threads=1))
    try:
        for task in TASKS:
            cells = []
            for backbone in BACKBONES:
                params = {"threads": 1, "calls": calls, "size": BACKBONES[backbone]}
                key = f"cpu/{task}/{backbone}"
                cells.append(
                    (backbone, bench.cell(key, partial(measure, task, backbone, calls), params=params))
                )
            caption = f"{task}: milliseconds per chunk, batch 1, one CPU thread, {calls} calls each."
            bench.table(task, rows(cells), caption=caption)
        if torch.cuda.is_available():
            run_gpu(bench, calls)
    finally:
        torch.set_num_threads(before)


def run_gpu(bench: Bench, calls: int) -> None:
    """Eager, and captured whole."""
    for task in TASKS:
        cells = []
        for backbone in BACKBONES:
            for mode in ("eager", "cudagraph"):
                params = {"calls": calls, "size": BACKBONES[backbone]}
                fn = partial(measure, task, backbone, calls, "cuda", mode)
                cells.append(
                    (f"{backbone} {mode}", bench.cell(f"gpu/{task}/{backbone}/{mode}", fn, params=params))
                )
        caption = f"{task}: milliseconds per chunk, batch 1, one GPU, transfers included, {calls} calls each."
        bench.table(f"{task}_gpu", rows(cells), caption=caption)
