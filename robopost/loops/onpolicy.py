# SPDX-License-Identifier: Apache-2.0
"""The on-policy loop: a rollout of the current policy, then an update; unit: an environment step or an episode."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robopost.data.batch import Batch, Obs, bootstrap_discount
from robopost.data.dataset import Dataset
from robopost.data.mixture import check_same_task
from robopost.errors import CheckpointError, ConfigError
from robopost.loops.collector import Collector
from robopost.loops.decisions import collect_decisions
from robopost.loops.episodes import collect_episodes
from robopost.loops.run import Files, Run, crossed, stream_seed
from robopost.policies.base import EPISODE_STEP, Action, Policy
from robopost.vector import Arrays, VecEnv, make_vec, to_torch

REHEARSAL_STREAM = 101


def run_onpolicy(run: Run) -> None:
    """Train in `config.env` until `config.loop.steps` environment steps (all copies together) are done.

    Where the algorithm learns from whole episodes (`Needs.episodes`), steps are episodes.

    Recorded data (`data.path`), if there is any, gives the normaliser its statistics, and the algorithm gets all of it
    through `attach`: one that learns from it draws from it in `update`.
    """
    config = run.config
    history = int(getattr(config.policy, "history", 1))
    ranks = run.ranks
    if config.env.num_envs % ranks.size:
        raise ConfigError(
            f"env.num_envs={config.env.num_envs} is that of all {ranks.size} processes together and must be a multiple "
            f"of {ranks.size}. Fix: env.num_envs={max(1, config.env.num_envs // ranks.size) * ranks.size}"
        )
    env = make_vec(config.env, config.env.num_envs // ranks.size, history=history)
    try:
        recorded = _recorded(run, env)
        stats, source = None, f"env {config.env.name}"
        if recorded:
            stats, source = recorded.stats_for(config.policy.normalise_action), recorded.dataset_id
        algo = run.build(env.spec, stats, source)
        if not algo.needs.chunks and (algo.policy.execute != 1 or not algo.policy.has_log_prob):
            raise ConfigError(
                f"algo={config.algo.name} needs a policy with a log-probability that acts every step; "
                f"policy={config.policy.name} has horizon={algo.policy.horizon}. Fix: policy=gaussian"
            )
        needs = algo.needs
        steps, refresh = needs.rollout_steps, needs.refresh_steps
        span = steps * (algo.policy.execute if needs.chunks else 1)  # vector steps of a rollout
        if refresh and steps * env.num_envs % refresh:
            raise ConfigError(
                f"algo={config.algo.name} renews its behaviour policy every {refresh} environment steps, which doesn't "
                f"divide a rollout of algo.rollout_steps={steps} x env.num_envs={env.num_envs}. "
                f"Fix: a divisor of {steps * env.num_envs}"
            )
        if env.num_envs % needs.group:
            each = f" in each of {ranks.size} processes" if ranks.size > 1 else ""
            fitting = ranks.size * needs.group * max(1, env.num_envs // needs.group)
            raise ConfigError(
                f"env.num_envs={config.env.num_envs} must be a multiple of the {needs.group} episodes that "
                f"algo={config.algo.name} compares{each}. Fix: env.num_envs={fitting}"
            )
        if algo.policy.wraps_env:
            env = algo.policy.wrap_env(env)
        state = run.prepare(algo)
        if state is not None and state.get("dataset", source) != source:
            raise CheckpointError(
                f"{config.data.path} has changed since {run.folder} was trained with it. "
                "Fix: restore it, or start a new run with out=<folder>"
            )
        if recorded is not None:
            algo.attach(recorded.normalise(algo.policy.normaliser))
        if state is None:
            algo.before_rollouts(lambda policy, episodes: _success(run, policy, episodes))
        collector = Collector(env, run)
        collector.start(state)
        while run.step < config.loop.steps:
            began = time.perf_counter()
            ranks.reseed(run.generators, config.seed, run.step)
            if needs.episodes:
                with algo.whole_policy():
                    batch, executed = collect_episodes(collector, algo, needs.episodes, needs.group)
                # A log line has the mean over processes, this is of all of them.
                run.record({"data/steps": torch.tensor(float(executed * ranks.size))})
                taken = needs.episodes * config.env.num_envs
            else:
                collect = collect_decisions if needs.chunks else collect_steps
                batch, taken = collect(collector, algo, steps), span * env.num_envs
            run.add_time("time/collect", time.perf_counter() - began)
            began = time.perf_counter()
            run.record(algo.update(algo.policy.normaliser.batch(batch)))
            run.add_time("time/update", time.perf_counter() - began)

            def extra_state() -> tuple[Files, dict[str, Any]]:
                files, plain = collector.state()
                return files, plain | ({"dataset": source} if recorded else {})

            if run.after(run.step + taken, algo, extra_state):
                collector.cut_if_unsaved()
    finally:
        env.close()


def _success(run: Run, policy: Policy, episodes: int) -> float | None:
    """Share of greedy episodes of `policy` that succeed; None where the task has no success predicate."""
    from robopost.evaluate.rollout import evaluate

    seed = stream_seed(run.config.seed, REHEARSAL_STREAM) % 2**31
    result = evaluate(policy, run.config.env, episodes=episodes, seed=seed)
    return None if result.successes is None else float(result.successes.mean())


def _recorded(run: Run, env: VecEnv) -> Dataset | None:
    """The data of `data.path`, in environment units; None where it is empty.

    Raises:
        ConfigError: an algorithm with `hybrid` has none.
        DataError: it is of another task.
    """
    config = run.config
    if not config.data.path:
        if getattr(config.algo, "hybrid", False):
            raise ConfigError(
                f"algo={config.algo.name} learns from recorded data too and data.path is empty. "
                "Fix: data.path=<store>, data.collect=<episodes> of the environment's expert, or algo.hybrid=false"
            )
        return None
    with run.ranks.first_alone():
        dataset = Dataset.load(config.data, device=run.device)
    check_same_task(env.spec, dataset.spec)
    return dataset


def collect_steps(collector: Collector, algo: Any, steps: int) -> Batch:
    """(T, N) batch of `steps` steps in every environment."""
    run, policy = collector.run, algo.policy
    refresh, copies = algo.needs.refresh_steps, collector.env.num_envs
    rows: list[Batch] = []
    taken: list[_Taken] = []
    for step_index in range(steps):
        if crossed((step_index - 1) * copies, step_index * copies, refresh):
            began = time.perf_counter()
            rows += [item.row(run.device, algo.needs.gamma) for item in taken[len(rows) :]]
            policy = algo.behaviour(rows)
            run.add_time("time/behaviour", time.perf_counter() - began)
        obs = to_torch(collector.obs, run.device)
        if policy.reads_step:
            obs |= {EPISODE_STEP: torch.from_numpy(collector.length.copy()).to(run.device)}
        action = policy.act(obs, generator=run.generators["policy"])
        step = collector.step(action.chunk[:, 0].cpu().numpy())
        taken.append(
            _Taken(obs, action, step.next_obs, collector.scaled(step.reward), step.terminated, step.truncated)
        )
    return _joined(taken).row(run.device, algo.needs.gamma)


@dataclass
class _Taken:
    """One vector step, or all of a rollout: what the policy saw and did, and the environment's answer, as it came."""

    obs: Obs
    action: Action
    next_obs: Arrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    def row(self, device: torch.device, gamma: float) -> Batch:
        """As a batch on `device`."""
        terminated = torch.from_numpy(self.terminated).to(device)
        return Batch(
            obs=self.obs,
            action=self.action.chunk.select(-2, 0),
            reward=torch.from_numpy(self.reward).to(device),
            next_obs=to_torch(self.next_obs, device),
            terminated=terminated,
            truncated=torch.from_numpy(self.truncated).to(device),
            discount=bootstrap_discount(terminated, gamma),
            chain=self.action.chain,
            log_prob=self.action.log_prob,
        )


def _joined(taken: list[_Taken]) -> _Taken:
    """All steps of a rollout, (T, N, ...): a few copies to the device instead of a few per step."""
    first = taken[0]
    join = lambda name: np.stack([getattr(item, name) for item in taken])  # noqa: E731
    chunks, log_probs, chains = zip(
        *((a.chunk, a.log_prob, a.chain) for a in (item.action for item in taken)), strict=True
    )
    return _Taken(
        {key: torch.stack([item.obs[key] for item in taken]) for key in first.obs},
        Action(torch.stack(chunks), torch.stack(log_probs), torch.stack(chains)),
        {key: np.stack([item.next_obs[key] for item in taken]) for key in first.next_obs},
        join("reward"),
        join("terminated"),
        join("truncated"),
    )
