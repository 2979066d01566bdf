# SPDX-License-Identifier: Apache-2.0
"""A2PR: adaptive advantage-guided policy regularisation (Liu et al. 2024, arXiv 2405.19909).

TD3+BC in which the cloned action is chosen per sample: the dataset's, or one that a conditional VAE decodes,
whichever has the larger advantage. The VAE learns only dataset actions whose advantage is positive, and the
cloning term is off where neither candidate has a non-negative one.

Reference implementation: github.com/ltlhuuu/A2PR; where it and the paper differ, this file follows the code
and says so in docs/algorithms/a2pr.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from robopost.algos.base import Metrics, Needs
from robopost.algos.offline.td3_bc import q_weight
from robopost.algos.online.td3 import (
    TD3,
    TD3CoreConfig,
    critic_loss,
    random_subset,
    smoothed_action,
    td_target,
)
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam
from robopost.nets.vae import ActionVAE, kl_divergence
from robopost.nets.value import ValueNet
from robopost.policies.base import Policy
from robopost.registry import ALGOS


@dataclass
class A2PRConfig(TD3CoreConfig):
    """Config of `A2PR`; the actor is the policy's, 256-256-256 in the reference."""

    name: str = "a2pr"
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256, 256])  # of the critics and V
    alpha: float = 2.5  # weight of Q against cloning; 0 = cloning alone
    mask: float = 0.5  # omega: weight of the cloning term where it is on; 0 = TD3 with normalised Q
    vae_weight: float = 1.0  # w: weight of the VAE's reconstruction against its KL term
    advantage_threshold: float = 0.0  # epsilon_A: the VAE learns actions with a larger advantage
    detach_candidate: bool = False  # true: no policy gradient through the VAE, unlike the reference
    value_lr: float = 3e-4
    vae_lr: float = 1e-3
    vae_hidden: list[int] = field(default_factory=lambda: [750, 750])  # of encoder and decoder
    latent: int = 0  # size of the VAE's latent vector, 0 = twice the action's

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "mask", "vae_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        for name in ("value_lr", "vae_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if self.latent < 0:
            raise ConfigError(f"algo.latent={self.latent} must be 0 (twice the action's size) or more")


def value_target(target: Tensor, reward: Tensor, discount: Tensor, next_q: Tensor) -> Tensor:
    """min(y, r + discount * min_i Q_i(s', a')) with the critics after their step (the reference's code).

    Args:
        target: (B,) y, the critics' own target.
        reward: (B,).
        discount: (B,), 0 where the episode terminated.
        next_q: (E, B) current critics at the target's next action.
    """
    return torch.minimum(target, td_target(reward, discount, next_q))


def reconstruction_loss(decoded: Tensor, action: Tensor, keep: Tensor, weight: float) -> Tensor:
    """W * mean over batch and dimensions of 1[A(s, a) > epsilon_A] (a^ - a)^2 (Liu et al. 2024, VAE loss).

    Not divided by the number of kept samples, as in the reference.

    Args:
        decoded: (B, A).
        action: (B, A) the dataset's.
        keep: (B,) bool.
        weight: w.
    """
    return weight * torch.where(keep[:, None], (decoded - action).square(), 0.0).mean()


def regularised_action(
    candidate: Tensor, action: Tensor, q_candidate: Tensor, q_action: Tensor
) -> tuple[Tensor, Tensor]:
    """The action to clone: the candidate where Q(s, a~) >= Q(s, a), else the dataset's.

    Comparing advantages gives the same, V cancels.

    Returns:
        (action (B, A), which are the candidate (B,) bool).
    """
    chosen = q_candidate >= q_action
    return torch.where(chosen[:, None], candidate, action), chosen


def cloning_mask(q_candidate: Tensor, q_action: Tensor, value: Tensor) -> Tensor:
    """1[Q(s, a~) >= V(s) or Q(s, a) > V(s)], (B,) bool.

    A logical or: the cloning term's weight is 0 or omega, never 2 omega.
    """
    return (q_candidate >= value) | (q_action > value)


def a2pr_loss(
    q: Tensor, action: Tensor, cloned: Tensor, mask: Tensor, alpha: float, omega: float
) -> tuple[Tensor, Tensor]:
    """-lambda * mean Q(s, pi(s)) + mean over batch and dimensions of m (pi(s) - a_bar)^2 (Liu et al. 2024).

    Args:
        q: (B,) first critic at the policy's action.
        action: (B, A) the policy's action.
        cloned: (B, A) the action to clone, gradient included.
        mask: (B,) bool, where the cloning term is on.
        alpha: lambda = alpha / mean |Q|.
        omega: weight of the cloning term, m = omega * mask.

    Returns:
        (loss, cloning term).
    """
    cloning = omega * torch.where(mask[:, None], (action - cloned).square(), 0.0).mean()
    if alpha == 0:
        return cloning, cloning
    return cloning - q_weight(q, alpha) * q.mean(), cloning


@ALGOS.register("a2pr", config=A2PRConfig)
class A2PR(TD3):
    """A2PR: TD3 on a fixed dataset, held near the better of the data's and a generated action."""

    registry_name = "a2pr"
    regime = "offline"
    steps = ("critic_step", "full_step")

    def __init__(
        self,
        config: A2PRConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        keys, history = policy.obs_keys, policy.history
        self.latent = config.latent or 2 * spec.action_dim
        self.value = ValueNet(spec, keys, config.hidden, history=history).to(device)
        self.vae = ActionVAE(spec, keys, config.vae_hidden, self.latent, history=history).to(device)
        self._value_flat, self._vae_flat = Flat(self.value), Flat(self.vae)
        self.value_optimizer = adam(self._value_flat, config.value_lr)
        self.vae_optimizer = adam(self._vae_flat, config.vae_lr)

    @property
    def needs(self) -> Needs:
        """Transitions of the dataset."""
        return Needs(batch_size=self.config.batch_size, n_step=self.config.n_step, gamma=self.config.gamma)

    def update(self, batch: Batch) -> Metrics:
        """One update of critics, V and VAE; every `policy_delay`-th also of the actor and the targets."""
        cfg = self.config
        self.updates += 1
        noise = self._noise(batch.action.shape[-1], len(batch))
        subset = random_subset(cfg.num_critics, cfg.target_subset, self.generator, self.device)
        vae_noise = self._noise(self.latent, len(batch))
        if self.updates % cfg.policy_delay:
            return self.critic_step(batch, noise, subset, vae_noise)
        return self.full_step(batch, noise, subset, vae_noise, self._noise(self.latent, len(batch)))

    def critic_step(  # type: ignore[override]
        self, batch: Batch, noise: Tensor, subset: Tensor | None, vae_noise: Tensor
    ) -> Metrics:
        """One update of critics, V and VAE, with standard normal noise (B, A) and (B, L)."""
        return self._learn(batch, noise, subset, vae_noise)[0]

    def full_step(
        self, batch: Batch, noise: Tensor, subset: Tensor | None, vae_noise: Tensor, actor_noise: Tensor
    ) -> Metrics:
        """`critic_step`, then one update of the actor and one Polyak step of the targets."""
        metrics, q, value = self._learn(batch, noise, subset, vae_noise)
        loss, more = self.judged_actor_loss(batch, q, value, actor_noise)
        self._actor_flat.backward(loss)
        self.actor_optimizer.step()
        self._critic_target_flat.lerp(self._critic_flat, self.config.tau)
        self._actor_target_flat.lerp(self._actor_flat, self.config.tau)
        return metrics | more | {"loss/actor": loss.detach()}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The actor's objective with the current critics and V, and noise from `generator`."""
        with torch.no_grad():
            q, value = self._first_q(batch), self.value(batch.obs)
        return self.judged_actor_loss(batch, q, value, self._noise(self.latent, len(batch)))

    def judged_actor_loss(
        self, batch: Batch, q_action: Tensor, value: Tensor, noise: Tensor
    ) -> tuple[Tensor, Metrics]:
        """The actor's objective, see `a2pr_loss`.

        Args:
            batch: transitions.
            q_action: (B,) first critic at the dataset's actions.
            value: (B,) V(s) from before its step, as in the reference.
            noise: (B, L) of the VAE's latent vector.
        """
        cfg = self.config
        action = self.policy.sample(batch.obs, deterministic=True)[0][:, 0]
        q = self.critic.frozen(batch.obs, action, members=1)[0]
        source = action.detach() if cfg.detach_candidate else action
        candidate = self.vae(batch.obs, source, noise, frozen=True)[0]
        with torch.no_grad():
            q_candidate = self.critic.frozen(batch.obs, candidate, members=1)[0]
        cloned, chosen = regularised_action(candidate, batch.action, q_candidate, q_action)
        mask = cloning_mask(q_candidate, q_action, value)
        loss, cloning = a2pr_loss(q, action, cloned, mask, cfg.alpha, cfg.mask)
        with torch.no_grad():
            metrics = {
                "loss/bc": cloning.detach(),
                "policy/bc_distance": _distance(action, batch.action),
                "policy/candidate_distance": _distance(action, candidate),
                "policy/candidate_share": _share(chosen),
                "policy/cloned_share": _share(mask),
            }
        return loss, metrics

    def _learn(
        self, batch: Batch, noise: Tensor, subset: Tensor | None, vae_noise: Tensor
    ) -> tuple[Metrics, Tensor, Tensor]:
        """Steps of critics, V and VAE.

        Returns:
            (metrics, Q1(s, a) after the critics' step (B,), V(s) from before its own (B,)).
        """
        cfg = self.config
        with torch.no_grad():
            next_action = self.policy_target.sample(batch.next_obs, deterministic=True)[0][:, 0]
            next_action = smoothed_action(next_action, noise, cfg.target_noise, cfg.target_noise_clip)
            next_q = self.critic_target(batch.next_obs, next_action)
            target = td_target(batch.reward, batch.discount, next_q, subset)
        q = self.critic(batch.obs, batch.action)
        loss = critic_loss(q, target)
        self._critic_flat.backward(loss)
        self.critic_optimizer.step()
        metrics = {"loss/critic": loss.detach(), "value/q_mean": q.detach().mean()}
        with torch.no_grad():
            new_next_q = self.critic(batch.next_obs, next_action)
            target = value_target(target, batch.reward, batch.discount, new_next_q)
            q_action = self._first_q(batch)
        value = self.value(batch.obs)
        loss = F.mse_loss(value, target)
        self._value_flat.backward(loss)
        self.value_optimizer.step()
        value = value.detach()
        metrics |= {"loss/value": loss.detach(), "value/v_mean": value.mean()}
        return metrics | self._vae_step(batch, q_action - value, vae_noise), q_action, value

    def _vae_step(self, batch: Batch, advantage: Tensor, noise: Tensor) -> Metrics:
        """One VAE update; the KL term isn't masked."""
        cfg = self.config
        keep = advantage > cfg.advantage_threshold
        decoded, mean, log_std = self.vae(batch.obs, batch.action, noise, needed=keep)
        reconstruction = reconstruction_loss(decoded, batch.action, keep, cfg.vae_weight)
        divergence = kl_divergence(mean, log_std)
        loss = reconstruction + 0.5 * divergence
        self._vae_flat.backward(loss)
        self.vae_optimizer.step()
        return {
            "loss/vae": loss.detach(),
            "loss/vae_reconstruction": reconstruction.detach(),
            "loss/vae_kl": divergence.detach(),
            "value/advantage_mean": advantage.mean(),
            "policy/vae_share": _share(keep),
        }

    def _first_q(self, batch: Batch) -> Tensor:
        """(B,) first critic at the dataset's actions, no gradient."""
        return self.critic.frozen(batch.obs, batch.action, members=1)[0]

    def _noise(self, size: int, rows: int) -> Tensor:
        return torch.randn((rows, size), generator=self.generator, device=self.device)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean Euclidean distance between actions, normalised units."""
    return torch.linalg.vector_norm(a - b, dim=-1).mean()


def _share(mask: Tensor) -> Tensor:
    """Fraction of True."""
    return mask.float().mean()
