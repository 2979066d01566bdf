# SPDX-License-Identifier: Apache-2.0
"""TD3: twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv 1802.09477).

Reference implementation: github.com/sfujim/TD3. Defaults are its own. Critic ensembles of any size with a
random subset in the target follow RED-Q (Chen et al. 2021, arXiv 2101.05982), LayerNorm critics follow RLPD
(Ball et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam, frozen_copy
from robopost.nets.value import QEnsemble
from robopost.policies.base import Policy
from robopost.registry import ALGOS


@dataclass
class TD3CoreConfig(AlgoConfig):
    """What TD3 and TD3+BC share."""

    batch_size: int = 256
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005  # Polyak weight of the target networks
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    hidden: list[int] = field(default_factory=lambda: [256, 256])  # of the critics
    num_critics: int = 2
    target_subset: int = 0  # critics drawn at random for the minimum in the target, 0 = all
    critic_layernorm: bool = False
    policy_delay: int = 2  # critic updates per actor and target update
    target_noise: float = 0.2  # in normalised action units, as its clip and exploration_noise
    target_noise_clip: float = 0.5

    def __post_init__(self) -> None:
        check_critics(self)
        if self.policy_delay < 1:
            raise ConfigError(f"algo.policy_delay={self.policy_delay} must be at least 1")
        for name in ("target_noise", "target_noise_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


@dataclass
class TD3Config(TD3CoreConfig):
    """Config of `TD3`."""

    name: str = "td3"
    exploration_noise: float = 0.1  # std, normalised action units
    warmup_steps: int = 25_000  # uniformly random actions before the first update
    updates_per_step: float = 1.0
    demo_fraction: float = 0.0  # share of each batch from data.path

    def __post_init__(self) -> None:
        super().__post_init__()
        check_offpolicy(self)
        if self.exploration_noise < 0:
            raise ConfigError(f"algo.exploration_noise={self.exploration_noise} must be 0 or more")


def check_critics(config: Any) -> None:
    """Validate the fields every critic-based algorithm has.

    Raises:
        ConfigError: a value is out of range.
    """
    for name in ("batch_size", "n_step", "num_critics"):
        if getattr(config, name) < 1:
            raise ConfigError(f"algo.{name}={getattr(config, name)} must be at least 1")
    for name in ("actor_lr", "critic_lr"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"algo.{name}={getattr(config, name)} must be above 0")
    if not 0 <= config.gamma <= 1:
        raise ConfigError(f"algo.gamma={config.gamma} must lie in [0, 1]")
    if not 0 < config.tau <= 1:
        raise ConfigError(f"algo.tau={config.tau} must lie in (0, 1]")
    subset = getattr(config, "target_subset", 0)
    if not 0 <= subset <= config.num_critics:
        raise ConfigError(
            f"algo.target_subset={subset} must lie in 0..{config.num_critics} (algo.num_critics); 0 = all"
        )


def check_offpolicy(config: Any) -> None:
    """Validate the fields every off-policy algorithm has.

    Raises:
        ConfigError: a value is out of range.
    """
    if config.warmup_steps < 1:
        raise ConfigError(f"algo.warmup_steps={config.warmup_steps} must be at least 1: updates need data")
    if not config.updates_per_step > 0:
        raise ConfigError(f"algo.updates_per_step={config.updates_per_step} must be above 0")
    if not 0 <= config.demo_fraction <= 1:
        raise ConfigError(f"algo.demo_fraction={config.demo_fraction} must lie in [0, 1]")


def offpolicy_needs(config: Any) -> Needs:
    """`Algorithm.needs` of an off-policy algorithm."""
    return Needs(
        batch_size=config.batch_size,
        n_step=config.n_step,
        gamma=config.gamma,
        updates_per_step=config.updates_per_step,
        warmup_steps=config.warmup_steps,
        demo_fraction=config.demo_fraction,
    )


def check_step_policy(policy: Policy, algo: str) -> None:
    """Require a policy whose single actions fill [-1, 1] in normalised units.

    Raises:
        ConfigError: the policy predicts chunks, or its actions are not scaled to their bounds.
    """
    if policy.horizon != 1:
        raise ConfigError(
            f"algo={algo} works on single actions, policy.horizon={policy.horizon}. "
            "Fix: policy.horizon=1, or policy=residual policy.base=<run> to correct a policy of chunks"
        )
    mode = getattr(policy.config, "normalise_action", "bounds")
    if mode not in ("bounds", "minmax"):
        raise ConfigError(
            f"algo={algo} clips normalised actions to [-1, 1] and policy.normalise_action={mode!r} doesn't "
            "map the bounds there. Fix: policy.normalise_action=bounds"
        )


def smoothed_action(action: Tensor, noise: Tensor, std: float, clip: float) -> Tensor:
    """clip(pi'(s') + clip(std * noise, +-clip), +-1): target smoothing (Fujimoto et al. 2018, eq. 14)."""
    return (action + (noise * std).clamp(-clip, clip)).clamp(-1.0, 1.0)


def td_target(reward: Tensor, discount: Tensor, next_q: Tensor, subset: Tensor | None = None) -> Tensor:
    """Clipped double-Q target (Fujimoto et al. 2018, eq. 10): r + discount * min_i Q'_i(s', a').

    Args:
        reward: (B,), summed over n steps.
        discount: (B,), gamma^n, 0 where the episode terminated.
        next_q: (E, B).
        subset: (M,) members the minimum runs over (RED-Q, algorithm 1); None = all.
    """
    if subset is not None:
        next_q = next_q.index_select(0, subset)
    return reward + discount * next_q.amin(0)


def critic_loss(q: Tensor, target: Tensor) -> Tensor:
    """Sum over critics of the mean squared error, q (E, B) (Fujimoto et al. 2018, algorithm 1)."""
    return (q - target).square().mean(1).sum()


def random_subset(members: int, size: int, generator: torch.Generator, device: torch.device) -> Tensor | None:
    """(size,) distinct members for the target's minimum, or None when it runs over all."""
    if size in (0, members):
        return None
    return torch.randperm(members, generator=generator, device=device)[:size]


@ALGOS.register("td3", config=TD3Config)
class TD3(Algorithm):
    """TD3: clipped double Q-learning with delayed policy updates."""

    registry_name = "td3"
    regime = "offpolicy"
    steps = ("critic_step", "actor_step")

    def __init__(
        self, config: Any, policy: Policy, spec: Spec, *, device: torch.device, generator: torch.Generator
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        check_step_policy(policy, self.registry_name)
        self.critic = self.build_critic().to(device)
        self._actor_flat, self._critic_flat = Flat(policy), Flat(self.critic)
        self.policy_target, self._actor_target_flat = frozen_copy(policy)
        self.critic_target, self._critic_target_flat = frozen_copy(self.critic)
        self.actor_optimizer = adam(self._actor_flat, config.actor_lr)
        self.critic_optimizer = adam(self._critic_flat, config.critic_lr)

    def build_critic(self) -> QEnsemble:
        """The critics, called once by the constructor."""
        policy, cfg = self.policy, self.config
        return QEnsemble(
            self.spec,
            policy.obs_keys,
            cfg.hidden,
            cfg.num_critics,
            layernorm=cfg.critic_layernorm,
            history=policy.history,
        )

    @property
    def needs(self) -> Needs:
        """Transitions from the replay buffer, and from demonstrations where `demo_fraction` asks."""
        return offpolicy_needs(self.config)

    def update(self, batch: Batch) -> Metrics:
        """One critic update; every `policy_delay`-th call also one of the actor and the targets."""
        cfg = self.config
        self.updates += 1
        noise = torch.randn(batch.action.shape, generator=self.generator, device=self.device)
        subset = random_subset(cfg.num_critics, cfg.target_subset, self.generator, self.device)
        metrics = self.critic_step(batch, noise, subset)
        if self.updates % cfg.policy_delay == 0:
            metrics = metrics | self.actor_step(batch)
        return metrics

    def critic_step(self, batch: Batch, noise: Tensor, subset: Tensor | None) -> Metrics:
        """One critic update, with standard normal `noise` (B, A) for target smoothing."""
        cfg = self.config
        with torch.no_grad():
            next_action = self.policy_target.sample(batch.next_obs, deterministic=True)[0][:, 0]
            next_action = smoothed_action(next_action, noise, cfg.target_noise, cfg.target_noise_clip)
            target = td_target(
                batch.reward, batch.discount, self.critic_target(batch.next_obs, next_action), subset
            )
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target)
        self._critic_flat.backward(loss)
        self.critic_optimizer.step()
        return {"loss/critic": loss.detach(), "value/q_mean": q.detach().mean()}

    def actor_step(self, batch: Batch) -> Metrics:
        """One actor update and one Polyak step of all targets."""
        loss, metrics = self.actor_loss(batch)
        self._actor_flat.backward(loss)
        self.actor_optimizer.step()
        self._critic_target_flat.lerp(self._critic_flat, self.config.tau)
        self._actor_target_flat.lerp(self._actor_flat, self.config.tau)
        return metrics | {"loss/actor": loss.detach()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Deterministic policy gradient (Fujimoto et al. 2018, algorithm 1): -mean Q_1(s, pi(s))."""
        action = self.policy.sample(batch.obs, deterministic=True)[0][:, 0]
        return -self.critic.frozen(batch.obs, action, members=1).mean(), {}

    @torch.no_grad()
    def explore(self, obs: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The policy's action plus Gaussian noise, in environment units."""
        normaliser = self.policy.normaliser
        action = self.policy.sample(normaliser.obs(obs), deterministic=True)[0][:, 0]
        noise = torch.randn(action.shape, generator=generator, device=action.device)
        action = (action + self.config.exploration_noise * noise).clamp(-1.0, 1.0)
        return normaliser.unnormalise_action(action)
