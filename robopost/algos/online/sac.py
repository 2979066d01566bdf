# SPDX-License-Identifier: Apache-2.0
"""SAC: soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905, "SAC v2").

Reference implementations: stable-baselines3's SAC (whose defaults these are) and CleanRL's
`sac_continuous_action.py`. Critic ensembles and the random subset follow RED-Q (Chen et al. 2021, arXiv
2101.05982).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.online.td3 import (
    check_critics,
    check_offpolicy,
    check_step_policy,
    critic_loss,
    offpolicy_needs,
    random_subset,
    td_target,
)
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam, frozen_copy
from robopost.nets.value import QEnsemble
from robopost.policies.base import Policy
from robopost.registry import ALGOS


@dataclass
class SACConfig(AlgoConfig):
    """Config of `SAC`."""

    name: str = "sac"
    batch_size: int = 256
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005  # Polyak weight of the target critics
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-4
    hidden: list[int] = field(default_factory=lambda: [256, 256])  # of the critics
    num_critics: int = 2
    target_subset: int = 0  # critics drawn at random for the minimum in the target, 0 = all
    critic_layernorm: bool = False
    policy_delay: int = 1  # actor updates happen every n-th update, as many as actor_updates says
    actor_updates: int = 0  # how many at once, 0 = policy_delay (RLPD: 1)
    actor_mean: bool = False  # the actor follows the critics' mean instead of their minimum (RLPD)
    temperature: float = 1.0  # entropy weight alpha; its start where it is learned
    learn_temperature: bool = True
    target_entropy: float = -1.0  # nats per action dimension
    entropy_in_target: bool = True  # off: the backup has no entropy bonus (RLPD)
    warmup_steps: int = 100  # uniformly random actions before the first update
    updates_per_step: float = 1.0
    demo_fraction: float = 0.0  # share of each batch from data.path

    def __post_init__(self) -> None:
        check_critics(self)
        check_offpolicy(self)
        if self.policy_delay < 1:
            raise ConfigError(f"algo.policy_delay={self.policy_delay} must be at least 1")
        if self.actor_updates < 0:
            raise ConfigError(f"algo.actor_updates={self.actor_updates} must be 0 (policy_delay) or more")
        if not self.temperature > 0:
            raise ConfigError(f"algo.temperature={self.temperature} must be above 0")
        if not self.temperature_lr > 0:
            raise ConfigError(f"algo.temperature_lr={self.temperature_lr} must be above 0")


def actor_loss(log_prob: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
    """E[alpha log pi(a|s) - min_i Q_i(s, a)], a ~ pi reparameterised (Haarnoja et al. 2018, eq. 7).

    Args:
        log_prob: (B,).
        q: (E, B).
        temperature: alpha, a scalar without gradient.
    """
    return (temperature * log_prob - q.amin(0)).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """E[-alpha (log pi(a|s) + H)] with alpha = exp(log_temperature) (Haarnoja et al. 2018, eq. 18).

    Its gradient raises alpha while the policy's entropy is below `target_entropy` (nats).
    """
    return -(log_temperature.exp() * (log_prob.detach() + target_entropy)).mean()


@ALGOS.register("sac", config=SACConfig)
class SAC(Algorithm):
    """SAC: maximum-entropy actor-critic with a learned temperature."""

    registry_name = "sac"
    regime = "offpolicy"
    steps = ("critic_step", "actor_step")

    def __init__(
        self,
        config: SACConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        check_step_policy(policy, self.registry_name)
        if not policy.has_log_prob or not getattr(policy.config, "squash", False):
            raise ConfigError(
                f"algo=sac needs a log-probability and bounded samples, which policy={policy.registry_name} "
                "here lacks. Fix: policy=gaussian policy.squash=true"
            )
        self.critic = QEnsemble(
            spec,
            policy.obs_keys,
            config.hidden,
            config.num_critics,
            layernorm=config.critic_layernorm,
            history=policy.history,
        ).to(device)
        self._actor_flat, self._critic_flat = Flat(policy), Flat(self.critic)
        self.critic_target, self._critic_target_flat = frozen_copy(self.critic)
        self.log_temperature = torch.full(
            (), math.log(config.temperature), device=device, requires_grad=config.learn_temperature
        )
        self.log_temperature.grad = torch.zeros_like(self.log_temperature)
        self.actor_optimizer = adam(self._actor_flat, config.actor_lr)
        self.critic_optimizer = adam(self._critic_flat, config.critic_lr)
        if config.learn_temperature:
            self.temperature_optimizer = torch.optim.Adam(
                [self.log_temperature], lr=config.temperature_lr, fused=True, capturable=device.type == "cuda"
            )
        self._target_entropy = config.target_entropy * spec.action_dim

    @property
    def needs(self) -> Needs:
        """Transitions from the replay buffer, and from demonstrations where `demo_fraction` asks."""
        return offpolicy_needs(self.config)

    def update(self, batch: Batch) -> Metrics:
        """One update of the critics and their targets; at every `policy_delay`-th call those of the actor."""
        cfg = self.config
        self.updates += 1
        subset = random_subset(cfg.num_critics, cfg.target_subset, self.generator, self.device)
        metrics = self.critic_step(batch, subset)
        if self.updates % cfg.policy_delay == 0:
            for _ in range(cfg.actor_updates or cfg.policy_delay):
                actor_metrics = self.actor_step(batch)
            metrics = metrics | actor_metrics
        return metrics

    def critic_step(self, batch: Batch, subset: Tensor | None) -> Metrics:
        """One update of all critics and a Polyak step of their targets."""
        with torch.no_grad():
            chunk, log_prob, _ = self.policy.sample(batch.next_obs, generator=self.generator)
            next_q = self.critic_target(batch.next_obs, chunk[:, 0])
            if self.config.entropy_in_target:
                assert log_prob is not None
                next_q = next_q - self.log_temperature.exp() * log_prob
            target = td_target(batch.reward, batch.discount, next_q, subset)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target)
        self._critic_flat.backward(loss)
        self.critic_optimizer.step()
        self._critic_target_flat.lerp(self._critic_flat, self.config.tau)
        return {"loss/critic": loss.detach(), "value/q_mean": q.detach().mean()}

    def actor_step(self, batch: Batch) -> Metrics:
        """One update of the actor and of the temperature, from the same sampled actions."""
        chunk, log_prob, _ = self.policy.sample(batch.obs, generator=self.generator)
        assert log_prob is not None
        temperature = self.log_temperature.detach().exp()
        q = self.critic.frozen(batch.obs, chunk[:, 0])
        loss = actor_loss(log_prob, q.mean(0, keepdim=True) if self.config.actor_mean else q, temperature)
        self._actor_flat.backward(loss)
        self.actor_optimizer.step()
        metrics = {
            "loss/actor": loss.detach(),
            "policy/entropy": -log_prob.detach().mean(),
            "policy/temperature": temperature,
        }
        if self.config.learn_temperature:
            alpha_loss = temperature_loss(self.log_temperature, log_prob, self._target_entropy)
            (grad,) = torch.autograd.grad(alpha_loss, [self.log_temperature])
            assert self.log_temperature.grad is not None
            self.log_temperature.grad.copy_(grad)
            self.temperature_optimizer.step()
            metrics["loss/temperature"] = alpha_loss.detach()
        return metrics
