# SPDX-License-Identifier: Apache-2.0
"""On-policy rollouts of whole episodes: every copy plays one from a fresh start, groups of copies from the same one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from robopost.algos.base import Algorithm
from robopost.data.batch import Batch
from robopost.loops.collector import Collector
from robopost.loops.decisions import DecisionTable
from robopost.vector import to_torch


def collect_episodes(collector: Collector, algo: Algorithm, rounds: int, group: int) -> tuple[Batch, int]:
    """Play `rounds` whole episodes in every environment, executing chunks of `algo.decide`.

    All copies start each round anew; `group` neighbouring ones start from the same state, so that their outcomes can
    be compared. An episode is over when it succeeds, whether or not the environment ends it there: what comes after
    says nothing about the task. A copy whose episode is over waits for the others: what it does then is neither asked
    of the policy nor recorded.

    Returns:
        ((D, M) batch in environment units with M = rounds x N episodes, number of steps recorded). Decision d of
        episode m as in `collect_decisions`; rows behind an episode's last decision execute nothing and hold zeros.
        `extra["success"]` (D, M) says with 0 or 1 whether the episode succeeded; where the task has no success
        predicate, whether its rewards sum to more than zero. `extra["return"]` (D, M) is that sum.
    """
    run, policy, env = collector.run, algo.policy, collector.env
    execute, copies = policy.execute, env.num_envs
    table = DecisionTable(rounds * copies)
    success = np.zeros(rounds * copies, np.float32)
    returns = np.zeros(rounds * copies, np.float32)
    steps = 0
    every = np.arange(copies)
    for index in range(rounds):
        collector.begin_round(group)
        first = index * copies
        queue = np.zeros((copies, execute, policy.spec.action_dim), np.float32)
        done_steps = np.zeros(copies, np.int64)  # executed of the running chunk; 0 = ask for one
        reward = np.zeros(copies, np.float32)
        running = np.ones(copies, bool)
        while running.any():
            asking = np.flatnonzero(running & (done_steps == 0))
            if len(asking):
                obs = to_torch({key: value[asking] for key, value in collector.obs.items()}, run.device)
                action = algo.decide(obs, run.generators["policy"])
                queue[asking] = action.chunk[:, :execute].cpu().numpy()
                table.begin(first + asking, obs, action.chunk, action.chain, action.log_prob)
            env.want_images(running & (done_steps + 1 == execute))
            step = collector.step(queue[every, done_steps], running)
            gained = np.where(running, collector.scaled(step.reward), 0.0)
            reward += gained
            returns[first + every] += gained
            solved = np.zeros(copies, bool) if step.success is None else running & step.success
            success[first + every] += solved
            steps += int(running.sum())
            done_steps[running] += 1
            closing = np.flatnonzero(running & (step.done | solved | (done_steps == execute)))
            if len(closing):
                table.end(
                    first + closing,
                    closing,
                    reward,
                    step.next_obs,
                    step.terminated | solved,
                    step.truncated & ~solved,
                    done_steps,
                )
                reward[closing] = 0.0
                done_steps[closing] = 0
            running &= ~(step.done | solved)
            has_success = step.success is not None
        if not has_success:
            success[first + every] = returns[first + every] > 0
    env.want_images(None)
    batch = table.batch(algo.needs.gamma, policy.horizon, run.device)
    deep = len(batch.reward)
    extra = {"success": success, "return": returns}
    rows = {key: torch.from_numpy(value).to(run.device).expand(deep, -1) for key, value in extra.items()}
    return replace(batch, extra=rows), steps
