# SPDX-License-Identifier: Apache-2.0
"""The offline loop: updates from a fixed dataset; the unit of progress is one update.

With `loop.online_steps` the same algorithm goes on in the environment, in the off-policy loop's `interact`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robopost.algos.base import Algorithm
from robopost.config import TrainConfig
from robopost.data.batch import Batch, Spec
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.mixture import MixedSampler, UniformSampler, check_extras
from robopost.errors import CheckpointError, ConfigError
from robopost.loops.offpolicy import interact, make_training_env
from robopost.loops.run import Files, Run
from robopost.policies.base import Policy
from robopost.registry import ALGOS
from robopost.vector import make_vec

log = logging.getLogger(__name__)
REACH_SLACK = 1e-3
SYMMETRIC = 0.5  # recorded share of a batch (Nakamoto et al. 2023, Cal-QL: mixing ratio)


def run_offline(run: Run) -> None:
    """Train from `config.data` until `config.loop.steps` updates are done, then online where the config asks."""
    dataset = load(run)
    algo, state = begin(run, dataset)
    recorded = algo.policy.label_demos(dataset)
    # Statistics are fixed now (fitted or restored): normalise the whole dataset once instead of every batch.
    dataset = recorded.normalise(algo.policy.normaliser)
    online = online_sampler(run, algo, recorded) if run.config.loop.online_steps else None
    algo.attach(dataset)
    learn(run, algo, dataset, run.config.loop.steps)
    if online is not None:
        _go_online(run, algo, *online, state)


def load(run: Run) -> Dataset:
    """The recorded data of the config, in environment units."""
    config = run.config
    if not config.data.path:
        raise ConfigError(
            f"algo={config.algo.name} learns from recorded data and data.path is empty. "
            "Fix: data.path=<store or dataset file>; make one with `robopost collect`"
        )
    with run.ranks.first_alone():  # it may have to import the data into a store
        return Dataset.load(config.data, device=run.device)


def begin(run: Run, dataset: Dataset) -> tuple[Algorithm, dict[str, Any] | None]:
    """Build the algorithm, check that everything fits, and create or restore the run.

    Returns:
        (algorithm, the loop state of the checkpoint or None).
    """
    config = run.config
    stats = dataset.stats_for(config.policy.normalise_action)
    algo = run.build(dataset.spec, stats, dataset.dataset_id)
    _check_reach(algo.policy, dataset)
    if config.env is not None:
        _check_env(config, algo.policy, dataset.spec)
    state = run.prepare(algo)
    if state is not None and state["dataset"] != dataset.dataset_id:
        raise CheckpointError(
            f"{config.data.path} has changed since {run.folder} was trained on it. "
            "Fix: restore it, or start a new run with out=<folder>"
        )
    return algo, state


def learn(run: Run, algo: Algorithm, dataset: Dataset, until: int) -> None:
    """Updates from `dataset`, in normalised units, until `run.step` is `until`."""
    needs, generator = algo.needs, run.generators["data"]
    for step in range(run.step + 1, until + 1):
        steps = run.ranks.mine(dataset.draw(needs.batch_size, generator, chunks=needs.chunks))
        run.ranks.reseed(run.generators, run.config.seed, step)
        run.record(algo.update(batch_at(dataset, algo, steps)))
        run.after(step, algo, lambda: loop_state(dataset))


def batch_at(dataset: Dataset, algo: Algorithm, steps: Tensor) -> Batch:
    """The batch that `algo` asks for, begun at `steps` (B,) int64."""
    needs, policy = algo.needs, algo.policy
    if needs.chunks:
        return dataset.chunks_at(steps, policy.horizon, history=policy.history, extra=needs.extra)
    return dataset.transitions_at(
        steps, n_step=needs.n_step, gamma=needs.gamma, extra=needs.extra, history=policy.history
    )


def loop_state(dataset: Dataset) -> tuple[Files, dict[str, Any]]:
    """What the offline loop adds to a checkpoint."""
    return {}, {"dataset": dataset.dataset_id}


def check_online(config: TrainConfig) -> None:
    """Say before anything is built that `config` can't have an online phase.

    Raises:
        ConfigError: the algorithm doesn't go online, or there is no environment.
    """
    target, steps = ALGOS.get(config.algo.name).target, config.loop.online_steps
    if target.regime != "offline":
        raise ConfigError(
            f"loop.online_steps={steps} follows offline updates, and algo={config.algo.name} learns online from "
            "its first step. Fix: loop.steps=<environment steps> alone"
        )
    if not target.can_go_online:
        able = ", ".join(entry.name for entry in ALGOS if entry.target.can_go_online)
        raise ConfigError(
            f"loop.online_steps={steps}: algo={config.algo.name} only learns from recorded data. "
            f"Algorithms that go on online: {able}. Fix: one of them, or loop.online_steps=0"
        )
    if config.env is None:
        raise ConfigError(f"loop.online_steps={steps} needs an environment and env is empty. Fix: env=<name>")


def online_sampler(
    run: Run, algo: Algorithm, recorded: Dataset
) -> tuple[ReplayBuffer, MixedSampler | UniformSampler]:
    """The empty buffer of the online phase, and what mixes it with `recorded` (environment units).

    Made before the offline updates: what doesn't fit shall not show after them.
    """
    loop, needs, policy, n = run.config.loop, algo.needs, algo.policy, run.config.env.num_envs
    check_extras(needs.extra)
    obs = {key: recorded.spec.obs[key] for key in policy.obs_keys}
    buffer = ReplayBuffer(
        replace(recorded.spec, obs=obs),
        min(loop.buffer_size, n * max(2, -(-loop.online_steps // n))),
        n,
        run.device,
        history=policy.history,
        return_gamma=needs.gamma if "return_to_go" in needs.extra else None,
        sparse_reward=run.config.data.sparse_reward,
    )
    if loop.online_sampling == "uniform":
        return buffer, UniformSampler(buffer, recorded)
    return buffer, MixedSampler(buffer, recorded, SYMMETRIC)


def _go_online(
    run: Run,
    algo: Algorithm,
    buffer: ReplayBuffer,
    sampler: MixedSampler | UniformSampler,
    state: dict[str, Any] | None,
) -> None:
    """The online phase, from where the offline updates or a checkpoint have left `algo`."""
    loop = run.config.loop
    env = make_training_env(run.config)
    try:
        if algo.policy.wraps_env:
            env = algo.policy.wrap_env(env)
        if not algo.online:
            log.info("online after %d updates, %s batches", run.step, loop.online_sampling)
            algo.begin_online()
            state = None  # of the offline phase
        extra = {"dataset": sampler.dataset.dataset_id, "online_from": loop.steps}
        interact(run, algo, env, buffer, sampler, state, started=loop.steps, extra=extra)
    finally:
        env.close()


def _check_reach(policy: Policy, dataset: Dataset) -> None:
    """Refuse a policy that ends in tanh where recorded actions lie outside [-1, 1] after normalisation.

    Actions beyond bounds that the data declares are no obstacle: no environment executes them.
    """
    settings, norm = policy.config, policy.normaliser
    if not (getattr(settings, "squash", False) or getattr(settings, "mean_tanh", False)):
        return
    reach = lambda *values: float(torch.stack([norm.action(v) for v in values]).abs().max())  # noqa: E731
    if policy.spec.bounded and reach(norm.action_low, norm.action_high) <= 1 + REACH_SLACK:
        return
    ends = [
        torch.tensor(dataset.stats["action"][name], device=norm.action_low.device) for name in ("min", "max")
    ]
    if reach(*ends) > 1 + REACH_SLACK:
        raise ConfigError(
            f"recorded actions reach {reach(*ends):.3g} with policy.normalise_action="
            f"{norm.provenance.get('action')}, and a policy with tanh ends at 1. "
            "Fix: policy.normalise_action=minmax"
        )


def _check_env(config: TrainConfig, policy: Policy, data: Spec) -> None:
    """Say now, not after the last update, that the policy can't be evaluated in `config.env`."""
    render = "rgb_array" if config.track.video_episodes else None
    env = make_vec(config.env, 1, render=render)
    env.close()
    name = getattr(config.env, "id", "") or config.env.name
    fix = "what is learnt there can't be evaluated here. Fix: another env=, or env=null"
    for key in policy.obs_keys:
        wanted, got = data.obs.get(key), env.spec.obs.get(key)
        if wanted is not None and wanted != got:
            offers = f"{key!r} {got}" if got else f"only {', '.join(env.spec.obs)}"
            raise ConfigError(f"{config.data.path} has {key!r} {wanted}, env={name} has {offers}: {fix}")
    if data.action_dim != env.spec.action_dim:
        raise ConfigError(
            f"{config.data.path} has {data.action_dim} actions, env={name} has {env.spec.action_dim}: {fix}"
        )
