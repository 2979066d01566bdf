# SPDX-License-Identifier: Apache-2.0
"""Returns-to-go of a replay buffer's steps, known from the moment their episode ends."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.data.indexing import returns_to_go
from robopost.errors import DataError

UNKNOWN = -float("inf")


class EpisodeReturns:
    """Discounted sums of rewards to the episode's end, beside a ring of steps per environment.

    A step of an episode that still runs has -inf: nothing is known yet, and as a lower bound on a value -inf binds
    nothing. Episodes that end, terminated or cut, are summed as a dataset's are, see `returns_to_go`.
    """

    def __init__(
        self, length: int, num_envs: int, gamma: float | None, sparse: bool, device: torch.device
    ) -> None:
        """A ring of `length` steps for each of `num_envs` environments, all unknown; without `gamma` nothing."""
        self.gamma = gamma
        self._sparse = sparse
        self._length, self._num_envs = length, num_envs
        rows = 0 if gamma is None else length * num_envs
        self._values = torch.full((rows,), UNKNOWN, device=device)
        # Rewards of the running episodes; those the ring has overwritten don't matter to the ones it holds.
        self._running: list[deque[float]] = [deque(maxlen=length) for _ in range(num_envs)]

    def of(self, gamma: float) -> Tensor:
        """(rows,) returns in the ring's order.

        Raises:
            DataError: another discount than they were summed with, or none.
        """
        if gamma != self.gamma:
            raise DataError(
                f"return_to_go with gamma={gamma}: the replay buffer has return_gamma={self.gamma}. "
                "Fix: make it with the same gamma"
            )
        return self._values

    def add(self, position: int, reward: Any, terminated: Any, ended: np.ndarray) -> None:
        """One step of every environment at ring `position`: (N,) rewards and flags."""
        if self.gamma is None:
            return
        self._values[position * self._num_envs : (position + 1) * self._num_envs] = UNKNOWN
        for rewards, value in zip(self._running, on_host(reward, np.float32).tolist(), strict=True):
            rewards.append(value)
        if ended.any():
            self.end(position, np.flatnonzero(ended), on_host(terminated, bool))

    def end(self, position: int, envs: np.ndarray, terminated: np.ndarray) -> None:
        """The episodes of `envs` end with the step at `position`; `terminated` (N,) says which of them so."""
        if self.gamma is None:
            return
        for env in envs.tolist():
            rewards = np.array(self._running[env], np.float32)
            self._running[env].clear()
            endless = ~terminated[env : env + 1] if self._sparse else None
            values = returns_to_go(rewards, np.array([len(rewards)]), self.gamma, endless)
            at = (position - np.arange(len(rewards))[::-1]) % self._length
            self._put(at * self._num_envs + env, values)

    def rebuild(self, total: int, reward: Tensor, terminated: Tensor, truncated: Tensor) -> None:
        """As after `total` steps per environment, from the ring's rewards and flags (rows,)."""
        if self.gamma is None:
            return
        at = np.arange(max(0, total - self._length), total) % self._length
        rewards, terms, cuts = (
            t.view(-1, self._num_envs).cpu().numpy()[at] for t in (reward, terminated, truncated)
        )
        for env in range(self._num_envs):
            stops = np.flatnonzero(terms[:, env] | cuts[:, env]) + 1
            done = int(stops[-1]) if len(stops) else 0
            endless = ~terms[stops - 1, env] if self._sparse else None
            values = returns_to_go(rewards[:done, env], np.diff(stops, prepend=0), self.gamma, endless)
            self._put(at[:done] * self._num_envs + env, values)
            self._running[env].extend(rewards[done:, env].tolist())

    def _put(self, rows: np.ndarray, values: np.ndarray) -> None:
        device = self._values.device
        self._values[torch.from_numpy(rows).to(device)] = torch.from_numpy(values).to(device)


def on_host(values: Any, kind: type) -> np.ndarray:
    """An array of `kind`; waits for the device of a tensor that lives on one."""
    if isinstance(values, Tensor):
        values = values.cpu().numpy()
    return np.asarray(values, kind)
