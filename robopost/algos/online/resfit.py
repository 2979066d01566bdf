# SPDX-License-Identifier: Apache-2.0
"""ResFiT: off-policy reinforcement learning of a bounded residual on a frozen policy (arXiv 2509.19301).

The frozen policy of any class gives one action per step, also where it predicts chunks. The residual is trained like
TD3's actor, against a RED-Q ensemble (Chen et al. 2021, arXiv 2101.05982) with LayerNorm and n-step returns; half of
each batch are demonstrations. What the critics judge is the executed action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.online.td3 import (
    TD3Config,
    check_step_policy,
    offpolicy_needs,
    random_subset,
    smoothed_action,
    td_target,
)
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.flat import Flat, adam, backward, frozen_copy
from robopost.nets.value import QEnsemble
from robopost.policies.base import Policy
from robopost.policies.residual import BASE_ACTION, FEATURES, ResidualPolicy
from robopost.registry import ALGOS


@dataclass
class ResFiTConfig(TD3Config):
    """Config of `ResFiT`; defaults are the paper's scripts'."""

    name: str = "resfit"
    n_step: int = 3
    actor_lr: float = 1e-6  # slow on purpose, where the reward is sparse and the base policy good
    critic_lr: float = 1e-4  # of the image encoder too
    weight_decay: float = 0.0  # AdamW's, of all networks
    max_grad_norm: float = 1.0  # of each network
    num_critics: int = 10
    target_subset: int = 2
    critic_layernorm: bool = True
    critic_reduction: str = "mse_per_head"  # mse_per_head | abs_mean_squared (as the reference code)
    updates_per_step: float = 4.0
    policy_delay: int = 4  # critic updates per update of the actor
    warmup_steps: int = 10_000  # base action plus policy.warmup_noise before the first update
    critic_warmup: int = 10_000  # updates of the critics alone that follow at once
    exploration_noise: float = 0.05  # std, normalised action units
    exploration_clip: float = 0.3  # largest exploration noise, same units
    target_noise: float = 0.0  # std of noise on the target's action, 0 = none
    target_noise_clip: float = 0.3
    target_range: list[float] = field(default_factory=list)  # clamp of targets [low, high], [] = none
    residual_penalty: float = 0.0  # weight of the squared correction in the actor's loss
    demo_fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic_reduction not in REDUCTIONS:
            raise unknown("algo.critic_reduction", self.critic_reduction, REDUCTIONS)
        for name in ("weight_decay", "critic_warmup", "exploration_clip", "residual_penalty"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        if not self.max_grad_norm > 0:
            raise ConfigError(f"algo.max_grad_norm={self.max_grad_norm} must be above 0")
        bounds = self.target_range
        if bounds and not (len(bounds) == 2 and bounds[0] < bounds[1]):
            raise ConfigError(
                f"algo.target_range={bounds} must be [low, high] with low < high, or [] for none"
            )


def mse_per_head(q: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over heads and batch, q (E, B), target (B,): each head follows its own error."""
    return (q - target).square().mean()


def abs_mean_squared(q: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of (mean_k |Q_k - y|)^2, q (E, B): what the reference code computes.

    All heads of a sample get gradients of one size, their mean error.
    """
    return (q - target).abs().mean(0).square().mean()


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse_per_head": mse_per_head,
    "abs_mean_squared": abs_mean_squared,
}


def residual_target(reward: Tensor, discount: Tensor, next_q: Tensor, bounds: list[float]) -> Tensor:
    """n-step RED-Q target (B,) (ResFiT, section 3): sum_i gamma^i r_i + gamma^k min_{j in J} Q'_j, then clamped.

    Args:
        reward: (B,), summed over k <= n steps.
        discount: (B,), gamma^k, 0 where the episode terminated; a time limit keeps it.
        next_q: (M, B), of the heads J at s_{t+k} and the target actor's corrected action there.
        bounds: [low, high], or [] for no clamp.
    """
    target = td_target(reward, discount, next_q)
    return target.clamp(bounds[0], bounds[1]) if bounds else target


def actor_loss(q: Tensor, correction: Tensor, penalty: float) -> Tensor:
    """-mean over all heads of Q_k(s, clip(a_base + D)) + penalty * ||D||^2; q (E, B), D (B, A) (ResFiT, section 3)."""
    loss = -q.mean()
    return loss + penalty * correction.square().sum(-1).mean() if penalty else loss


@ALGOS.register("resfit", config=ResFiTConfig)
class ResFiT(Algorithm):
    """ResFiT: TD3 with a RED-Q ensemble for the correction of a frozen policy.

    Images are encoded once for all: the policy's encoder feeds actor and critics, and the critics' loss alone trains
    it. The targets' next observations go through it without a copy of its own.
    """

    registry_name = "resfit"
    regime = "offpolicy"
    steps = ("critic_step", "actor_step")
    policy: ResidualPolicy

    def __init__(
        self,
        config: ResFiTConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if not isinstance(policy, ResidualPolicy):
            raise ConfigError(
                f"algo=resfit corrects a frozen policy, policy={policy.registry_name} has none below it. "
                "Fix: policy=residual policy.base=<run>"
            )
        check_step_policy(policy, "resfit")
        inputs = {FEATURES: ((policy.encoder.out_dim,), "float32"), BASE_ACTION: spec.obs[BASE_ACTION]}
        self.critic = QEnsemble(
            Spec(inputs, spec.action_dim, spec.action_low, spec.action_high),
            [FEATURES, BASE_ACTION],
            config.hidden,
            config.num_critics,
            layernorm=config.critic_layernorm,
        ).to(device)
        self._actor_flat, self._critic_flat = Flat(policy.net), Flat(self.critic)
        self.actor_target, self._actor_target_flat = frozen_copy(policy.net)
        self.critic_target, self._critic_target_flat = frozen_copy(self.critic)
        self.actor_optimizer = self._adamw(self._actor_flat, config.actor_lr)
        self.critic_optimizer = self._adamw(self._critic_flat, config.critic_lr)
        self._encoder_flat: Flat | None = None
        if any(True for _ in policy.encoder.parameters()):  # none where only vectors are observed
            self._encoder_flat = Flat(policy.encoder)
            self.encoder_optimizer = self._adamw(self._encoder_flat, config.critic_lr)

    def _adamw(self, flat: Flat, lr: float) -> torch.optim.Adam:
        return adam(flat, lr, weight_decay=self.config.weight_decay, decoupled_weight_decay=True)

    @property
    def needs(self) -> Needs:
        """Transitions from the replay buffer and, by `demo_fraction`, from demonstrations."""
        return replace(offpolicy_needs(self.config), first_updates=self.config.critic_warmup)

    def update(self, batch: Batch) -> Metrics:
        """One critic update; after `critic_warmup` of them every `policy_delay`-th call also one of the actor."""
        cfg = self.config
        self.updates += 1
        noise = None
        if cfg.target_noise:
            noise = torch.randn(batch.action.shape, generator=self.generator, device=self.device)
        subset = random_subset(cfg.num_critics, cfg.target_subset, self.generator, self.device)
        metrics = self.critic_step(batch, noise, subset)
        if self.updates > cfg.critic_warmup and self.updates % cfg.policy_delay == 0:
            metrics = metrics | self.actor_step(batch)
        return metrics

    def critic_step(self, batch: Batch, noise: Tensor | None, subset: Tensor | None) -> Metrics:
        """One update of all heads and the encoder, and a Polyak step of the target heads.

        Args:
            batch: transitions.
            noise: (B, A) standard normal, for the target's action; None = no noise.
            subset: heads of the target's minimum, None = all.
        """
        cfg, policy = self.config, self.policy
        with torch.no_grad():
            after = policy.encode(batch.next_obs, self._augment)
            action = after[BASE_ACTION] + policy.correction(after, self.actor_target)
            if noise is None:
                action = action.clamp(-1.0, 1.0)
            else:
                action = smoothed_action(action, noise, cfg.target_noise, cfg.target_noise_clip)
            next_q = self.critic_target.frozen(after, action, members=subset)
            target = residual_target(batch.reward, batch.discount, next_q, cfg.target_range)
        q = self.critic(policy.encode(batch.obs, self._augment), batch.action)
        loss = REDUCTIONS[cfg.critic_reduction](q, target)
        if self._encoder_flat is None:
            self._critic_flat.backward(loss)
        else:
            backward(loss, self._critic_flat, self._encoder_flat)
            self._encoder_flat.clip(cfg.max_grad_norm)
            self.encoder_optimizer.step()
        self._critic_flat.clip(cfg.max_grad_norm)
        self.critic_optimizer.step()
        self._critic_target_flat.lerp(self._critic_flat, cfg.tau)
        return {"loss/critic": loss.detach(), "value/q_mean": q.detach().mean()}

    def actor_step(self, batch: Batch) -> Metrics:
        """One update of the correction and a Polyak step of its target."""
        cfg, policy = self.config, self.policy
        with torch.no_grad():  # the encoder learns from the critics alone
            here = policy.encode(batch.obs, self._augment)
        correction = policy.correction(here)
        action = (here[BASE_ACTION] + correction).clamp(-1.0, 1.0)
        loss = actor_loss(self.critic.frozen(here, action), correction, cfg.residual_penalty)
        self._actor_flat.backward(loss)
        self._actor_flat.clip(cfg.max_grad_norm)
        self.actor_optimizer.step()
        self._actor_target_flat.lerp(self._actor_flat, cfg.tau)
        return {"loss/actor": loss.detach(), "policy/correction": correction.detach().abs().mean()}

    @torch.no_grad()
    def explore(self, obs: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The corrected action plus clipped Gaussian noise, in environment units."""
        cfg, policy = self.config, self.policy
        correction = policy.correction(policy.encode(policy.normaliser.obs(obs)))
        noise = torch.randn(correction.shape, generator=generator, device=correction.device)
        noise = (cfg.exploration_noise * noise).clamp(-cfg.exploration_clip, cfg.exploration_clip)
        return policy.executed(obs, correction + noise)

    @property
    def _augment(self) -> torch.Generator | None:
        return self.generator if self._encoder_flat is not None else None
