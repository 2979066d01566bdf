# SPDX-License-Identifier: Apache-2.0
"""Distillation of flow policies along the student's own noisy chain. Experimental: no released method does it.

With Gaussian noise of one std added to every step, student and teacher are Markov chains whose steps are Gaussians of
equal variance: their KL is |mean_S - mean_T|^2 / (2 std^2) in either direction, exact given the state of the chain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robopost.algos.base import Metrics
from robopost.algos.generative.chunk_ppo import blocks
from robopost.algos.vla.frame import SCORED, Decisions
from robopost.algos.vla.objectives import slot_mean
from robopost.algos.vla.teachers import Teacher
from robopost.data.batch import Obs, below
from robopost.errors import ConfigError
from robopost.policies.base import Action
from robopost.policies.chain import ChainPolicy

if TYPE_CHECKING:
    from robopost.algos.vla.opd import VLAOPDConfig


def chain_kl(student: Tensor, teacher: Tensor, std: float) -> Tensor:
    """KL of Gaussians of equal variance, per action dimension, a mean over the steps of the chain.

    Args:
        student: (B, n, H, A) means of the steps.
        teacher: (B, n, H, A).
        std: of both.

    Returns:
        (B, H, A).
    """
    return (student - teacher).square().mean(1) / (2 * std**2)


def chain_means(policy: ChainPolicy, obs: Obs, x: Tensor, first: int) -> Tensor:
    """Means (B, n, H, A) of steps `first` .. first + n - 1 from `x` (B, n, H, A); frozen networks in frozen steps."""
    frozen = max(0, min(policy.frozen_steps - first, x.shape[1]))
    parts = []
    if frozen:
        parts.append(policy.means(x[:, :frozen], first, policy.frozen["encoder"](obs), policy.frozen["net"]))
    if frozen < x.shape[1]:
        parts.append(policy.means(x[:, frozen:], first + frozen, policy.encoder(obs)))
    return torch.cat(parts, 1)


class FlowDistiller:
    """What `vla_opd` does where student and teacher are flow policies.

    Raises:
        ConfigError: an option that only token policies have.
    """

    def __init__(self, config: VLAOPDConfig, policy: ChainPolicy, teacher: Teacher) -> None:
        for name, plain in (
            ("kl_estimator", "exact"),
            ("divergence", "reverse"),
            ("routing", "none"),
            ("reference", "none"),
            ("top_k", 0),
            ("temperature", 0.0),
            ("lambda_outcome", 0.0),
            ("return_to_go", False),
        ):
            if getattr(config, name) != plain:
                raise ConfigError(
                    f"algo.{name}={getattr(config, name)} is for token policies, policy={policy.registry_name} is a "
                    f"flow. Fix: drop algo.{name}"
                )
        assert isinstance(teacher.policy, ChainPolicy)
        self.policy, self.expert, self.teacher = policy, teacher.policy, teacher
        self.std = config.flow_noise

    @torch.no_grad()
    def decide(self, obs: Obs, generator: torch.Generator) -> Action:
        """A chunk at the end of a noisy chain (B, K + 1, H, A)."""
        policy = self.policy
        obs = policy.normaliser.obs(obs)
        start = policy.start(len(next(iter(obs.values()))), generator, deterministic=False)
        shape = (len(start), policy.num_steps, *start.shape[1:])
        noise = self.std * torch.randn(shape, generator=generator, device=start.device)
        chain = torch.stack(policy.chain(obs, start, noise), 1)
        chunk = chain[:, -1].clamp(-policy.clip, policy.clip)
        return Action(policy.normaliser.unnormalise_action(chunk), None, chain)

    @torch.no_grad()
    def columns(self, rows: Decisions) -> dict[str, Tensor]:
        """Where the trained steps of the student's chain began, and where the teacher would have gone from there."""
        first = self.policy.frozen_steps
        x = rows.chain[:, first:-1]
        seen = {f"obs/{key}": value for key, value in self.teacher.observes(rows.obs).items()} | {"x": x}
        found = [chain_means(self.expert, below(p, "obs/"), p["x"], first) for p in blocks(seen, SCORED)]
        return {"x": x, "teacher": torch.cat(found)}

    def loss(self, rows: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """Mean KL of a step and action dimension over the valid slots."""
        mean = chain_means(self.policy, below(rows, "obs/"), rows["x"], self.policy.frozen_steps)
        loss = slot_mean(chain_kl(mean, rows["teacher"], self.std), rows["valid"])
        return loss, {"loss/opd": loss.detach(), "policy/kl_teacher": loss.detach()}
