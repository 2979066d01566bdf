# SPDX-License-Identifier: Apache-2.0
"""Behaviour cloning of any policy class: the policy brings its own loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.flat import adam, flat_of, frozen_copy, set_lr
from robopost.policies.base import Policy
from robopost.registry import ALGOS, POLICIES

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
    steps = ("fit",)
    sharded_by = ("bc_loss",)

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
        if type(policy).bc_loss is Policy.bc_loss:
            able = [
                item.name
                for item in POLICIES
                if getattr(item.target, "bc_loss", None) not in (None, Policy.bc_loss)
            ]
            raise ConfigError(
                f"algo={config.name} can't train policy={policy.registry_name}, which has no loss on demonstrations. "
                f"Policies that have one: {', '.join(able)}"
            )
        self._flat = flat_of(policy)
        self.optimizer = adam(
            self._flat,
            config.lr,
            scheduled=True,
            weight_decay=config.weight_decay,
            decoupled_weight_decay=True,
        )
        if config.ema:
            self.ema, self._ema_flat = frozen_copy(policy)
            self.ema.eval()
            # Shared, so that a later fit of the normaliser reaches both.
            self.ema.normaliser = policy.normaliser

    @property
    def needs(self) -> Needs:
        """Chunks of the policy's horizon."""
        return Needs(chunks=True, batch_size=self.config.batch_size)

    def update(self, batch: Batch) -> Metrics:
        """One gradient step on `obs` (B, ...), `action` (B, H, A) and `chunk_mask` (B, H) of the batch."""
        rate = learning_rate(self.updates, self.config)
        set_lr(self.optimizer, rate)
        action, mask = chunk_of(batch)
        if self.config.padding == "hold":
            # Batches repeat the last action behind the end: right to learn where actions are position targets.
            mask = torch.ones_like(mask)
        metrics = self.fit(batch.obs, action, mask)
        self.updates += 1
        if self.config.ema:
            # A young average must not remember the initial weights: the decay grows as (1 + n) / (10 + n).
            decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
            self._ema_flat.lerp(self._flat, 1 - decay)
        return metrics | {"lr": torch.full((), rate, device=self.device)}

    def fit(self, obs: Obs, chunk: Tensor, mask: Tensor) -> Metrics:
        """One step of AdamW on the policy's cloning loss; a pure function of tensors."""
        means = {"loss/bc": self.policy.bc_loss(obs, chunk, mask, self.generator)}
        loss = self._flat.share(means, mask)["loss/bc"]
        self._flat.backward(loss)
        norm = self._flat.clip(self.config.grad_clip or math.inf)
        self.optimizer.step()
        return {"loss/bc": loss.detach(), "grad/norm": norm}

    def export_policy(self) -> Policy:
        """The averaged policy, or the trained one without averaging."""
        return self.ema if self.config.ema else self.policy


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
