# SPDX-License-Identifier: Apache-2.0
"""The off-policy loop: step, store, update; the unit of progress is one environment step."""

from __future__ import annotations

import shutil
import time
from typing import Any

import numpy as np

from robopost.algos.base import Algorithm
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.data.mixture import MixedSampler, check_same_task
from robopost.errors import ConfigError
from robopost.loops.collector import Collector
from robopost.loops.run import Files, Run
from robopost.vector import make_vec, to_torch


def run_offpolicy(run: Run) -> None:
    """Train in `config.env` until `config.loop.steps` environment steps (all copies together) are done."""
    config = run.config
    env = make_vec(config.env, config.env.num_envs, history=int(getattr(config.policy, "history", 1)))
    try:
        demos = Dataset.load(config.data, device=run.device) if config.data.path else None
        if demos is not None and getattr(config.algo, "demo_fraction", 0.0) > 0:
            check_same_task(env.spec, demos.spec)
        algo = run.build(
            env.spec,
            demos.stats if demos is not None else None,
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
        collector = Collector(env, run)
        buffer = ReplayBuffer(
            policy.spec, config.loop.buffer_size, env.num_envs, run.device, history=env.history
        )
        state = run.prepare(algo)
        collector.start(state)
        due = 0.0
        journal = run.folder / "buffer"
        if state is not None:
            buffer.restore(journal, state["buffer"])
            due = float(state["due"])
        else:
            shutil.rmtree(journal, ignore_errors=True)  # of a run that was killed before its first checkpoint
        sampler: ReplayBuffer | MixedSampler = buffer
        if needs.demo_fraction > 0 and demos is not None:
            sampler = MixedSampler(buffer, policy.label_demos(demos), needs.demo_fraction)

        def extra_state() -> tuple[Files, dict[str, Any]]:
            files, plain = collector.state()
            if not env.can_save:
                buffer.cut()  # the collector starts new episodes after this checkpoint, resumed or not
            return files, plain | {"due": due, "buffer": buffer.journal(journal)}

        while run.step < config.loop.steps:
            began = time.perf_counter()
            action = _explore(run, algo, collector)
            obs, step = collector.obs, collector.step(action)
            reward = step.reward
            if demos is not None:  # one scale for recorded and new experience
                reward = reward * config.data.reward_scale + config.data.reward_shift
            buffer.add(obs, action, reward, step.next_obs, step.terminated, step.truncated)
            run.add_time("time/collect", time.perf_counter() - began)
            now = run.step + env.num_envs
            began = time.perf_counter()
            if now > needs.warmup_steps:
                due += needs.updates_per_step * env.num_envs
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
            if run.after(now, algo, extra_state):
                buffer.prune(journal, buffer.total)
                collector.cut_if_unsaved()
    finally:
        env.close()


def _explore(run: Run, algo: Algorithm, collector: Collector) -> np.ndarray:
    """Executed actions (N, A): uniform during warm-up, then the algorithm's exploration."""
    generator = run.generators["policy"]
    policy = algo.policy
    obs = to_torch(collector.obs, run.device)
    if run.step < algo.needs.warmup_steps:
        action = policy.random_action(obs, generator)
    else:
        action = algo.explore(obs, generator)
    return action.cpu().numpy()
