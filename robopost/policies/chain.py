# SPDX-License-Identifier: Apache-2.0
"""What flow and diffusion policies share: a chunk is the end of a chain x_0 .. x_K that starts as Gaussian noise.

Every step has a mean in closed form, so a chain of a policy that adds Gaussian noise to its steps has an exact density.
The sampler and that density evaluate one function, `ChainPolicy.means`: they can't disagree about times.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from robopost.config import PolicyConfig
from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.denoiser import build_denoiser
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.policies.base import Policy


@dataclass
class ChainConfig(PolicyConfig):
    """Config that all policies with a chain share."""

    horizon: int = 16
    normalise_action: str = "minmax"
    steps: int = 10  # steps K of the chain when sampling
    frozen_steps: int = 0  # first steps of the chain that a frozen copy takes, see `freeze_first`


@dataclass
class DenoiserConfig(ChainConfig, EncodedConfig):
    """Config of a chain whose networks are an `ObsEncoder` and one of `robopost.nets.denoiser`."""

    backbone: str = "mlp"  # mlp | unet | transformer
    width: int = 256
    depth: int = 3
    activation: str = "mish"  # of the mlp backbone
    layernorm: bool = True  # in the blocks of the mlp backbone


class Encoder(Protocol):
    """What encodes observations: called with (obs, augment=None), it gives (B, out_dim)."""

    out_dim: int

    def __call__(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Encode normalised observations; images are shifted at random with `augment`."""
        ...


class ChainPolicy(Policy):
    """A policy that carries noise to an action chunk in K steps.

    Subclasses build the networks and give the mean of each step. `frozen_steps` of them, the noisiest, are taken by a
    copy of the encoder and the network that fine-tuning leaves alone.

    Attributes:
        encoder: module from normalised observations to `cond` (B, D), all that `net` sees of them.
        net: module that takes a step.
    """

    config: ChainConfig
    encoder: Encoder

    def __init__(self, config: ChainConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        encoder, self.net = self.build(config)
        self.add_module("encoder", encoder)
        self.clip = chunk_clip(config, spec)
        if not 0 <= config.frozen_steps < config.steps:
            raise ConfigError(
                f"policy.frozen_steps={config.frozen_steps} must lie in 0..{config.steps - 1} (below policy.steps)"
            )
        if config.frozen_steps:
            self._copy_frozen()

    def build(self, config: Any) -> tuple[nn.Module, nn.Module]:
        """The encoder and the network; called once by the constructor, before anything else of the subclass."""
        return self.build_denoiser(config)

    def build_denoiser(self, config: DenoiserConfig, times: int = 1) -> tuple[ObsEncoder, nn.Module]:
        """An `ObsEncoder` and the configured denoiser, which takes `times` scalar times."""
        encoder = ObsEncoder(self.spec, self.obs_keys, self.history, config)
        net = build_denoiser(
            config.backbone,
            self.horizon,
            self.spec.action_dim,
            encoder.out_dim,
            width=config.width,
            depth=config.depth,
            times=times,
            activation=config.activation,
            layernorm=config.layernorm,
        )
        return encoder, net

    def features(self, cond: Tensor) -> Tensor:
        """(B, F) what a small network beside the policy reads of the encoded observations `cond` (B, D)."""
        return cond

    @property
    def feature_dim(self) -> int:
        """Size F of `features`."""
        return self.encoder.out_dim

    @property
    def num_steps(self) -> int:
        """Steps K of the chain."""
        return self.config.steps

    @property
    def frozen_steps(self) -> int:
        """First steps of the chain that the frozen copy takes."""
        return self.config.frozen_steps

    def freeze_first(self, steps: int) -> None:
        """Leave the first `steps` steps to a frozen copy of the networks as they are now; 0 = none.

        Raises:
            ConfigError: nothing is left to fine-tune, or the policy has another number of frozen steps already.
        """
        if not 0 <= steps < self.num_steps:
            raise ConfigError(
                f"{steps} frozen of policy.steps={self.num_steps} leave nothing to fine-tune. "
                f"Fix: fine-tune 1..{self.num_steps} steps"
            )
        if self.frozen_steps not in (0, steps):
            raise ConfigError(
                f"the policy was fine-tuned with its first {self.frozen_steps} of {self.num_steps} steps frozen, now "
                f"{steps} are asked for. Fix: fine-tune {self.num_steps - self.frozen_steps} steps"
            )
        if steps and not self.frozen_steps:
            self.config.frozen_steps = steps
            self._copy_frozen()

    def _copy_frozen(self) -> None:
        parts = nn.ModuleDict({"encoder": cast(nn.Module, self.encoder), "net": self.net})
        self.frozen = copy.deepcopy(parts).requires_grad_(False)

    @abstractmethod
    def means(self, x: Tensor, first: int, cond: Tensor, net: nn.Module | None = None) -> Tensor:
        """Means (B, n, H, A) of x_{k+1} given x_k in `x` (B, n, H, A), for steps k = first .. first + n - 1.

        Args:
            x: one chunk per step.
            first: index of the first step.
            cond: (B, D) encoded observations.
            net: the network to ask, None = the trained one.
        """

    def chain(
        self, obs: Obs, x: Tensor, noise: Tensor | None = None, cond: Tensor | None = None, **options: Any
    ) -> list[Tensor]:
        """[x_0 .. x_K] from `x` = x_0 (B, H, A), with `noise` (B, K, H, A) added to the means.

        `options` go to `means`. The observation is encoded once, or not at all where `cond` (B, D) is what `encoder`
        makes of it; frozen steps take the frozen networks.
        """
        parts = []
        if self.frozen_steps:
            parts.append((self.frozen["encoder"](obs), self.frozen["net"], range(self.frozen_steps)))
        cond = self.encoder(obs) if cond is None else cond
        parts.append((cond, self.net, range(self.frozen_steps, self.num_steps)))
        chain = [x]
        for encoded, net, steps in parts:
            for k in steps:
                x = self.means(x[:, None], k, encoded, net, **options)[:, 0]
                if noise is not None:
                    x = x + noise[:, k]
                chain.append(x)
        return chain

    def start(self, batch: int, generator: torch.Generator | None, deterministic: bool) -> Tensor:
        """x_0 (B, H, A): Gaussian noise, or its mean."""
        shape = (batch, self.horizon, self.spec.action_dim)
        if deterministic:
            return torch.zeros(shape, device=self.device)
        return torch.randn(shape, generator=generator, device=self.device)


def with_frozen(groups: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Prefixes of parameter names by module, and those of the frozen copies of the same modules."""
    return {name: (*items, *(f"frozen.{item}" for item in items)) for name, items in groups.items()}


def chunk_clip(config: PolicyConfig, spec: Spec) -> float:
    """1 where normalised actions lie in [-1, 1] by construction, otherwise infinity."""
    inside = config.normalise_action == "minmax" or (config.normalise_action == "bounds" and spec.bounded)
    return 1.0 if inside else float("inf")
