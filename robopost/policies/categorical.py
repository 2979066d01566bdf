# SPDX-License-Identifier: Apache-2.0
"""Categorical MLP policy for environments with discrete actions."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.mlp import MLP
from robopost.policies.base import Policy
from robopost.registry import POLICIES


@dataclass
class CategoricalConfig(EncodedConfig):
    """Config of `Categorical`."""

    name: str = "categorical"
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    activation: str = "tanh"
    layernorm: bool = False
    init: str = "orthogonal"  # default | orthogonal (last layer's gain 0.01: nearly uniform at first)


@POLICIES.register("categorical", config=CategoricalConfig)
class Categorical(Policy):
    """Softmax over the `Spec.choices` actions of an environment, one step at a time.

    `chain` (B, 1, 1, 1) is the index of the chosen action as a float; the mode is the likeliest action.
    """

    registry_name = "categorical"
    has_log_prob = True
    discrete = True

    def __init__(self, config: CategoricalConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        if self.horizon != 1:
            raise ConfigError(
                f"policy=categorical chooses single actions: policy.horizon={self.horizon} must be 1"
            )
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.net = MLP(
            self.encoder.out_dim,
            config.hidden,
            spec.choices,
            config.activation,
            layernorm=config.layernorm,
            init=config.init,
            out_gain=0.01,
        )
        self.config: CategoricalConfig = config

    def distribution(self, obs: Obs) -> tuple[Tensor]:
        """Log-probabilities ((B, choices),) for normalised observations."""
        return self.head(self.net(self.encoder(obs)))

    def head(self, out: Tensor) -> tuple[Tensor]:
        """Output of `net` to log-probabilities ((B, choices),)."""
        return (out.log_softmax(-1),)

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One action per observation; the likeliest when `deterministic`."""
        (log_probs,) = self.distribution(obs)
        if deterministic:
            index = log_probs.argmax(-1, keepdim=True)
        else:
            index = torch.multinomial(log_probs.exp(), 1, generator=generator)
        choice = index.to(log_probs.dtype).unsqueeze(-1)
        return self.normaliser.action(choice), log_probs.gather(-1, index).squeeze(-1), choice.unsqueeze(1)

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-probability (B,) of `chain` (B, 1, 1, 1), action indices."""
        return self.chain_log_prob(chain, *self.distribution(obs))

    def chain_log_prob(self, chain: Tensor, log_probs: Tensor) -> Tensor:
        """Log-probability (B,) of `chain` under an evaluated `distribution`."""
        return log_probs.gather(-1, chain.flatten(1).long()).squeeze(-1)

    @staticmethod
    def divergence(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
        """KL(first || second) (B,) in nats between evaluated `distribution`s."""
        return (first[0].exp() * (first[0] - second[0])).sum(-1)

    def entropy(self, obs: Obs) -> Tensor:
        """Entropy (B,) in nats."""
        (log_probs,) = self.distribution(obs)
        return -(log_probs.exp() * log_probs).sum(-1)
