# SPDX-License-Identifier: Apache-2.0
"""The off-policy loop: step, store, update; the unit of progress is one environment step.

`interact` is also the online phase of offline algorithms.
"""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np

from robopost.algos.base import Algorithm
from robopost.config import TrainConfig
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.mixture import MixedSampler, Sampler, UniformSampler, check_same_task
from robopost.errors import ConfigError
from robopost.loops.collector import Collector
from robopost.loops.run import Files, Run
from robopost.vector import VecEnv, make_vec, to_torch


def run_offpolicy(run: Run) -> None:
    """Train in `config.env` until `config.loop.steps` environment steps (all copies together) are done."""
    config = run.config
    env = make_training_env(config)
    try:
        demos = Dataset.load(config.data, device=run.device) if config.data.path else None
        if demos is not None and getattr(config.algo, "demo_fraction", 0.0) > 0:
            check_same_task(env.spec, demos.spec)
        algo = run.build(
            env.spec,
            demos.stats_for(config.policy.normalise_action) if demos is not None else None,
            demos.dataset_id if demos is not None else "env",
        )
        needs, policy = algo.needs, algo.policy
        if needs.demo_fraction > 0 and demos is None:
            raise ConfigError(
                f"algo.demo_fraction={needs.demo_fraction} mixes in recorded data and data.path is empty. "
                "Fix: data.path=<store> or algo.demo_fraction=0"
            )
        if not policy.spec.bounded:
            raise ConfigError(
                f"algo={config.algo.name} needs bounded actions; {config.env.name} has infinite bounds"
            )
        if policy.wraps_env:
            env = policy.wrap_env(env)
        buffer = ReplayBuffer(
            policy.spec, config.loop.buffer_size, env.num_envs, run.device, history=env.history
        )
        state = run.prepare(algo)
        sampler: Sampler = buffer
        if needs.demo_fraction > 0 and demos is not None:
            sampler = MixedSampler(buffer, policy.label_demos(demos), needs.demo_fraction)
        interact(run, algo, env, buffer, sampler, state)
    finally:
        env.close()


def make_training_env(config: TrainConfig) -> VecEnv:
    """`config.env` in `config.env.num_envs` copies, with the history the policy sees."""
    return make_vec(config.env, config.env.num_envs, history=int(getattr(config.policy, "history", 1)))


def interact(
    run: Run,
    algo: Algorithm,
    env: VecEnv,
    buffer: ReplayBuffer,
    sampler: Sampler,
    state: dict[str, Any] | None,
    *,
    started: int = 0,
    extra: dict[str, Any] | None = None,
) -> None:
    """Step, store and update until `config.loop.total`.

    Args:
        run: prepared.
        algo: goes on as it is.
        env: wrapped as the policy asks.
        buffer: empty, for the run's own experience.
        sampler: gives batches in environment units.
        state: the loop state of a checkpoint that was written in here, None to begin.
        started: `run.step` of the first environment step.
        extra: what else the loop state of checkpoints holds.
    """
    config, needs, policy = run.config, algo.needs, algo.policy
    collector = Collector(env, run)
    collector.start(state)
    due = 0.0
    journal = run.folder / "buffer"
    if state is not None:
        buffer.restore(journal, state["buffer"])
        due = float(state["due"])
    else:
        shutil.rmtree(journal, ignore_errors=True)  # of a run that was killed before its first checkpoint
    low, high = np.array(env.spec.action_low, np.float32), np.array(env.spec.action_high, np.float32)

    def extra_state() -> tuple[Files, dict[str, Any]]:
        files, plain = collector.state()
        if not env.can_save:
            buffer.cut()  # the collector starts new episodes after this checkpoint, resumed or not
        return files, plain | {"due": due, "buffer": buffer.journal(journal)} | (extra or {})

    while run.step < config.loop.total:
        began = time.perf_counter()
        # Recorded data may declare wider bounds than the environment: what is stored is what is executed.
        action = np.clip(_explore(run, algo, collector, started), low, high)
        obs, step = collector.obs, collector.step(action)
        buffer.add(obs, action, collector.scaled(step.reward), step.next_obs, step.terminated, step.truncated)
        run.add_time("time/collect", time.perf_counter() - began)
        now = run.step + env.num_envs
        began = time.perf_counter()
        if now - started > needs.warmup_steps:
            first = run.step - started <= needs.warmup_steps
            due += needs.updates_per_step * env.num_envs + (needs.first_updates if first else 0)
            while due >= 1.0:
                batch = sampler.sample(
                    needs.batch_size,
                    run.generators["data"],
                    n_step=needs.n_step,
                    gamma=needs.gamma,
                    extra=needs.extra,
                )
                run.record(algo.update(policy.normaliser.batch(batch)))
                due -= 1.0
        run.add_time("time/update", time.perf_counter() - began)
        if isinstance(sampler, (MixedSampler, UniformSampler)):
            run.record_episode({"data/online_fraction": sampler.online_fraction})
        if run.after(now, algo, extra_state):
            buffer.prune(journal, buffer.total)
            collector.cut_if_unsaved()


def _explore(run: Run, algo: Algorithm, collector: Collector, started: int) -> np.ndarray:
    """Executed actions (N, A): uniform during warm-up, then the algorithm's exploration."""
    generator = run.generators["policy"]
    policy = algo.policy
    obs = to_torch(collector.obs, run.device)
    if run.step - started < algo.needs.warmup_steps:
        action = policy.random_action(obs, generator)
    else:
        action = algo.explore(obs, generator)
    return action.cpu().numpy()
