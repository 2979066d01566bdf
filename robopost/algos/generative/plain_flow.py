# SPDX-License-Identifier: Apache-2.0
"""What PolicyFlow and FPO share: the policy acts as the flow itself, ratios come from velocities at single points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robopost.algos.generative.chunk_ppo import ChunkPPO, blocks
from robopost.data.batch import Obs
from robopost.errors import ConfigError
from robopost.policies.flow import FlowPolicy

# Of all rows: the networks' activations count, and every row may hold several points.
POINTS = 16_384


class PlainFlowPPO(ChunkPPO):
    """PPO on a rectified flow all of whose steps are fine-tuned, without a density of its chain."""

    policies = (FlowPolicy,)
    policy: FlowPolicy

    def build_actor(self) -> list[nn.Module]:
        """The policy.

        Raises:
            ConfigError: a shortcut model, or a policy whose first steps are frozen.
        """
        policy = self.policy
        if not policy.rectified:
            raise ConfigError(
                f"algo={self.registry_name} compares velocities of one field at points between noise and action, a "
                "policy.variant=shortcut model jumps: its steps don't follow the velocity at a point. "
                "Fix: policy.variant=rectified when training the base policy, or algo=reinflow"
            )
        if policy.frozen_steps:
            raise ConfigError(
                f"algo={self.registry_name} fine-tunes all steps of a flow, of this policy's {policy.num_steps} the "
                f"first {policy.frozen_steps} are frozen. Fix: fine-tune the run it began with, or algo=reinflow"
            )
        return [policy]

    @property
    def rows_per_decision(self) -> int:
        """One point."""
        return 1

    def velocity_at(self, obs: Obs, x: Tensor, t: Tensor) -> Tensor:
        """Velocities (M, n, H, A) at the points `x` (M, n, H, A) and times `t` (M, n) of a whole rollout, in blocks."""
        rows = {f"obs/{key}": value for key, value in obs.items()} | {"x": x, "t": t}
        found = []
        for part in blocks(rows, max(1, POINTS // x.shape[1])):
            cond = self.policy.encoder({key: part[f"obs/{key}"] for key in obs})
            found.append(self.policy.velocities(part["x"], part["t"], cond))
        return torch.cat(found)

    def draw_times(self, *shape: int) -> Tensor:
        """Times drawn from the points at which the solver asks for a velocity: elsewhere it never acts."""
        points = self.policy.grid.points(self.device)
        return points[torch.randint(len(points), shape, generator=self.generator, device=self.device)]


def interpolate(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t x_1 of chunks (..., H, A) and times (...)."""
    at = t[..., None, None]
    return (1 - at) * start + at * end
