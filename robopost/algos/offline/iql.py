# SPDX-License-Identifier: Apache-2.0
"""IQL: implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169).

Two presets that are never mixed, because beta, the reward scale and the order of the steps belong together:
`original` is github.com/ikostrikov/implicit_q_learning, `corl` is CORL's `algorithms/offline/iql.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.online.td3 import check_critics
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.flat import Flat, adam, frozen_copy, set_lr
from robopost.nets.value import QEnsemble, ValueNet
from robopost.policies.base import Policy
from robopost.policies.gaussian import HALF_LOG_2PI, Gaussian
from robopost.registry import ALGOS

VARIANTS = ("original", "corl")


@dataclass
class IQLCoreConfig(AlgoConfig):
    """What IQL and its descendants share."""

    variant: str = "original"  # original | corl: order of the steps, scale of the Q loss and initialisation
    batch_size: int = 256
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005  # Polyak weight of the target critics
    expectile: float = 0.7  # 0.5 = mean, towards 1 = maximum over the data's actions
    max_weight: float = 100.0  # cap of the advantage weights
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4  # of Q and V
    actor_decay_updates: int = 1_000_000  # cosine decay of actor_lr to 0, 0 = constant, as it is online
    hidden: list[int] = field(default_factory=lambda: [256, 256])  # of Q and V
    num_critics: int = 2

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("algo.variant", self.variant, VARIANTS)
        check_critics(self)
        if not 0 < self.expectile < 1:
            raise ConfigError(f"algo.expectile={self.expectile} must lie in (0, 1)")
        if not self.max_weight > 0:
            raise ConfigError(f"algo.max_weight={self.max_weight} must be above 0")
        if self.actor_decay_updates < 0:
            raise ConfigError(
                f"algo.actor_decay_updates={self.actor_decay_updates} must be 0 (constant) or more"
            )


@dataclass
class IQLConfig(IQLCoreConfig):
    """Config of `IQL`."""

    name: str = "iql"
    beta: float = 3.0  # inverse temperature of the advantage weights, 0 = behaviour cloning

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 0:
            raise ConfigError(f"algo.beta={self.beta} must be 0 (behaviour cloning) or more")


def expectile_loss(diff: Tensor, expectile: float) -> tuple[Tensor, Tensor]:
    """Mean |tau - 1[u < 0]| u^2 with u = Q(s, a) - V(s) (Kostrikov et al. 2021, eq. 4 and 5), and its gradient in u."""
    # |tau - 1[u < 0]| u as one operation.
    weighted = nn.functional.leaky_relu(diff, (1 - expectile) / expectile)
    scale = expectile / diff.numel()
    return (weighted * diff).sum() * scale, weighted * (2 * scale)


def advantage_weights(advantage: Tensor, beta: float | Tensor, limit: float) -> Tensor:
    """min(exp(beta * A), limit), no gradient (Kostrikov et al. 2021, eq. 7; the cap is the code's).

    `beta` is one number or one per sample.
    """
    return (beta * advantage.detach()).exp().clamp(max=limit)


def weighted_cloning_loss(weights: Tensor, log_prob: Tensor) -> Tensor:
    """-mean w log pi(a|s) (Kostrikov et al. 2021, eq. 7); both (B,)."""
    return -(weights * log_prob).mean()


def gaussian_cloning_loss(
    weights: Tensor, action: Tensor, mean: Tensor, log_std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_cloning_loss` of a Gaussian with one std for all states, and its gradients in mean and log-std.

    Args:
        weights: (B,).
        action: (B, A).
        mean: (B, A).
        log_std: (A,).
    """
    inverse = (-log_std).exp()
    error = (action - mean) * inverse
    weighted = error * (weights / len(weights))[:, None]
    squares, total = (weighted * error).sum(0), weights.mean()
    loss = 0.5 * squares.sum() + total * (log_std.sum() + HALF_LOG_2PI * len(log_std))
    return loss, weighted * -inverse, total - squares


def q_loss(q: Tensor, target: Tensor, variant: str) -> tuple[Tensor, Tensor]:
    """Squared error to r + gamma V(s') (Kostrikov et al. 2021, eq. 6), and its gradient in q (E, B).

    The original sums over critics, CORL averages: half the gradient for two critics.
    """
    error = q - target
    scale = 1 / (q.shape[1] if variant == "original" else q.numel())
    return error.square().sum() * scale, error * (2 * scale)


@ALGOS.register("iql", config=IQLConfig)
class IQL(Algorithm):
    """IQL: expectile values and advantage-weighted cloning; never queries actions outside the data."""

    registry_name = "iql"
    regime = "offline"
    can_go_online = True
    steps = ("train_step",)

    def __init__(
        self,
        config: IQLCoreConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if not hasattr(policy, "action_log_prob"):
            raise ConfigError(
                f"algo={self.registry_name} needs the log-probability of the data's actions; "
                f"policy={policy.registry_name} has none. Fix: policy=gaussian"
            )
        if policy.horizon != 1:
            raise ConfigError(
                f"algo={self.registry_name} works on single actions, policy.horizon={policy.horizon}. "
                "Fix: set it to 1"
            )
        original = config.variant == "original"
        keys, history = policy.obs_keys, policy.history
        self.critic = QEnsemble(
            spec, keys, config.hidden, config.num_critics, history=history, orthogonal=original
        ).to(device)
        init = "orthogonal" if original else "default"
        self.value = ValueNet(
            spec, keys, config.hidden, init=init, out_gain=math.sqrt(2), history=history
        ).to(device)
        self._actor_flat, self._critic_flat, self._value_flat = (
            Flat(self.actor_module()),
            Flat(self.critic),
            Flat(self.value),
        )
        self.critic_target, self._critic_target_flat = frozen_copy(self.critic)
        self.actor_optimizer = adam(self._actor_flat, config.actor_lr, scheduled=True)
        self.critic_optimizer = adam(self._critic_flat, config.critic_lr)
        self.value_optimizer = adam(self._value_flat, config.critic_lr)

    def actor_module(self) -> nn.Module:
        """Holder of the parameters that the weighted cloning loss trains: the whole policy."""
        return self.policy

    @property
    def needs(self) -> Needs:
        """Transitions of the dataset."""
        return Needs(batch_size=self.config.batch_size, n_step=self.config.n_step, gamma=self.config.gamma)

    def update(self, batch: Batch) -> Metrics:
        """One update of V, the policy, Q and the target Q, in the variant's order."""
        cfg = self.config
        if cfg.actor_decay_updates and not self.online:
            done = min(1.0, self.updates / cfg.actor_decay_updates)
            set_lr(self.actor_optimizer, cfg.actor_lr * 0.5 * (1 + math.cos(math.pi * done)))
        self.updates += 1
        return self.next_step()(batch)

    def next_step(self) -> Callable[[Batch], Metrics]:
        """The step that this update takes, one of `steps`."""
        return self.train_step

    def begin_online(self) -> None:
        """Fine-tuning needs a policy that still moves: back to the undecayed learning rate, constant from here."""
        super().begin_online()
        set_lr(self.actor_optimizer, self.config.actor_lr)

    def train_step(self, batch: Batch) -> Metrics:
        """The whole update; a pure function of the batch."""
        return self._train(batch, self._policy_step)

    def _train(self, batch: Batch, policy_step: Callable[[Batch, Tensor], Metrics]) -> Metrics:
        """V, Q and target in the variant's order around `policy_step(batch, advantage (B,))`."""
        with torch.no_grad():
            target_q = self.critic_target(batch.obs, batch.action).amin(0)
            old_next_value = self.value(batch.next_obs) if self.config.variant == "corl" else None
        value = self.value(batch.obs)
        metrics = self._value_step(value, target_q)
        if old_next_value is None:
            # The reference's order: V first, then pi and Q with the new V.
            with torch.no_grad():
                new_value, next_value = self.value.pair(batch.obs, batch.next_obs)
            metrics |= policy_step(batch, target_q - new_value)
            return metrics | self._critic_step(batch, next_value)
        # CORL's order: everything with the V from before its step, pi last.
        metrics |= self._critic_step(batch, old_next_value)
        return metrics | policy_step(batch, target_q - value.detach())

    def _value_step(self, value: Tensor, target_q: Tensor) -> Metrics:
        old = value.detach()
        loss, slope = expectile_loss(target_q - old, self.config.expectile)
        self._value_flat.pull_back([value], [-slope])
        self.value_optimizer.step()
        return {"loss/value": loss, "value/v_mean": old.mean()}

    def _policy_step(self, batch: Batch, advantage: Tensor) -> Metrics:
        weights = advantage_weights(advantage, self.config.beta, self.config.max_weight)
        if isinstance(self.policy, Gaussian) and self.policy.constant_std:
            loss = self.clone_gaussian(weights, batch.action, self.policy.output(batch.obs))
        else:
            log_prob = self.policy.action_log_prob(batch.obs, batch.action[:, None])  # type: ignore[operator]
            loss = weighted_cloning_loss(weights, log_prob)
            self._actor_flat.backward(loss)
        self.actor_optimizer.step()
        return {
            "loss/actor": loss.detach(),
            "policy/weight_mean": weights.mean(),
            "value/advantage_mean": advantage.mean(),
        }

    def clone_gaussian(self, weights: Tensor, action: Tensor, out: Tensor) -> Tensor:
        """The policy's gradient in closed form, from the output (B, A) of its network; returns the loss."""
        mean, log_std = self.policy.constant_head(out)  # type: ignore[operator]
        loss, *slopes = gaussian_cloning_loss(weights, action, mean.detach(), log_std.detach())
        self._actor_flat.pull_back([mean, log_std], slopes)
        return loss

    def _critic_step(self, batch: Batch, next_value: Tensor) -> Metrics:
        q = self.critic(batch.obs, batch.action)
        target = torch.addcmul(batch.reward, batch.discount, next_value)
        loss, slope = q_loss(q.detach(), target, self.config.variant)
        self._critic_flat.pull_back([q], [slope])
        self.critic_optimizer.step()
        self._critic_target_flat.lerp(self._critic_flat, self.config.tau)
        return {"loss/critic": loss, "value/q_mean": q.detach().mean()}
