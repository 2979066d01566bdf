# SPDX-License-Identifier: Apache-2.0
"""Deterministic MLP policy with tanh output."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.masked import masked_mean
from robopost.nets.mlp import MLP
from robopost.policies.base import Policy
from robopost.registry import POLICIES


@dataclass
class DeterministicConfig(EncodedConfig):
    """Config of `Deterministic`."""

    name: str = "deterministic"
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    activation: str = "relu"
    layernorm: bool = False
    squash: bool = True  # tanh output; switch off where normalised actions leave [-1, 1]


@POLICIES.register("deterministic", config=DeterministicConfig)
class Deterministic(Policy):
    """One chunk per observation, no randomness: the actor of TD3 and TD3+BC, plain regression for BC."""

    registry_name = "deterministic"

    def __init__(self, config: DeterministicConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.net = MLP(
            self.encoder.out_dim,
            config.hidden,
            self.horizon * spec.action_dim,
            config.activation,
            layernorm=config.layernorm,
        )
        self.squash = config.squash

    def forward(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Normalised observations to a normalised chunk (B, H, A), differentiable."""
        out = self.net(self.encoder(obs, augment)).unflatten(-1, (self.horizon, self.spec.action_dim))
        return out.tanh() if self.squash else out

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the chunk; `generator` and `deterministic` change nothing."""
        return self(obs), None, None

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Mean squared error over the unpadded actions."""
        return masked_mean((self(obs, generator) - chunk).square(), mask)
