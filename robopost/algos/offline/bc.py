# SPDX-License-Identifier: Apache-2.0
"""Behaviour cloning of any policy class: the policy brings its own loss."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError, unknown
from robopost.policies.base import Policy
from robopost.registry import ALGOS

PADDINGS = ("mask", "hold")


@dataclass
class BCConfig(AlgoConfig):
    """Config of `BC`."""

    name: str = "bc"
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-6
    warmup: int = 100  # updates of linear warm-up
    decay_steps: int = 0  # updates until the cosine reaches 0; 0 = constant after the warm-up
    grad_clip: float = 1.0  # largest gradient norm, 0 = off
    ema: float = 0.999  # decay of the exported average of the weights, 0 = export the last weights
    padding: str = (
        "mask"  # chunks behind an episode's end: mask = don't count | hold = repeat the last action
    )

    def __post_init__(self) -> None:
        if self.padding not in PADDINGS:
            raise unknown("algo.padding", self.padding, PADDINGS)
        if self.batch_size < 1:
            raise ConfigError(f"algo.batch_size={self.batch_size} must be at least 1")
        if self.lr <= 0:
            raise ConfigError(f"algo.lr={self.lr} must be positive")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"algo.ema={self.ema} must lie in [0, 1)")
        for name in ("weight_decay", "warmup", "decay_steps", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


@ALGOS.register("bc", config=BCConfig)
class BC(Algorithm):
    """Behaviour cloning: AdamW on `policy.bc_loss`, cosine learning rate, averaged weights."""

    registry_name = "bc"
    regime = "offline"

    def __init__(
        self,
        config: BCConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        self.config: BCConfig = config
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ConfigError(f"policy {policy.registry_name!r} has no weights to train")
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        if config.ema:
            self.ema = averaged_copy(policy)

    @property
    def needs(self) -> Needs:
        """Chunks of the policy's horizon."""
        return Needs(chunks=True, batch_size=self.config.batch_size)

    def update(self, batch: Batch) -> Metrics:
        """One gradient step on `obs` (B, ...), `action` (B, H, A) and `chunk_mask` (B, H) of the batch."""
        rate = learning_rate(self.updates, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        action, mask = chunk_of(batch)
        if self.config.padding == "hold":
            # Batches repeat the last action behind the end: right to learn where actions are position targets.
            mask = torch.ones_like(mask)
        loss = self.policy.bc_loss(batch.obs, action, mask, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        metrics = {"loss/bc": loss.detach()}
        if self.config.grad_clip:
            metrics["grad/norm"] = nn.utils.clip_grad_norm_(self.trained, self.config.grad_clip).detach()
        self.optimizer.step()
        self.updates += 1
        metrics["lr"] = torch.tensor(rate)
        if self.config.ema:
            self._average()
        return metrics

    def export_policy(self) -> Policy:
        """The averaged policy, or the trained one without averaging."""
        return self.ema if self.config.ema else self.policy

    @torch.no_grad()
    def _average(self) -> None:
        # A young average must not remember the initial weights: the decay grows as (1 + n) / (10 + n).
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.ema.parameters(), self.policy.parameters(), strict=True)
        for average, parameter in pairs:
            average.lerp_(parameter, 1 - decay)


def learning_rate(update: int, config: BCConfig) -> float:
    """Learning rate of update `update` (from 0): linear warm-up, half cosine to 0 at `decay_steps`."""
    rate = config.lr * min(1.0, (update + 1) / max(1, config.warmup))
    if config.decay_steps:
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, update / config.decay_steps)))
    return rate


def chunk_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Actions (B, H, A) and their mask (B, H); a single action (B, A) is a chunk of one."""
    action = batch.action if batch.action.dim() == 3 else batch.action.unsqueeze(1)
    if batch.chunk_mask is not None:
        return action, batch.chunk_mask
    return action, torch.ones(action.shape[:2], dtype=torch.bool, device=action.device)


def averaged_copy(policy: Policy) -> Any:
    """Frozen copy of `policy` that shares its normaliser, so that later fits reach both."""
    twin = copy.deepcopy(policy).requires_grad_(False).eval()
    twin.normaliser = policy.normaliser
    return twin
