# SPDX-License-Identifier: Apache-2.0
"""Turns a chunk policy into a step policy: one queue per environment, refilled when it runs out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from robopost.data.batch import Obs
from robopost.policies.base import EPISODE_STEP, Policy


class StepPolicy:
    """Executes `policy.execute` steps of each predicted chunk before asking again.

    Only environments whose queue is empty are queried. `reset` must be called with the mask of environments whose
    episode ended, however it ended: a stale chunk tail must not leak into the next episode. It also counts every
    environment's steps since then, for policies whose actions depend on them (`Policy.reads_step`).

    `watch(envs, obs, chunk)`, where set, is shown every new chunk (b, H, A), its raw observations and the environments
    (b,) it is for.
    """

    def __init__(self, policy: Policy, num_envs: int) -> None:
        self.policy = policy
        self.num_envs = num_envs
        self.watch: Callable[[Tensor, Obs, Tensor], None] | None = None
        self._queue = torch.zeros(num_envs, policy.execute, policy.spec.action_dim, device=policy.device)
        self._left = torch.zeros(num_envs, dtype=torch.long, device=policy.device)
        self._steps = torch.zeros(num_envs, dtype=torch.long, device=policy.device)

    @property
    def asks(self) -> np.ndarray:
        """(N,) bool: the policy is asked for a new chunk at the next step."""
        return (self._left == 0).cpu().numpy()

    def reset(self, env_mask: Tensor | None = None) -> None:
        """Forget queues and step counts of the environments in `env_mask` (N,) bool; None = of all."""
        if env_mask is None:
            self._left.zero_()
            self._steps.zero_()
        else:
            self._left[env_mask.to(self._left.device)] = 0
            self._steps[env_mask.to(self._steps.device)] = 0
        on_reset = getattr(self.policy, "reset", None)
        if on_reset is not None:
            on_reset(env_mask)

    def act(
        self,
        obs: Obs,
        *,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        only: Tensor | None = None,
    ) -> Tensor:
        """Raw observations of all N environments to executable actions (N, A).

        `only` (N,) bool restricts the step to some environments: queues and step counts of the others stay as they
        are and their rows of the result mean nothing.
        """
        if self.policy.reads_step:
            obs = obs | {EPISODE_STEP: self._steps.clone()}
        self._steps += 1 if only is None else only.to(self._steps.device).long()
        if self.policy.execute == 1 and only is None:
            chunk = self.policy.act(obs, generator=generator, deterministic=deterministic).chunk
            if self.watch is not None:
                self.watch(torch.arange(self.num_envs, device=chunk.device), obs, chunk)
            return chunk[:, 0]
        active = torch.ones_like(self._left, dtype=torch.bool) if only is None else only.to(self._left.device)
        empty = torch.nonzero(active & (self._left == 0)).flatten()
        if len(empty):
            chosen = {key: value[empty] for key, value in obs.items()}
            chunk = self.policy.act(chosen, generator=generator, deterministic=deterministic).chunk
            self._queue[empty] = chunk[:, : self.policy.execute]
            self._left[empty] = self.policy.execute
            if self.watch is not None:
                self.watch(empty, chosen, chunk)
        index = (self.policy.execute - self._left).clamp_max(self.policy.execute - 1)
        self._left -= active.long()
        return self._queue[torch.arange(self.num_envs, device=index.device), index]

    def state_dict(self) -> dict[str, Tensor]:
        """Queues and counters, for an exact resume."""
        return {"queue": self._queue.clone(), "left": self._left.clone(), "steps": self._steps.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict` output."""
        self._queue.copy_(state["queue"])
        self._left.copy_(state["left"])
        self._steps.copy_(state["steps"])
