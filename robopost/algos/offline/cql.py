# SPDX-License-Identifier: Apache-2.0
"""CQL(H): conservative Q-learning on top of SAC (Kumar et al. 2020, arXiv 2006.04779).

Reference implementation: CORL's `algorithms/offline/cql.py` (a port of github.com/young-geng/CQL). As there, all
losses of an update are taken at the weights from before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.online.sac import actor_loss
from robopost.algos.online.td3 import check_critics, check_step_policy, critic_loss, td_target
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Spec
from robopost.errors import ConfigError
from robopost.nets.flat import Flat, adam, frozen_copy
from robopost.nets.scalar import LogScalar
from robopost.nets.value import QEnsemble
from robopost.policies.base import Policy
from robopost.policies.gaussian import Gaussian
from robopost.registry import ALGOS

OUT_GAIN = 0.01  # orthogonal gain of the critics' last layer: the first Q-values are near 0
MAX_MULTIPLIER = 1e6


@dataclass
class CQLConfig(AlgoConfig):
    """Config of `CQL`."""

    name: str = "cql"
    batch_size: int = 256
    gamma: float = 0.99
    n_step: int = 1
    tau: float = 0.005  # Polyak weight of the target critics
    actor_lr: float = 3e-5
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-5
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])  # of the critics
    num_critics: int = 2
    critic_layernorm: bool = False
    orthogonal: bool = True  # initialisation of the critics
    temperature: float = 1.0  # entropy weight alpha; its start where it is learned
    learn_temperature: bool = True
    target_entropy: float = -1.0  # nats per action dimension
    entropy_in_target: bool = False  # entropy bonus in the backup
    min_q_weight: float = 10.0  # w of the conservative term; 0 = SAC
    num_actions: int = 10  # n: actions sampled uniformly, from pi(.|s) and from pi(.|s'), each
    importance_sampling: bool = True  # off: densities dropped, the data's action joins the set
    lagrange_gap: float | None = None  # gap a learned multiplier holds the difference at; null = w alone
    multiplier_lr: float = 3e-4
    max_backup: bool = False  # target from the best of n next actions instead of one
    diff_min: float | None = None  # bounds of each sample's difference; null = none
    diff_max: float | None = None

    def __post_init__(self) -> None:
        check_critics(self)
        for name in ("temperature", "temperature_lr", "multiplier_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if not self.min_q_weight >= 0:
            raise ConfigError(f"algo.min_q_weight={self.min_q_weight} must be 0 (plain SAC) or more")
        if self.num_actions < 1:
            raise ConfigError(f"algo.num_actions={self.num_actions} must be at least 1")
        low, high = self.diff_min, self.diff_max
        if low is not None and high is not None and not low < high:
            raise ConfigError(f"algo.diff_min={low} must be below algo.diff_max={high}")


def push_down(q_uniform: Tensor, q_policy: Tensor, density: Tensor) -> Tensor:
    """The push-down with importance sampling: log sum_j exp(Q(s, a_j) - log q(a_j)) (Kumar et al. 2020, app. F).

    Args:
        q_uniform: (E, B, n) at actions drawn uniformly from [-1, 1]^A.
        q_policy: (E, B, m) at actions of the policy.
        density: (B, n + m) log-densities, the uniform ones first; without gradient.

    Returns:
        (E, B).
    """
    return (torch.cat([q_uniform, q_policy], -1) - density).logsumexp(-1)


def push_down_plain(q_uniform: Tensor, q_policy: Tensor, q_data: Tensor) -> Tensor:
    """The push-down over sampled actions and the data's: log sum_j exp Q(s, a_j) (Kumar et al. 2020, eq. 4).

    Args:
        q_uniform: (E, B, n).
        q_policy: (E, B, m).
        q_data: (E, B).

    Returns:
        (E, B).
    """
    return torch.cat([q_uniform, q_policy, q_data[..., None]], -1).logsumexp(-1)


def conservative_gap(pushed: Tensor, q_data: Tensor, low: float | None, high: float | None) -> Tensor:
    """Mean over the batch of clip(push-down - Q(s, a)), per critic: (E, B) twice to (E,)."""
    diff = pushed - q_data
    if low is not None or high is not None:
        diff = diff.clamp(low, high)
    return diff.mean(-1)


def max_backup(next_q: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """max_j min_i Q'_i(s', a_j) and the log-density of that action (Kumar et al. 2020, appendix F).

    Args:
        next_q: (E, B, n).
        log_prob: (B, n).

    Returns:
        (Q (B,), log-density (B,)).
    """
    value, index = next_q.amin(0).max(-1)
    return value, log_prob.gather(-1, index[:, None])[:, 0]


def multiplier_loss(multiplier: Tensor, gap: Tensor, weight: float, target: float) -> Tensor:
    """-w alpha' (gap - tau), averaged over critics: dual ascent on alpha' (Kumar et al. 2020, eq. 30)."""
    return -(multiplier * weight * (gap.detach() - target)).mean()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """-E[log alpha (log pi(a|s) + H)], the form of the reference code: its gradient doesn't shrink with alpha."""
    return -(log_temperature * (log_prob.detach() + target_entropy)).mean()


@ALGOS.register("cql", config=CQLConfig)
class CQL(Algorithm):
    """CQL(H): SAC whose Q-values are pushed down at sampled actions and up at the data's."""

    registry_name = "cql"
    regime = "offline"
    can_go_online = True
    steps = ("train_step",)

    def __init__(
        self, config: Any, policy: Policy, spec: Spec, *, device: torch.device, generator: torch.Generator
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        check_step_policy(policy, self.registry_name)
        if not isinstance(policy, Gaussian) or not policy.config.squash:
            raise ConfigError(
                f"algo={self.registry_name} needs densities of bounded samples, which policy="
                f"{policy.registry_name} here lacks. Fix: policy=gaussian policy.squash=true"
            )
        self.policy: Gaussian = policy
        self.critic = QEnsemble(
            spec,
            policy.obs_keys,
            config.hidden,
            config.num_critics,
            layernorm=config.critic_layernorm,
            history=policy.history,
            orthogonal=config.orthogonal,
            out_gain=OUT_GAIN,
        ).to(device)
        self._actor_flat, self._critic_flat = Flat(self.actor_module()), Flat(self.critic)
        self.critic_target, self._critic_target_flat = frozen_copy(self.critic)
        self.actor_optimizer = adam(self._actor_flat, config.actor_lr)
        self.critic_optimizer = adam(self._critic_flat, config.critic_lr)
        self.temperature = LogScalar(math.log(config.temperature)).to(device)
        if config.learn_temperature:
            self._temperature_flat = Flat(self.temperature)
            self.temperature_optimizer = adam(self._temperature_flat, config.temperature_lr)
        if config.lagrange_gap is not None:
            self.multiplier = LogScalar(1.0).to(device)
            self._multiplier_flat = Flat(self.multiplier)
            self.multiplier_optimizer = adam(self._multiplier_flat, config.multiplier_lr)
        self._target_entropy = config.target_entropy * spec.action_dim
        self._uniform_density = spec.action_dim * math.log(0.5)

    def actor_module(self) -> nn.Module:
        """Holder of the parameters that `actor_loss` trains: the whole policy."""
        return self.policy

    @property
    def needs(self) -> Needs:
        """Transitions of the dataset."""
        return Needs(batch_size=self.config.batch_size, n_step=self.config.n_step, gamma=self.config.gamma)

    def update(self, batch: Batch) -> Metrics:
        """One update of the critics, the policy, the temperature and the target critics."""
        self.updates += 1
        return self.train_step(batch)

    def train_step(self, batch: Batch) -> Metrics:
        """The whole update; a pure function of the batch."""
        here, ahead = self.distributions(batch)
        temperature = self.temperature().detach()

        action, log_prob = self.policy.draw(*here, self._noise(batch, 1))
        log_prob = log_prob[:, 0]
        q = self.critic.frozen(batch.obs, action[:, 0])
        loss = self.actor_loss(batch, log_prob, q, temperature)
        self._actor_flat.backward(loss)
        metrics = {
            "loss/actor": loss.detach(),
            "policy/entropy": -log_prob.detach().mean(),
            "policy/temperature": temperature,
        }
        with torch.no_grad():
            target = self.target(batch, ahead, temperature)
            here = (here[0].detach(), here[1].detach())
        metrics |= self._critic_step(batch, target, here, ahead)
        self.actor_optimizer.step()
        if self.config.learn_temperature:
            loss = temperature_loss(self.temperature.log, log_prob, self._target_entropy)
            self._temperature_flat.backward(loss)
            self.temperature_optimizer.step()
            metrics["loss/temperature"] = loss.detach()
        self._critic_target_flat.lerp(self._critic_flat, self.config.tau)
        return metrics

    def distributions(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The policy's Gaussians: mean and log-std (B, 1, A) at s, with gradient, and at s', without.

        Evaluated once; every sample of the update is drawn from them. Override it where the policy sees more
        than the batch's observations.
        """
        here = self.policy.distribution(batch.obs)
        with torch.no_grad():
            ahead = self.policy.distribution(batch.next_obs)
        return here, ahead

    def actor_loss(self, batch: Batch, log_prob: Tensor, q: Tensor, temperature: Tensor) -> Tensor:
        """SAC's objective: E[alpha log pi(a|s) - min_i Q_i(s, a)].

        Args:
            batch: the batch.
            log_prob: (B,) of one action per state.
            q: (E, B) at those actions.
            temperature: alpha, without gradient.
        """
        return actor_loss(log_prob, q, temperature)

    def target(self, batch: Batch, ahead: tuple[Tensor, Tensor], temperature: Tensor) -> Tensor:
        """(B,) regression target of the critics; runs without gradients."""
        count = self.config.num_actions if self.config.max_backup else 1
        action, log_prob = self.policy.draw(*ahead, self._noise(batch, count))
        next_q, log_prob = max_backup(self.critic_target.many(batch.next_obs, action), log_prob)
        if self.config.entropy_in_target:
            next_q = next_q - temperature * log_prob
        return td_target(batch.reward, batch.discount, next_q[None])

    def policy_q(self, batch: Batch, q: Tensor) -> tuple[Tensor, Metrics]:
        """Q (E, B, 2n) at the policy's actions as the conservative term counts it: here as it is."""
        return q, {}

    def _critic_step(
        self, batch: Batch, target: Tensor, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor]
    ) -> Metrics:
        """One critic update, and one of the multiplier where it is learned."""
        cfg = self.config
        if cfg.min_q_weight == 0:
            q_data = self.critic(batch.obs, batch.action)
            loss = bellman = critic_loss(q_data, target)
            metrics: Metrics = {}
        else:
            actions, density = self._proposals(batch, here, ahead)
            q = self.critic.many(batch.obs, torch.cat([batch.action[:, None], actions], 1))
            q_data, q_uniform, q_policy = q.split([1, cfg.num_actions, 2 * cfg.num_actions], -1)
            q_data = q_data.squeeze(-1)
            metrics = {
                "value/q_policy": q_policy.detach().mean(),
                "value/q_uniform": q_uniform.detach().mean(),
            }
            q_policy, more = self.policy_q(batch, q_policy)
            if cfg.importance_sampling:
                pushed = push_down(q_uniform, q_policy, density)
            else:
                pushed = push_down_plain(q_uniform, q_policy, q_data)
            gap = conservative_gap(pushed, q_data, cfg.diff_min, cfg.diff_max)
            bellman = critic_loss(q_data, target)
            conservative, multiplied = self._weigh(gap)
            loss = bellman + conservative
            metrics |= more | multiplied
            metrics |= {"loss/conservative": conservative.detach(), "value/q_gap": gap.detach().mean()}
        self._critic_flat.backward(loss)
        self.critic_optimizer.step()
        return metrics | {"loss/critic": bellman.detach(), "value/q_mean": q_data.detach().mean()}

    def _proposals(
        self, batch: Batch, here: tuple[Tensor, Tensor], ahead: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Actions (B, 3n, A) to push down, uniform ones first, and their log-densities (B, 3n); no gradient."""
        count = self.config.num_actions
        shape = (batch.action.shape[0], count, batch.action.shape[-1])
        uniform = torch.rand(shape, generator=self.generator, device=self.device) * 2 - 1
        first, first_log_prob = self.policy.draw(*here, self._noise(batch, count))
        second, second_log_prob = self.policy.draw(*ahead, self._noise(batch, count))
        flat = torch.full(shape[:2], self._uniform_density, device=self.device)
        return torch.cat([uniform, first, second], 1), torch.cat([flat, first_log_prob, second_log_prob], 1)

    def _weigh(self, gap: Tensor) -> tuple[Tensor, Metrics]:
        """The conservative term of the loss from the gap (E,) per critic; steps the multiplier."""
        cfg = self.config
        if cfg.lagrange_gap is None:
            return cfg.min_q_weight * gap.sum(), {}
        multiplier = self.multiplier().clamp(0.0, MAX_MULTIPLIER)
        loss = multiplier_loss(multiplier, gap, cfg.min_q_weight, cfg.lagrange_gap)
        self._multiplier_flat.backward(loss)
        held = multiplier.detach()
        self.multiplier_optimizer.step()
        term = (held * cfg.min_q_weight * (gap - cfg.lagrange_gap)).sum()
        return term, {"loss/multiplier": loss.detach(), "value/multiplier": held}

    def _noise(self, batch: Batch, count: int) -> Tensor:
        """(B, count, A) standard normal."""
        shape = (batch.action.shape[0], count, batch.action.shape[-1])
        return torch.randn(shape, generator=self.generator, device=self.device)
