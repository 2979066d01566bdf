# SPDX-License-Identifier: Apache-2.0
"""On-policy rollouts of chunk policies: a transition is one decision, the execution of one action chunk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robopost.algos.base import Algorithm
from robopost.data.batch import Batch, below, bootstrap_discount
from robopost.loops.collector import Collector
from robopost.vector import Arrays, to_torch


def collect_decisions(collector: Collector, algo: Algorithm, count: int) -> Batch:
    """Execute `count` chunks of `algo.decide` per environment.

    A decision collects the plain sum of its rewards; `next_obs` is what follows its last executed step, the true final
    observation where the episode ended. An episode that ends inside a chunk ends the decision: the environment begins
    a new one at once and so has more than `count` in the rollout. Its last one may be cut by the rollout's end, then
    it is a shorter chunk whose value is bootstrapped; every rollout begins with fresh chunks.

    Returns:
        (D, N) batch in environment units, D >= count: decision d of environment n. `action` (D, N, H, A) the chunks
        with `chunk_mask` (D, N, H) True on executed steps; rows behind an environment's last decision execute nothing
        and hold zeros. `discount` is gamma per decision.
    """
    run, policy, env = collector.run, algo.policy, collector.env
    execute, copies = policy.execute, env.num_envs
    table = DecisionTable(copies)
    queue = np.zeros((copies, execute, policy.spec.action_dim), np.float32)
    done_steps = np.zeros(copies, np.int64)  # executed of the running chunk; 0 = ask for one
    reward = np.zeros(copies, np.float32)
    last = count * execute - 1
    for index in range(count * execute):
        asking = np.flatnonzero(done_steps == 0)
        if len(asking):
            obs = to_torch({key: value[asking] for key, value in collector.obs.items()}, run.device)
            action = algo.decide(obs, run.generators["policy"])
            queue[asking] = action.chunk[:, :execute].cpu().numpy()
            table.begin(asking, obs, action.chunk, action.chain, action.log_prob)
        step = collector.step(queue[np.arange(copies), done_steps])
        reward += collector.scaled(step.reward)
        done_steps += 1
        closing = np.flatnonzero(step.done | (done_steps == execute) | (index == last))
        if len(closing):
            table.end(closing, closing, reward, step.next_obs, step.terminated, step.truncated, done_steps)
            reward[closing] = 0.0
            done_steps[closing] = 0
    return table.batch(algo.needs.gamma, policy.horizon, run.device)


@dataclass
class DecisionTable:
    """Decisions as they begin and end, in any order; `batch` sorts them into (D, N)."""

    copies: int
    begun: list[dict[str, Tensor]] = field(default_factory=list)
    ended: list[dict[str, Tensor]] = field(default_factory=list)
    _open: np.ndarray = field(init=False)  # (N,) index d of the running decision

    def __post_init__(self) -> None:
        self._open = np.full(self.copies, -1)

    def begin(
        self,
        rows: np.ndarray,
        obs: dict[str, Tensor],
        chunk: Tensor,
        chain: Tensor | None,
        log_prob: Tensor | None,
    ) -> None:
        """The environments `rows` have chosen `chunk`."""
        self._open[rows] += 1
        entry = {f"obs/{key}": value for key, value in obs.items()} | {"action": chunk}
        entry |= {} if chain is None else {"chain": chain}
        entry |= {} if log_prob is None else {"log_prob": log_prob}
        self.begun.append(entry | self._place(rows))

    def end(
        self,
        environments: np.ndarray,
        rows: np.ndarray,
        reward: np.ndarray,
        next_obs: Arrays,
        terminated: np.ndarray,
        truncated: np.ndarray,
        steps: np.ndarray,
    ) -> None:
        """The running decisions of `environments` are over; what became of them is in `rows` of the arrays."""
        columns = {"reward": reward, "terminated": terminated, "truncated": truncated, "steps": steps}
        columns |= {f"next_obs/{key}": value for key, value in next_obs.items()}
        entry = {key: torch.from_numpy(value[rows]) for key, value in columns.items()}
        self.ended.append(entry | self._place(environments))

    def _place(self, rows: np.ndarray) -> dict[str, Tensor]:
        return {"at": torch.from_numpy(self._open[rows] * self.copies + rows)}

    def batch(self, gamma: float, horizon: int, device: torch.device) -> Batch:
        """All decisions, see `collect_decisions`."""
        deep = int(self._open.max()) + 1
        columns: dict[str, Tensor] = {}
        for entries in (self.begun, self.ended):
            at = torch.cat([entry["at"] for entry in entries]).to(device)
            for key in entries[0].keys() - {"at"}:
                rows = torch.cat([entry[key] for entry in entries]).to(device)
                full = torch.zeros((deep * self.copies, *rows.shape[1:]), dtype=rows.dtype, device=device)
                columns[key] = full.index_copy_(0, at, rows).unflatten(0, (deep, self.copies))
        terminated = columns["terminated"]
        return Batch(
            obs=below(columns, "obs/"),
            action=columns["action"],
            reward=columns["reward"],
            next_obs=below(columns, "next_obs/"),
            terminated=terminated,
            truncated=columns["truncated"],
            discount=bootstrap_discount(terminated, gamma),
            chunk_mask=torch.arange(horizon, device=device) < columns["steps"].unsqueeze(-1),
            chain=columns.get("chain"),
            log_prob=columns.get("log_prob"),
        )
