# SPDX-License-Identifier: Apache-2.0
"""A residual policy with Gaussian noise on its correction: what on-policy algorithms train."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.policies.base import Policy
from robopost.policies.gaussian import HALF_LOG_2PI, normal_log_density
from robopost.policies.residual import ResidualConfig, ResidualPolicy
from robopost.registry import POLICIES


@dataclass
class ResidualGaussianConfig(ResidualConfig):
    """Config of `residual_gaussian`."""

    name: str = "residual_gaussian"
    log_std_init: float = -2.0  # of the noise on the correction, normalised action units
    log_std_min: float = -5.0
    log_std_max: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_std_min <= self.log_std_init <= self.log_std_max:
            raise ConfigError(
                f"policy.log_std_init={self.log_std_init} must lie in policy.log_std_min={self.log_std_min}.."
                f"policy.log_std_max={self.log_std_max}"
            )


@POLICIES.register("residual_gaussian", config=ResidualGaussianConfig)
class ResidualGaussian(ResidualPolicy):
    """Frozen base policy plus N(correction, std^2), one learned std per action dimension.

    `chain` (B, 1, 1, A) is what was added to the base action before clipping, in normalised units; `log_prob` is its
    log-density. Deterministic actions are those of a `residual` policy.
    """

    registry_name = "residual_gaussian"
    has_log_prob = True

    def __init__(self, config: ResidualGaussianConfig, spec: Spec, base: Policy | None = None) -> None:
        super().__init__(config, spec, base)
        self.bounds = (config.log_std_min, config.log_std_max)
        self.log_std = nn.Parameter(torch.full((spec.action_dim,), float(config.log_std_init)))

    def draw(
        self, encoded: Obs, generator: torch.Generator | None, deterministic: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `ResidualPolicy.draw`."""
        mean, log_std = self.correction(encoded), self.log_std.clamp(*self.bounds)
        change = mean
        if not deterministic:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            change = mean + log_std.exp() * noise
        return change, normal_log_density(change, mean, log_std).sum(-1), change[:, None, None]

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-density (B,) of `chain` (B, 1, 1, A), what is added to the base action before clipping."""
        mean = self.correction(self.encode(obs))
        return normal_log_density(chain[:, -1, 0], mean, self.log_std.clamp(*self.bounds)).sum(-1)

    def entropy(self, obs: Obs) -> Tensor:
        """Entropy (B,) of the noise, in nats; the same everywhere."""
        rows = next(iter(obs.values())).shape[0]
        return (self.log_std.clamp(*self.bounds) + 0.5 + HALF_LOG_2PI).sum().expand(rows)
