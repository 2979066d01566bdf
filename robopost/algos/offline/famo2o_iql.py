# SPDX-License-Identifier: Apache-2.0
"""FamO2O over IQL: a family of policies and a state-adaptive balance (Wang et al. 2023, arXiv 2310.17966).

Reference implementation: github.com/LeapLabTHU/FamO2O, `jax_iql`. V, Q and the target are IQL's to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.offline.iql import IQL, IQLCoreConfig, advantage_weights, weighted_cloning_loss
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam
from robopost.nets.scalar import LogScalar
from robopost.policies.base import Policy
from robopost.policies.family import Family, draw_squashed
from robopost.registry import ALGOS


@dataclass
class FamO2OIQLConfig(IQLCoreConfig):
    """Config of `FamO2OIQL`; the range of coefficients, which replaces IQL's beta, belongs to policy=family."""

    name: str = "famo2o_iql"
    actor_decay_updates: int = 0
    balance_lr: float = 3e-4
    balance_every: int = 1  # updates per update of the balance model and its temperature
    temperature: float = 1.0  # entropy weight eta of the balance model at the start
    temperature_lr: float = 3e-4
    target_entropy: float = -0.5  # nats, of the balance model's tanh-Gaussian on (-1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_balance(self)
        if not self.temperature > 0:
            raise ConfigError(f"algo.temperature={self.temperature} must be above 0")
        if not self.temperature_lr > 0:
            raise ConfigError(f"algo.temperature_lr={self.temperature_lr} must be above 0")
        if not self.target_entropy < math.log(2):
            raise ConfigError(
                f"algo.target_entropy={self.target_entropy} must be below log 2 = 0.69, that of a uniform on (-1, 1)"
            )


def check_balance(config: Any) -> None:
    """Raise ConfigError for settings of the balance model out of range."""
    if not config.balance_lr > 0:
        raise ConfigError(f"algo.balance_lr={config.balance_lr} must be above 0")
    if config.balance_every < 1:
        raise ConfigError(f"algo.balance_every={config.balance_every} must be 1 (every update) or more")


def as_family(policy: Policy, name: str) -> Family:
    """The policy as a `Family`; ConfigError where it is of another class."""
    if not isinstance(policy, Family):
        raise ConfigError(
            f"algo={name} trains a family of policies, policy={policy.registry_name} is one. Fix: policy=family"
        )
    return policy


def balance_loss(log_prob: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
    """E[eta log pi_b(c~|s) - min_i Q'_i(s, a_c)], a_c ~ pi_u(.|s, e(c)) (Wang et al. 2023, section 4.2; code).

    Args:
        log_prob: (B,) log-density of c~ in (-1, 1), before it is rescaled to c.
        q: (E, B) target critics at the reparameterised a_c.
        temperature: eta, a scalar without gradient.
    """
    return (temperature * log_prob - q.amin(0)).mean()


def balance_temperature_loss(temperature: Tensor, entropy: Tensor, target_entropy: float) -> Tensor:
    """Return eta (H - H*): eta falls while the balance model's entropy H (no gradient) is above the target."""
    return temperature * (entropy.detach() - target_entropy)


@ALGOS.register("famo2o_iql", config=FamO2OIQLConfig)
class FamO2OIQL(IQL):
    """FamO2O over IQL: one policy for every balance of improvement and imitation, chosen per state."""

    registry_name = "famo2o_iql"
    steps = ("train_step", "balanced_step")

    def __init__(
        self,
        config: FamO2OIQLConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        family = as_family(policy, self.registry_name)
        super().__init__(config, family, spec, device=device, generator=generator)
        self.policy: Family = family
        self.config: FamO2OIQLConfig = config
        self.temperature = LogScalar(math.log(config.temperature)).to(device)
        self._balance_flat, self._temperature_flat = Flat(family.balance), Flat(self.temperature)
        self.balance_optimizer = adam(self._balance_flat, config.balance_lr)
        self.temperature_optimizer = adam(self._temperature_flat, config.temperature_lr)

    def actor_module(self) -> nn.Module:
        """The universal policy."""
        return as_family(self.policy, self.registry_name).universal_parameters()

    def next_step(self) -> Callable[[Batch], Metrics]:
        """Every `balance_every`-th update trains the balance model too."""
        return self.train_step if self.updates % self.config.balance_every else self.balanced_step

    def train_step(self, batch: Batch) -> Metrics:
        """The update without the balance model's; a pure function of the batch and the phase."""
        return self._train(batch, self._universal_step)

    def balanced_step(self, batch: Batch) -> Metrics:
        """The update with the balance model's."""
        return self._train(batch, self._family_step)

    def _family_step(self, batch: Batch, advantage: Tensor) -> Metrics:
        """One update of pi_b, its temperature and pi_u, all from the networks as they were before it."""
        family, cfg = self.policy, self.config
        features = family.features(batch.obs)
        fixed = features.detach()
        # All noise first, and c before the step that changes pi_b, its source in the online phase.
        coefficient = self.draw_coefficient(fixed)
        noise, action_noise = self._noise(batch.reward), self._noise(batch.action)

        mean, log_std = family.balance(fixed)
        squashed, log_prob = draw_squashed(mean, log_std, noise)
        chosen = family.rescale(squashed)
        action, _ = family.draw(*family.member(fixed, chosen, frozen=True), action_noise[:, None])
        q = self.critic_target.frozen(batch.obs, action[:, 0])
        loss = balance_loss(log_prob, q, self.temperature().detach())
        entropy = -log_prob.detach().mean()
        self._balance_flat.backward(loss)
        # A graph of its own: a compiled one can't be walked twice.
        temperature = self.temperature()
        temperature_loss = balance_temperature_loss(temperature, entropy, cfg.target_entropy)
        self._temperature_flat.backward(temperature_loss)
        self.balance_optimizer.step()
        self.temperature_optimizer.step()
        return self._clone(batch, features, coefficient, advantage) | {
            "loss/balance": loss.detach(),
            "loss/temperature": temperature_loss.detach(),
            "policy/temperature": temperature.detach(),
            "policy/balance_entropy": entropy,
            "policy/coefficient_mean": chosen.detach().mean(),
            "policy/coefficient_std": chosen.detach().std(),
        }

    def _universal_step(self, batch: Batch, advantage: Tensor) -> Metrics:
        """One update of pi_u alone."""
        features = self.policy.features(batch.obs)
        return self._clone(batch, features, self.draw_coefficient(features.detach()), advantage)

    def draw_coefficient(self, features: Tensor) -> Tensor:
        """Coefficients (B,) pi_u is trained at: U(lo, hi) in the offline phase, samples of pi_b online; no gradient.

        Args:
            features: (B, D).
        """
        if not self.online:
            return self.policy.uniform_coefficient(len(features), self.generator)
        noise = self._noise(features[:, 0])
        with torch.no_grad():
            mean, log_std = self.policy.balance(features)
            return self.policy.rescale(draw_squashed(mean, log_std, noise)[0])

    def _clone(self, batch: Batch, features: Tensor, coefficient: Tensor, advantage: Tensor) -> Metrics:
        """IQL's policy update with beta = c, of the member with the same c."""
        limit = self.config.max_weight
        weights = advantage_weights(advantage, coefficient, limit)
        out = self.policy.member_output(features, coefficient)
        if self.policy.constant_std:
            loss = self.clone_gaussian(weights, batch.action, out)
        else:
            log_prob = self.policy.chunk_log_prob(batch.action[:, None], *self.policy.head(out))
            loss = weighted_cloning_loss(weights, log_prob)
            self._actor_flat.backward(loss)
        self.actor_optimizer.step()
        return {
            "loss/actor": loss.detach(),
            "policy/weight_mean": weights.mean(),
            "policy/weight_clipped": (weights >= limit).float().mean(),
            "value/advantage_mean": advantage.mean(),
        }

    def _noise(self, like: Tensor) -> Tensor:
        """Standard normal of the shape of `like`: every call is a stretch of the stream of its own."""
        return torch.randn(like.shape, generator=self.generator, device=self.device)
