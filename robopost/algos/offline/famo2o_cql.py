# SPDX-License-Identifier: Apache-2.0
"""FamO2O over CQL and over Cal-QL (Wang et al. 2023, arXiv 2310.17966).

Reference implementation: github.com/LeapLabTHU/FamO2O, `jax_cql` (over CQL alone, and with a range of coefficients
that reaches below zero by mistake: not reproduced). The critics are the base algorithm's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.offline.cal_ql import CalQL, CalQLConfig
from robopost.algos.offline.cql import CQL, CQLConfig
from robopost.algos.offline.famo2o_iql import as_family, check_balance
from robopost.data.batch import Batch, Spec
from robopost.nets.flat import Flat, adam
from robopost.policies.base import Policy
from robopost.policies.family import Family, draw_squashed
from robopost.registry import ALGOS


@dataclass
class FamO2OCQLConfig(CQLConfig):
    """Config of `FamO2OCQL`; the range of coefficients belongs to policy=family."""

    name: str = "famo2o_cql"
    balance_lr: float = 3e-4
    balance_every: int = 1  # updates per update of the balance model

    def __post_init__(self) -> None:
        super().__post_init__()
        check_balance(self)


@dataclass
class FamO2OCalQLConfig(CalQLConfig):
    """Config of `FamO2OCalQL`; the range of coefficients belongs to policy=family."""

    name: str = "famo2o_cal_ql"
    balance_lr: float = 3e-4
    balance_every: int = 1  # updates per update of the balance model

    def __post_init__(self) -> None:
        super().__post_init__()
        check_balance(self)


def family_actor_loss(log_prob: Tensor, q: Tensor, temperature: Tensor, coefficient: Tensor) -> Tensor:
    """E[alpha log pi_u(a|s, e(c)) - c min_i Q_i(s, a)] (Wang et al. 2023, section 4.1; code).

    Args:
        log_prob: (B,).
        q: (E, B).
        temperature: alpha, a scalar without gradient.
        coefficient: (B,) the c that `log_prob` and `q` were taken at.
    """
    return (temperature * log_prob - coefficient * q.amin(0)).mean()


def balance_loss(q: Tensor) -> Tensor:
    """-E[min_i Q_i(s, a_c)], without an entropy term (Wang et al. 2023, section 4.2; code); q (E, B)."""
    return -q.amin(0).mean()


class FamO2OOverCQL(CQL):
    """What CQL and Cal-QL get from FamO2O: the coefficients travel with the batch."""

    steps = ("train_step", "balanced_step")
    can_go_online = True

    def __init__(
        self, config: Any, policy: Policy, spec: Spec, *, device: torch.device, generator: torch.Generator
    ) -> None:
        family = as_family(policy, self.registry_name)
        super().__init__(config, family, spec, device=device, generator=generator)
        self.policy: Family = family
        self._balance_flat = Flat(family.balance)
        self.balance_optimizer = adam(self._balance_flat, config.balance_lr)

    def actor_module(self) -> nn.Module:
        """The universal policy."""
        return as_family(self.policy, self.registry_name).universal_parameters()

    def update(self, batch: Batch) -> Metrics:
        """The base algorithm's update; every `balance_every`-th one also of the balance model."""
        self.updates += 1
        step = self.train_step if self.updates % self.config.balance_every else self.balanced_step
        return step(batch)

    def train_step(self, batch: Batch) -> Metrics:
        """The update without the balance model's; a pure function of the batch and the phase."""
        return super().train_step(self.with_coefficients(batch))

    def balanced_step(self, batch: Batch) -> Metrics:
        """The update with the balance model's, which sees the networks as they were before it."""
        batch = self.with_coefficients(batch)  # before the step that changes their source
        metrics = self._balance_step(batch)
        return super().train_step(batch) | metrics

    def with_coefficients(self, batch: Batch) -> Batch:
        """The batch with c at s and c' at s', both (B,), in `extra`.

        At s, where pi_u is trained: U(lo, hi) in the offline phase, a sample of pi_b online. At s', where the policy
        that acts continues: a sample of pi_b at s'.
        """
        policy = self.policy
        with torch.no_grad():
            ahead = self._draw(policy.features(batch.next_obs))
            if self.online:
                here = self._draw(policy.features(batch.obs))
            else:
                here = policy.uniform_coefficient(len(batch.action), self.generator)
        extra = (batch.extra or {}) | {"coefficient": here, "next_coefficient": ahead}
        return replace(batch, extra=extra)

    def distributions(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Members of the family at s and s', see `CQL.distributions`."""
        assert batch.extra is not None
        policy = self.policy
        here = policy.member(policy.features(batch.obs), batch.extra["coefficient"])
        with torch.no_grad():
            ahead = policy.member(policy.features(batch.next_obs), batch.extra["next_coefficient"])
        return here, ahead

    def actor_loss(self, batch: Batch, log_prob: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
        """The universal policy's objective, see `family_actor_loss`."""
        assert batch.extra is not None
        return family_actor_loss(log_prob, q, temperature, batch.extra["coefficient"])

    def _balance_step(self, batch: Batch) -> Metrics:
        policy = self.policy
        with torch.no_grad():
            features = policy.features(batch.obs)
        mean, log_std = policy.balance(features)
        squashed, log_prob = draw_squashed(mean, log_std, self._like(mean))
        chosen = policy.rescale(squashed)
        action, _ = policy.draw(*policy.member(features, chosen, frozen=True), self._noise(batch, 1))
        loss = balance_loss(self.critic.frozen(batch.obs, action[:, 0]))
        self._balance_flat.backward(loss)
        self.balance_optimizer.step()
        return {
            "loss/balance": loss.detach(),
            "policy/balance_entropy": -log_prob.detach().mean(),
            "policy/coefficient_mean": chosen.detach().mean(),
            "policy/coefficient_std": chosen.detach().std(),
        }

    def _draw(self, features: Tensor) -> Tensor:
        mean, log_std = self.policy.balance(features)
        return self.policy.rescale(draw_squashed(mean, log_std, self._like(mean))[0])

    def _like(self, tensor: Tensor) -> Tensor:
        """Standard normal of the shape of `tensor`: every call is a stretch of the stream of its own."""
        return torch.randn(tensor.shape, generator=self.generator, device=self.device)


@ALGOS.register("famo2o_cql", config=FamO2OCQLConfig)
class FamO2OCQL(FamO2OOverCQL):
    """FamO2O over CQL: one policy for every weight of Q against entropy, chosen per state."""

    registry_name = "famo2o_cql"


@ALGOS.register("famo2o_cal_ql", config=FamO2OCalQLConfig)
class FamO2OCalQL(FamO2OOverCQL, CalQL):
    """FamO2O over Cal-QL: one policy for every weight of Q against entropy, chosen per state."""

    registry_name = "famo2o_cal_ql"
