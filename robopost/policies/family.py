# SPDX-License-Identifier: Apache-2.0
"""A family of Gaussian policies and the model that picks a member per state (FamO2O, Wang et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.mlp import MLP
from robopost.policies.gaussian import Gaussian, GaussianConfig, tanh_normal_log_density
from robopost.registry import POLICIES

BALANCE_LOG_STD = (-10.0, 2.0)  # bounds, as in the reference code


@dataclass
class FamilyConfig(GaussianConfig):
    """Config of `Family`; the inherited settings are the universal policy's."""

    name: str = "family"
    squash: bool = False
    mean_tanh: bool = True
    state_std: bool = False
    init: str = "orthogonal"
    coefficient_low: float = 1.0  # range of the balance coefficient c
    coefficient_high: float = 5.0
    encoding_dim: int = 6  # length d of e(c), even
    encoding_base: float = 10_000.0  # n of e(c)
    balance_hidden: list[int] = field(default_factory=lambda: [256, 256])
    balance_state_std: bool = False  # std of the balance model from the observation; off = one learned value
    balance_log_std_init: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.coefficient_low, self.coefficient_high
        if not 0 <= low <= high < math.inf:
            raise ConfigError(
                f"policy.coefficient_low={low} and policy.coefficient_high={high} must satisfy 0 <= low <= high: "
                "a negative coefficient would minimise Q"
            )
        if self.encoding_dim < 2 or self.encoding_dim % 2:
            raise ConfigError(f"policy.encoding_dim={self.encoding_dim} must be even and at least 2")
        if not self.encoding_base > 1:
            raise ConfigError(f"policy.encoding_base={self.encoding_base} must be above 1")


def frequencies(dim: int = 6, base: float = 10_000.0) -> Tensor:
    """n^(-2i/d) for i = 0 .. d/2 - 1, with n = `base` and d = `dim`: (d/2,)."""
    return base ** (-torch.arange(0, dim, 2) / dim)


def encode(coefficient: Tensor, rates: Tensor) -> Tensor:
    """Sinusoids e(c) = [sin(c / n^(2i/d)), cos(c / n^(2i/d))], interleaved: (...) to (..., d).

    Args:
        coefficient: c.
        rates: (d/2,) see `frequencies`.
    """
    angle = coefficient[..., None] * rates
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def rescale(squashed: Tensor, low: float, high: float) -> Tensor:
    """Map c~ in [-1, 1] to c = lo + (c~ + 1) / 2 (hi - lo): the output of tanh covers the range exactly."""
    return low + (squashed + 1) * (0.5 * (high - low))


@POLICIES.register("family", config=FamilyConfig)
class Family(Gaussian):
    """Universal policy pi_u(a | s, e(c)) and balance model pi_b(c | s) in one policy.

    Larger c follows Q more, smaller c imitates more. Acting takes c = mode of pi_b: all that is inherited from
    `Gaussian` (`sample`, `log_prob`, ...) is of that member of the family, c a constant to it. Training of the
    whole family goes through the methods below, which work on `features`.
    """

    registry_name = "family"

    def __init__(self, config: FamilyConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: FamilyConfig = config
        self.balance = Balance(self.encoder.out_dim, config)
        self.rates: Tensor
        self.register_buffer(
            "rates", frequencies(config.encoding_dim, config.encoding_base), persistent=False
        )

    def input_dim(self) -> int:
        """Features of the observation and the encoded coefficient."""
        return self.encoder.out_dim + self.config.encoding_dim

    def universal_parameters(self) -> nn.ParameterList:
        """The parameters of pi_u, encoder included; the rest are `balance`'s."""
        return nn.ParameterList(p for name, p in self.named_parameters() if not name.startswith("balance."))

    def features(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """What both networks see of normalised observations: (B, D)."""
        return self.encoder(obs, augment)

    def member(self, features: Tensor, coefficient: Tensor, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-std (B, H, A) of pi_u(. | s, e(c)) before squashing.

        Args:
            features: (B, D).
            coefficient: (B,) c.
            frozen: compute gradients with respect to the inputs alone, not the network's weights.
        """
        return self.head(self.member_output(features, coefficient, frozen))

    def member_output(self, features: Tensor, coefficient: Tensor, frozen: bool = False) -> Tensor:
        """Output of the member's network, what `head` takes; arguments as `member`."""
        x = torch.cat([features, encode(coefficient, self.rates)], -1)
        return self.net.frozen(x) if frozen else self.net(x)

    def rescale(self, squashed: Tensor) -> Tensor:
        """Output of the balance model in [-1, 1] to a coefficient."""
        return rescale(squashed, self.config.coefficient_low, self.config.coefficient_high)

    def coefficient(self, obs: Obs) -> Tensor:
        """The coefficient (B,) the policy acts with: the mode of pi_b; no gradient."""
        with torch.no_grad():
            return self._mode(self.features(obs))

    def uniform_coefficient(self, rows: int, generator: torch.Generator | None) -> Tensor:
        """Coefficients from U(lo, hi): (rows,)."""
        low, high = self.config.coefficient_low, self.config.coefficient_high
        return low + (high - low) * torch.rand(rows, generator=generator, device=self.device)

    def output(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Output of `net` for the member that acts."""
        features = self.features(obs, augment)
        with torch.no_grad():
            coefficient = self._mode(features)
        return self.member_output(features, coefficient)

    def _mode(self, features: Tensor) -> Tensor:
        return self.rescale(self.balance(features)[0].tanh())


class Balance(nn.Module):
    """pi_b: (B, D) features to mean and log-std (B,) of a Gaussian whose tanh is c~."""

    def __init__(self, in_dim: int, config: FamilyConfig) -> None:
        super().__init__()
        out = 2 if config.balance_state_std else 1
        # A last layer of gain 0.01 starts c near the middle of its range in every state.
        self.net = MLP(in_dim, config.balance_hidden, out, init="orthogonal", out_gain=0.01)
        if not config.balance_state_std:
            self.log_std = nn.Parameter(torch.full((1,), float(config.balance_log_std_init)))
        self.offset = config.balance_log_std_init

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std (B,) before tanh."""
        out = self.net(features)
        mean = out[..., 0]
        log_std = self.log_std.expand_as(mean) if out.shape[-1] == 1 else out[..., 1] + self.offset
        return mean, log_std.clamp(*BALANCE_LOG_STD)


def draw_squashed(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Reparameterised c~ = tanh(mean + std * noise) and its log-density; all (B,).

    The density is that of c~, before `rescale`.
    """
    pre = mean + log_std.exp() * noise
    return pre.tanh(), tanh_normal_log_density(pre, mean, log_std)
