# SPDX-License-Identifier: Apache-2.0
"""Policies that write an action chunk as tokens: every action dimension of every step is one of 256 bins."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopost.config import PolicyConfig
from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.mlp import MLP
from robopost.policies.base import Policy
from robopost.registry import POLICIES


@dataclass
class TokenConfig(PolicyConfig):
    """Config that all token policies share."""

    horizon: int = 8
    bins: int = 256  # outcomes of a slot
    temperature: float = (
        1.0  # of sampling and of every log-probability; the greedy chunk does not depend on it
    )
    label_smoothing: float = 0.0  # of behaviour cloning

    def check(self) -> None:
        """Raise ConfigError where a value is out of range."""
        if self.bins < 2:
            raise ConfigError(f"policy.bins={self.bins} must be at least 2")
        if not self.temperature > 0:
            raise ConfigError(f"policy.temperature={self.temperature} must be above 0")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"policy.label_smoothing={self.label_smoothing} must lie in [0, 1)")


class TokenPolicy(Policy):
    """A policy over H x A slots of `bins` outcomes each: bins of [-1, 1], the range of normalised actions.

    Bins are OpenVLA's: `bins` edges evenly over [-1, 1], of which the last two share a centre (Kim et al. 2024,
    section 3.2 and its released tokenizer). A subclass gives the logits of every slot. In a parallel one slots are
    independent given the observation; in an `autoregressive` one a slot also sees the tokens before it.

    `chain` (B, 1, H, A) holds the sampled bins as integers (int64).
    """

    has_log_prob = True
    config: TokenConfig

    def __init__(self, config: TokenConfig, spec: Spec) -> None:
        config.check()
        super().__init__(config, spec)
        self.bins, self.temperature = config.bins, config.temperature
        edges = torch.linspace(-1.0, 1.0, config.bins)
        centres = (edges[:-1] + edges[1:]) / 2
        self.register_buffer("edges", edges, persistent=False)
        self.register_buffer("centres", torch.cat([centres, centres[-1:]]), persistent=False)
        self.edges: Tensor
        self.centres: Tensor

    @property
    def autoregressive(self) -> bool:
        """True where a slot's logits depend on the tokens of earlier slots."""
        return False

    @abstractmethod
    def logits(self, obs: Obs, tokens: Tensor | None = None) -> Tensor:
        """Logits (B, H, A, bins) of all slots in float32, for normalised observations.

        Args:
            obs: normalised observations.
            tokens: (B, H, A) int64, what earlier slots hold in an autoregressive policy; a parallel one ignores them.
        """

    def encode(self, chunk: Tensor) -> Tensor:
        """Normalised actions (..., A) to bins (..., A) int64, clipped to [-1, 1]."""
        return torch.bucketize(chunk.clamp(-1.0, 1.0), self.edges, right=True) - 1

    def decode(self, tokens: Tensor) -> Tensor:
        """Bins to the normalised actions of their centres."""
        return self.centres[tokens]

    def log_probs(self, obs: Obs, tokens: Tensor | None = None) -> Tensor:
        """Log-probabilities (B, H, A, bins) of all outcomes at the policy's temperature."""
        return (self.logits(obs, tokens) / self.temperature).log_softmax(-1)

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One chunk per observation: the likeliest tokens when `deterministic`."""
        log_probs = self.log_probs(obs)
        tokens = choose(log_probs, generator, deterministic)
        return self.decode(tokens), taken(log_probs, tokens).sum((-1, -2)), tokens.unsqueeze(1)

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-probability (B,) of the bins `chain` (B, 1, H, A)."""
        tokens = chain.squeeze(1)
        return taken(self.log_probs(obs, tokens), tokens).sum((-1, -2))

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Cross-entropy of the demonstrated bins at temperature 1, a mean over the slots of valid steps."""
        tokens = self.encode(chunk)
        logits = self.logits(obs, tokens)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2),
            tokens.flatten(),
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        weight = mask.unsqueeze(-1).expand_as(tokens).flatten().to(loss.dtype)
        return (loss * weight).sum() / weight.sum().clamp_min(1.0)


@dataclass
class TokenMLPConfig(EncodedConfig, TokenConfig):
    """Config of `TokenMLP`."""

    name: str = "token"
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    activation: str = "gelu"
    layernorm: bool = False


@POLICIES.register("token", config=TokenMLPConfig)
class TokenMLP(TokenPolicy):
    """The smallest token policy: an MLP from encoded observations to the logits of all slots at once."""

    registry_name = "token"

    def __init__(self, config: TokenMLPConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.slots = (self.horizon, spec.action_dim, config.bins)
        out = self.horizon * spec.action_dim * config.bins
        self.net = MLP(
            self.encoder.out_dim, config.hidden, out, config.activation, layernorm=config.layernorm
        )

    def logits(self, obs: Obs, tokens: Tensor | None = None) -> Tensor:
        """Logits (B, H, A, bins)."""
        return self.net(self.encoder(obs)).unflatten(-1, self.slots)


def choose(log_probs: Tensor, generator: torch.Generator | None, deterministic: bool) -> Tensor:
    """An index (...) per distribution `log_probs` (..., bins): drawn, or the likeliest."""
    if deterministic:
        return log_probs.argmax(-1)
    flat = log_probs.flatten(0, -2).exp()
    return torch.multinomial(flat, 1, generator=generator).view(log_probs.shape[:-1])


def taken(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (...) of `tokens` (...) under `log_probs` (..., bins)."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
