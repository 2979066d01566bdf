# SPDX-License-Identifier: Apache-2.0
"""One Gaussian policy per step of an episode, all in stacked weights (finite-horizon tasks, HNPG)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.config import PolicyConfig
from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.ensemble import EnsembleLinear, EnsembleMLP
from robopost.nets.mlp import ACTIVATIONS, build_activation
from robopost.nets.rows import scale_head
from robopost.nets.value import ObsConcat
from robopost.policies.base import EPISODE_STEP, Policy
from robopost.policies.gaussian import HALF_LOG_2PI, normal_log_density
from robopost.registry import POLICIES


@dataclass
class StepwiseConfig(PolicyConfig):
    """Config of `Stepwise`."""

    name: str = "stepwise"
    steps: int = 0  # steps of an episode, 0 = the environment's time limit
    hidden: list[int] = field(default_factory=lambda: [16, 16])
    activation: str = "tanh"
    log_std_init: float = 0.0
    head_scale: float = 0.1  # initial weights of the mean's layer are multiplied by it, its bias starts at 0
    normalise_obs: str = "identity"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ConfigError(f"policy.steps={self.steps} must be 0 (the environment's time limit) or more")
        if self.horizon != 1 or self.history != 1:
            raise ConfigError(
                f"policy.horizon={self.horizon} and policy.history={self.history} must be 1 with policy=stepwise"
            )


@POLICIES.register("stepwise", config=StepwiseConfig)
class Stepwise(Policy):
    """pi_h(a|s) = N(mu_h(s), diag sigma_h^2) for h = 0 .. H-1, chosen by the step within the episode.

    `chain` (B, 1, 1, A) is the sample before it is clipped to the bounds, `log_prob` its log-density. Weights are
    stacked: (H, in, out). Acting gathers those of each row's step, training evaluates all steps at once (`heads`).
    """

    registry_name = "stepwise"
    has_log_prob = True
    reads_step = True

    def __init__(self, config: StepwiseConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: StepwiseConfig = config
        if config.steps and spec.max_steps and config.steps != spec.max_steps:
            raise ConfigError(
                f"policy.steps={config.steps}, episodes have {spec.max_steps} steps. Fix: policy.steps=0 takes theirs"
            )
        self.steps = config.steps or spec.max_steps
        if self.steps < 1:
            raise ConfigError(
                "policy=stepwise has one policy per step and the task names no time limit. "
                "Fix: policy.steps=<steps of an episode>, or policy=gaussian"
            )
        if config.activation not in ACTIVATIONS:
            build_activation(config.activation)  # says what there is
        self.join = ObsConcat(spec, self.obs_keys)
        self.net = EnsembleMLP(self.steps, self.join.dim, config.hidden, spec.action_dim, config.activation)
        scale_head(self.net, config.head_scale)
        self.log_std = nn.Parameter(torch.full((self.steps, 1, spec.action_dim), float(config.log_std_init)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Every step's policy on its own rows: x (H, B, D) to mean (H, B, A) and log-std (H, 1, A)."""
        return self.net(x), self.log_std

    def distribution(self, obs: Obs) -> tuple[Tensor, Tensor]:
        """Mean and log-std (B, 1, A) for normalised observations, which carry the step (B,) under EPISODE_STEP.

        Raises:
            ConfigError: no step, or one beyond the policy's last.
        """
        step = obs.get(EPISODE_STEP)
        if step is None:
            raise ConfigError(
                "policy=stepwise needs the step within the episode, and nothing tells it. "
                "Fix: act through robopost.policies.chunked.StepPolicy"
            )
        if step.device.type == "cpu" and int(step.max()) >= self.steps:
            raise ConfigError(
                f"the episode is at step {int(step.max())}, policy=stepwise was made for {self.steps} steps. "
                f"Fix: an environment of {self.steps} steps"
            )
        hidden = self.join({key: obs[key] for key in self.join.keys}).unsqueeze(1)
        for layer in self.net:
            if isinstance(layer, EnsembleLinear):
                hidden = torch.baddbmm(layer.bias[step], hidden, layer.weight[step])
            else:
                hidden = layer(hidden)
        return hidden, self.log_std[step]

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `Policy.sample`; the mean when `deterministic`."""
        mean, log_std = self.distribution(obs)
        chunk = mean
        if not deterministic:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            chunk = mean + log_std.exp() * noise
        return chunk, normal_log_density(chunk, mean, log_std).sum((1, 2)), chunk.unsqueeze(1)

    def log_prob(self, obs: Obs, chain: Tensor) -> Tensor:
        """Log-density (B,) of `chain` (B, 1, 1, A)."""
        return normal_log_density(chain[:, -1], *self.distribution(obs)).sum((1, 2))

    def entropy(self, obs: Obs) -> Tensor:
        """Entropy (B,) in nats."""
        return (self.log_std[obs[EPISODE_STEP]] + 0.5 + HALF_LOG_2PI).sum((1, 2))
