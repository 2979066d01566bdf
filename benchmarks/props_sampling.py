# SPDX-License-Identifier: Apache-2.0
"""Sampling error of a fixed policy's data: PROPS and ROS against on-policy sampling.

The target policy never changes: what differs is who collects. Sampling error is mean[log pi_MLE - log pi] over all
samples so far (robopost/evaluate/sampling_error.py): counts in the two toy tasks, least squares for the Gaussian.

Bandit: ten arms, random softmax policy, 512 samples, ten seeds; on-policy sampling expects (A - 1) / 2n. Tabular: nine
states in random order, four actions, 1024 samples, ten seeds. Both with the published toy settings (m 8, learning rate
.05, eps .3, delta .05, 16 epochs, 4 minibatches); ROS takes one plain gradient step of 10 every 8 samples.

Hopper-v5 and HalfCheetah-v5: a policy that our PPO has trained (cells `target/*`, which have to come first; kept in
data/props_sampling), 32,768 steps, five seeds, with the method's tuned settings. The least-squares error is exact; the
published numbers come from 250 epochs of Adam, so only ratios compare.

One cell per (task, method, seed):

    robopost bench props_sampling --tier small --cells 'target/*'
    robopost bench props_sampling --tier small --cells 'fixed/Hopper-v5/*'
"""

import tempfile
from pathlib import Path

import numpy as np
import torch

from robopost.algos.online.props import PROPS, PROPSConfig
from robopost.artefacts.checkpoint import load_policy
from robopost.bench import Bench, find_checkout
from robopost.compose import compose
from robopost.data.batch import Batch, Spec, stack
from robopost.evaluate.rollout import evaluate
from robopost.evaluate.sampling_error import sampling_error
from robopost.loops import train
from robopost.policies.categorical import Categorical, CategoricalConfig
from robopost.vector import make_vec, to_torch

SUITE = "onpolicy"
FOLDER = find_checkout() / "data" / "props_sampling"
TOY = {"behaviour_steps": 8, "behaviour_lr": 0.05, "behaviour_minibatches": 4}
METHODS = {
    "on-policy": {"behaviour_epochs": 0},
    "props": {},
    "ros": {"sampling": "ros", "behaviour_lr": 10.0},
}
TASKS = {  # m, behaviour learning rate, delta, lambda: the method's tuned settings
    "Hopper-v5": {"behaviour_steps": 256, "behaviour_lr": 1e-3},
    "HalfCheetah-v5": {"behaviour_steps": 512, "behaviour_lr": 1e-3},
}
TARGET = [
    "algo=ppo",
    "policy.hidden=[64,64]",
    "policy.activation=tanh",
    "policy.init=orthogonal",
    "policy.squash=false",
    "policy.state_std=false",
]


def collect(policy, steps, at, seed, settings, step):
    """Errors after `at` samples; `step(t, act)` gives the t-th observation to `act` and returns it with the action."""
    m = settings["behaviour_steps"]
    # Every m steps join the window as a rollout of their own, so that each behaviour update sees all samples so far.
    config = PROPSConfig(**(settings | {"rollout_steps": m, "buffer_batches": steps // m}))
    generator = torch.Generator().manual_seed(seed)
    algo = PROPS(config, policy, policy.spec, device=torch.device("cpu"), generator=generator)
    noise, nothing = torch.Generator().manual_seed(seed + 1000), torch.zeros(1, dtype=torch.bool)
    rows, actor, found = [], policy, {}
    for t in range(steps):
        if t % m == 0:
            actor = algo.behaviour([])
        obs, action = step(t, lambda obs, actor=actor: actor.act(obs, generator=noise))
        row = Batch(
            obs, action.chunk[:, 0], torch.zeros(1), {}, nothing, nothing, torch.zeros(1), chain=action.chain
        )
        rows.append(row)
        if len(rows) == m:
            held = algo.window.push(policy.normaliser.batch(stack(rows)))
            rows = []
            if t + 1 in at:
                flat = held.map(lambda tensor: tensor.flatten(0, 1))
                found[str(t + 1)] = sampling_error(policy, flat.obs, flat.chain).item()
    return found


def toy(states, arms, steps, at, seed, settings):
    """One run on a random softmax policy over one-hot states that come in random order."""
    torch.manual_seed(seed)
    spec = Spec({"state": ((states,), "float32")}, 1, (0.0,), (arms - 1.0,), 0, arms)
    policy = Categorical(CategoricalConfig(hidden=[]), spec)
    with torch.no_grad():
        policy.net[0].weight.copy_(torch.randn(arms, states))
    order = torch.randint(states, (steps,), generator=torch.Generator().manual_seed(seed + 2000))
    rows = torch.eye(states)[order]

    def step(t, act):
        obs = {"state": rows[t : t + 1]}
        return obs, act(obs)

    return collect(policy, steps, at, seed, TOY | settings, step)


def simulator(task, trained, steps, at, seed, settings):
    """One run of the trained policy in its simulator."""
    policy = load_policy(target_folder(task, trained))
    env = make_vec(compose(["algo=ppo", f"env={task}"]).env, 1)
    state = {"obs": env.reset(seed=seed)}

    def step(t, act):
        obs = to_torch(state["obs"], "cpu")
        action = act(obs)
        state["obs"] = env.step(action.chunk[:, 0].numpy()).obs
        return obs, action

    try:
        return collect(policy, steps, at, seed, TASKS[task] | settings, step)
    finally:
        env.close()


def target_folder(task, trained):
    """Where the policy that has trained for so many steps lies; its cell makes it."""
    return FOLDER / f"{task}-{trained}"


def train_target(task, trained):
    """Train the policy that stays fixed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*TARGET, f"env={task}", f"loop.steps={trained}", f"out={folder}/run", "device=cpu"]
        words += ["loop.eval_episodes=1", "track.tensorboard=false", "track.console=false", "accel.threads=1"]
        config = compose(words)
        run = train(config)
        policy = load_policy(run)
        place = target_folder(task, trained)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("policy.safetensors", "policy.json"):
            (place / name).write_bytes(next(Path(run).glob(f"checkpoints/step_*/{name}")).read_bytes())
        result = evaluate(policy, config.env, episodes=20, seed=10_000, deterministic=False)
    return {"return_mean": float(result.returns.mean()), "return_std": float(result.returns.std())}


def ratio(ours, theirs, draws=4000):
    """Ratio of means and its 95 % interval, seeds drawn with replacement in pairs."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    rows = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
    spread = np.quantile(ours[rows].mean(1) / theirs[rows].mean(1), [0.025, 0.975])
    return float(ours.mean() / theirs.mean()), (float(spread[0]), float(spread[1]))


def run(bench: Bench) -> None:
    """Toy cells, targets, fixed-policy cells; a missing cell leaves its figures empty."""
    bench.packages("gymnasium", "mujoco")
    toys = {
        "bandit": (1, 10, (64, 128, 256, 512), 0.6, "props_bandit_error_ratio_512"),
        "tabular": (9, 4, (256, 512, 1024), 0.5, "props_tabular_error_ratio"),
    }
    seeds = bench.scale(smoke=1, small=10, paper=10)
    for name, (states, arms, at, bar, figure) in toys.items():
        rows, last = [], {}
        for method, settings in METHODS.items():
            found = []
            for seed in range(seeds):

                def measure(states=states, arms=arms, at=at, seed=seed, settings=settings):
                    return toy(states, arms, at[-1], at, seed, settings)

                params = {"states": states, "arms": arms, "settings": TOY | settings}
                found.append(bench.cell(f"{name}/{method}/seed{seed}", measure, params=params, seed=seed))
            rows.append(
                {"sampling": method, **{str(n): float(np.mean([row[str(n)] for row in found])) for n in at}}
            )
            last[method] = [row[str(at[-1])] for row in found]
        rows.append(
            {"sampling": "on-policy, expected", **{str(n): states * (arms - 1) / (2 * n) for n in at}}
        )
        value, interval = ratio(last["props"], last["on-policy"])
        note = f"PROPS / on-policy, means over {seeds} seeds, {at[-1]} samples"
        bench.figure(figure, value, interval=interval, unit="x", target=bar, better="lower", note=note)
        caption = f"Sampling error (nats) in the {name} task by number of samples, mean of {seeds} seeds."
        bench.table(name, rows, caption=caption)
    simulators(bench)


def simulators(bench):
    """The part on MuJoCo tasks."""
    steps = bench.scale(smoke=1024, small=32_768, paper=32_768)
    at = (steps // 4, steps // 2, steps)
    trained = bench.scale(smoke=2048, small=300_000, paper=1_000_000)
    seeds = bench.scale(smoke=1, small=5, paper=5)
    table = []
    for task, settings in TASKS.items():
        bench.cell(
            f"target/{task}",
            lambda task=task: train_target(task, trained),
            params={"steps": trained},
            seed=0,
        )
        last = {}
        for method in ("on-policy", "props"):
            found = []
            for seed in range(seeds):

                def measure(task=task, seed=seed, method=method):
                    return simulator(task, trained, steps, at, seed, METHODS[method])

                params = {"steps": steps, "target": trained, "settings": settings | METHODS[method]}
                key = f"fixed/{task}/{method}/seed{seed}"
                found.append(bench.cell(key, measure, params=params, seed=seed))
            row = {"task": task, "sampling": method}
            table.append(row | {str(n): float(np.mean([cell[str(n)] for cell in found])) for n in at})
            last[method] = np.asarray([cell[str(steps)] for cell in found])
        name = task.split("-")[0].lower()
        value, interval = ratio(last["props"], last["on-policy"])
        note = f"PROPS / on-policy, a fixed PPO policy, {steps} steps, means over {seeds} seeds"
        bench.figure(
            f"props_{name}_error_ratio", value, interval=interval, unit="x", better="lower", note=note
        )
        complete = np.isfinite(last["props"] + last["on-policy"]).all()
        below = float((last["props"] < last["on-policy"]).sum()) if complete else None
        note = f"of {seeds} seeds, sampling error after {steps} steps below that of on-policy sampling"
        bar = 4 if name == "hopper" else None
        bench.figure(f"props_{name}_seeds_below_onpolicy", below, unit="seeds", target=bar, note=note)
    caption = f"Sampling error (nats) of a fixed policy by number of steps, mean of {seeds} seeds."
    bench.table("fixed", table, caption=caption)
