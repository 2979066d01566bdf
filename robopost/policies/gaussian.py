# SPDX-License-Identifier: Apache-2.0
"""Gaussian MLP policy: tanh-squashed with state-dependent std (SAC), or with a constant std (PPO, IQL)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.masked import masked_mean
from robopost.nets.mlp import MLP
from robopost.policies.base import Policy
from robopost.registry import POLICIES

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
STD_MAPS = ("tanh", "clamp")
ATANH_LIMIT = 1 - 1e-6  # demonstrated actions on the bound have no finite pre-image under tanh


@dataclass
class GaussianConfig(EncodedConfig):
    """Config of `Gaussian`."""

    name: str = "gaussian"
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    activation: str = "relu"
    layernorm: bool = False
    init: str = "default"  # default | orthogonal (last layer's gain 0.01)
    squash: bool = True  # tanh of the sample, with the exact change of variables in log_prob
    mean_tanh: bool = False  # tanh of the mean; only without squash
    state_std: bool = True  # std from the observation; off = one learned value per action dimension
    std_map: str = "tanh"  # of state_std's output: tanh = smoothly into the bounds, clamp = plus log_std_init
    log_std_init: float = 0.0  # without state_std, or with std_map=clamp
    log_std_min: float = -5.0
    log_std_max: float = 2.0

    def __post_init__(self) -> None:
        if not self.log_std_min < self.log_std_max:
            raise ConfigError(
                f"policy.log_std_min={self.log_std_min} must be below policy.log_std_max={self.log_std_max}"
            )
        if self.std_map not in STD_MAPS:
            raise unknown("policy.std_map", self.std_map, STD_MAPS)
        if self.squash and self.mean_tanh:
            raise ConfigError(
                "policy.mean_tanh=true needs policy.squash=false: the sample is squashed already"
            )


@POLICIES.register("gaussian", config=GaussianConfig)
class Gaussian(Policy):
    """Diagonal Gaussian over chunks with an exact log-probability.

    `chain` (B, 1, H, A) is the Gaussian sample before tanh or clipping; `log_prob` is the log-density of the
    squashed chunk tanh(chain) (Haarnoja et al. 2018, SAC, appendix C, eq. 26), or of the sample itself
    without squashing.
    """

    registry_name = "gaussian"
    has_log_prob = True

    def __init__(self, config: GaussianConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.size = self.horizon * spec.action_dim
        self.net = MLP(
            self.input_dim(),
            config.hidden,
            self.size * (2 if config.state_std else 1),
            config.activation,
            layernorm=config.layernorm,
            init=config.init,
            out_gain=0.01,
        )
        if not config.state_std:
            self.log_std = nn.Parameter(torch.full((self.size,), float(config.log_std_init)))
        self.config: GaussianConfig = config

    def input_dim(self) -> int:
        """Inputs of `net`: the encoded observation."""
        return self.encoder.out_dim

    def distribution(self, obs: Obs, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-std (B, H, A) of the Gaussian before squashing, for normalised observations.

        A state-dependent log-std is mapped smoothly into its bounds by tanh, or clamped as a constant one is.
        """
        return self.head(self.output(obs, augment))

    def output(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Output of `net`, what `head` takes."""
        return self.net(self.encoder(obs, augment))

    @property
    def constant_std(self) -> bool:
        """One learned std for all states and no squashing: losses have closed forms, see `constant_head`."""
        return not (self.config.state_std or self.config.squash)

    def constant_head(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """`head` where `constant_std`, flat: mean (B, H * A) and log-std (H * A,)."""
        log_std = self.log_std.clamp(self.config.log_std_min, self.config.log_std_max)
        return out.tanh() if self.config.mean_tanh else out, log_std

    def head(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Output of `net` to mean and log-std (B, H, A)."""
        cfg = self.config
        if cfg.state_std:
            mean, raw = out.chunk(2, dim=-1)
            if cfg.std_map == "tanh":
                log_std = cfg.log_std_min + 0.5 * (cfg.log_std_max - cfg.log_std_min) * (raw.tanh() + 1)
            else:
                log_std = (raw + cfg.log_std_init).clamp(cfg.log_std_min, cfg.log_std_max)
        else:
            mean, log_std = out, self.log_std.clamp(cfg.log_std_min, cfg.log_std_max).expand_as(out)
        if cfg.mean_tanh:
            mean = mean.tanh()
        shape = (self.horizon, self.spec.action_dim)
        return torch.unflatten(mean, -1, shape), torch.unflatten(log_std, -1, shape)

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Reparameterised sample (gradients flow into mean and std); the mean when `deterministic`."""
        mean, log_std = self.distribution(obs)
        if deterministic:
            pre, noise = mean, torch.zeros_like(mean)
        else:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            pre = torch.addcmul(mean, log_std.exp(), noise)
        chunk = pre.tanh() if self.config.squash else pre
        return chunk, self._sample_density(pre, noise, log_std).sum((1, 2)), pre.unsqueeze(1)

    def draw(self, mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised samples from one evaluation of `distribution`, several per observation.

        Args:
            mean: (B, 1, A), of single actions.
            log_std: (B, 1, A).
            noise: (B, n, A) standard normal.

        Returns:
            (actions (B, n, A), their log-densities (B, n)).
        """
        pre = mean + log_std.exp() * noise
        return pre.tanh() if self.config.squash else pre, self._sample_density(pre, noise, log_std).sum(-1)

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-density (B,) of `chain` (B, 1, H, A), the sample before tanh."""
        return self.chain_log_prob(chain, *self.distribution(obs))

    def chain_log_prob(self, chain: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Log-density (B,) of `chain` (B, 1, H, A) under an evaluated `distribution`."""
        return self._density(chain[:, -1], mean, log_std).sum((1, 2))

    @staticmethod
    def divergence(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> Tensor:
        """KL(first || second) (B,) in nats between evaluated `distribution`s; squashing doesn't change it."""
        return gaussian_kl(*first, *second).sum((1, 2))

    def action_log_prob(self, obs: Obs, chunk: Tensor) -> Tensor:
        """Log-density (B,) of a normalised chunk (B, H, A), e.g. of the dataset's actions."""
        return self.chunk_log_prob(chunk, *self.distribution(obs))

    def chunk_log_prob(self, chunk: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Log-density (B,) of a normalised chunk under an evaluated `distribution`; all (B, H, A)."""
        return self._density(self._pre(chunk), mean, log_std).sum((1, 2))

    def entropy(self, obs: Obs) -> Tensor:
        """Entropy (B,) of the Gaussian before squashing, in nats."""
        _, log_std = self.distribution(obs)
        return (log_std + 0.5 + HALF_LOG_2PI).sum((1, 2))

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Negative log-likelihood per unpadded action dimension."""
        return -masked_mean(self._density(self._pre(chunk), *self.distribution(obs, generator)), mask)

    def _pre(self, chunk: Tensor) -> Tensor:
        return chunk.clamp(-ATANH_LIMIT, ATANH_LIMIT).atanh() if self.config.squash else chunk

    def _density(self, pre: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
        """Log-density (B, H, A) per dimension of `pre` and, when squashing, of its tanh."""
        density = tanh_normal_log_density if self.config.squash else normal_log_density
        return density(pre, mean, log_std)

    def _sample_density(self, pre: Tensor, noise: Tensor, log_std: Tensor) -> Tensor:
        """`_density` of `pre` = mean + std * noise."""
        density = standard_log_density(noise, log_std)
        return density - tanh_log_slope(pre) if self.config.squash else density


def normal_log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a Gaussian, elementwise."""
    return standard_log_density((x - mean) * (-log_std).exp(), log_std)


def standard_log_density(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of mean + std * noise, elementwise, whatever the mean."""
    return torch.addcmul(-log_std - HALF_LOG_2PI, noise, noise, value=-0.5)


def gaussian_kl(mean: Tensor, log_std: Tensor, new_mean: Tensor, new_log_std: Tensor) -> Tensor:
    """KL(N(mean, std) || N(new_mean, new_std)) per dimension, in nats.

    log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2
    """
    spread = ((2 * log_std).exp() + (mean - new_mean).square()) * (-2 * new_log_std).exp()
    return new_log_std - log_std + 0.5 * spread - 0.5


def tanh_normal_log_density(pre: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of tanh(pre) where `pre` is Gaussian, elementwise."""
    return normal_log_density(pre, mean, log_std) - tanh_log_slope(pre)


def tanh_log_slope(pre: Tensor) -> Tensor:
    """log(1 - tanh(x)^2) = 2 (log 2 - x - softplus(-2x)), exact where 1 - tanh^2 underflows."""
    return 2 * (math.log(2) - pre - nn.functional.softplus(-2 * pre))
