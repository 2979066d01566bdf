# SPDX-License-Identifier: Apache-2.0
"""HNPG: on-policy natural policy gradient whose critic also learns from recorded data (Zhou et al. 2023).

arXiv 2311.08384. The critic is fitted to Monte-Carlo returns of fresh episodes and by temporal differences to recorded
transitions; the policy takes a natural-gradient step (Kakade 2001; Schulman et al. 2015, TRPO, arXiv 1502.05477) on
both sets of states. Reference implementation: `YifeiZhou02/HNPG`. NPG and TRPO are the same without recorded data.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.heads import Heads
from robopost.algos.natural import StepResult, natural_step
from robopost.algos.online.ppo import gae
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Obs, Spec
from robopost.data.dataset import Dataset
from robopost.errors import ConfigError, DataError
from robopost.nets.rows import Regression, Rows
from robopost.policies.base import Policy
from robopost.policies.gaussian import gaussian_kl, normal_log_density
from robopost.registry import ALGOS


@dataclass
class HNPGConfig(AlgoConfig):
    """Config of `HNPG`."""

    name: str = "hnpg"
    rollout_steps: int = 0  # per environment; 0 = one whole episode (policy=stepwise)
    hybrid: bool = True  # learn from data.path as well
    offline_batch: int = (
        0  # recorded transitions per update (per step of the episode), 0 = as many as fresh ones
    )
    gamma: float = 1.0
    gae_lambda: float = 0.97
    hidden: list[int] = field(default_factory=lambda: [64, 64])  # of the critics, tanh
    critic_steps: int = 30  # Adam steps per fit, which begins with a new Adam state
    critic_lr: float = 3e-4
    critic_batch_size: int = 0  # fresh and recorded rows each per Adam step, 0 = all of them
    critic_sweeps: int = 1  # fits per update, with new temporal-difference targets each; policy=stepwise: 1
    action_samples: int = 10  # V(s) is the mean of Q over so many actions of the policy
    normalise_advantage: bool = False  # per policy
    max_kl: float = 1e-2  # delta, of the quadratic model
    damping: float = 0.1  # added to the Fisher matrix's diagonal
    cg_iterations: int = 10
    backtracks: int = 10  # halvings in the line search, 0 = no search
    check_kl: bool = False  # the line search also asks for KL <= max_kl

    def __post_init__(self) -> None:
        for name in ("critic_steps", "critic_sweeps", "action_samples", "cg_iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be at least 1")
        for name in ("rollout_steps", "offline_batch", "critic_batch_size", "backtracks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("critic_lr", "max_kl"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if self.damping < 0:
            raise ConfigError(f"algo.damping={self.damping} must be 0 or more")
        if self.check_kl and not self.backtracks:
            raise ConfigError(
                "algo.check_kl=true needs a line search, algo.backtracks=0 has none. Fix: algo.check_kl=false"
            )


def surrogate(advantage: Tensor, log_ratio: Tensor) -> Tensor:
    """J_g = mean_B A exp(log pi(a|s) - log pi_old(a|s)): (G, B) to (G,) (Schulman et al. 2015, eq. 14)."""
    return (advantage * log_ratio.exp()).mean(1)


def halves(fresh: int, recorded: int, like: Tensor) -> Tensor:
    """(fresh + recorded, 1): 1/fresh and 1/recorded, so that a weighted sum of squares is the sum of two means."""
    ones = torch.ones(fresh + recorded, 1, device=like.device, dtype=like.dtype)
    ones[:fresh] /= max(fresh, 1)
    ones[fresh:] /= max(recorded, 1)
    return ones


@dataclass(frozen=True)
class _Recorded:
    dataset: Dataset  # normalised
    table: Tensor  # (G, E) int64 dataset steps to draw from


@ALGOS.register("hnpg", config=HNPGConfig)
class HNPG(Algorithm):
    """HNPG: natural policy gradient with a critic of fresh returns and recorded transitions.

    With `policy=stepwise` there is one policy and one critic per step of the episode (G = H heads), refitted
    backwards in time; with another Gaussian policy there is one of each (G = 1). Tensors of heads lead with (G, B).
    """

    registry_name = "hnpg"
    regime = "onpolicy"
    steps = ("iterate",)
    stackable = False

    def __init__(
        self,
        config: HNPGConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        self._heads = Heads(policy, config.hidden, config.action_samples, generator, self.registry_name)
        self._per_step, self._count = self._heads.per_step, self._heads.count
        self._check(config)
        self.critic = self._heads.critic.to(device)
        self._regression = Regression(self.critic.net)
        self._rows = Rows(policy, self._count)
        self._recorded: _Recorded | None = None

    def _check(self, config: HNPGConfig) -> None:
        if not self._per_step and config.gamma == 1:
            raise ConfigError(
                f"algo.gamma=1 has no value function without end: policy={self.policy.registry_name} doesn't know "
                "the step. Fix: algo.gamma=0.99, or policy=stepwise"
            )
        if not self._per_step and config.rollout_steps < 1:
            raise ConfigError(
                "algo.rollout_steps=0 means a whole episode of policy=stepwise. Fix: algo.rollout_steps=2048"
            )
        if self._per_step and config.rollout_steps % self._count:
            raise ConfigError(
                f"algo.rollout_steps={config.rollout_steps} must be a multiple of the {self._count} steps that "
                f"policy=stepwise has. Fix: algo.rollout_steps={self._count}, more env.num_envs for larger batches"
            )
        if self._per_step and config.critic_sweeps > 1:
            raise ConfigError(
                f"algo.critic_sweeps={config.critic_sweeps} must be 1 with policy=stepwise: one pass backwards "
                "carries values over the whole episode"
            )

    @property
    def needs(self) -> Needs:
        """Rollouts of the current policy."""
        cfg = self.config
        return Needs(gamma=cfg.gamma, rollout_steps=cfg.rollout_steps or self._count)

    def attach(self, dataset: Dataset) -> None:
        """Keep the recorded data to draw from.

        Raises:
            DataError: with `policy=stepwise`, an episode of another length than the policy's.
        """
        if not self.config.hybrid:
            return
        if not self._per_step:
            steps = dataset.transition_steps(torch.arange(dataset.num_transitions))
            self._recorded = _Recorded(dataset, steps.unsqueeze(0))
            return
        wrong = np.flatnonzero(dataset.lengths != self._count)
        if len(wrong):
            raise DataError(
                f"episode {wrong[0]} of data.path has {dataset.lengths[wrong[0]]} steps, policy=stepwise has "
                f"{self._count}. Fix: data of the environment's horizon"
            )
        steps = torch.arange(
            dataset.num_steps, device=dataset.action.device
        )  # which need not be where batches are
        table = steps.view(-1, self._count).t().contiguous()
        self._recorded = _Recorded(dataset, table)

    def update(self, batch: Batch) -> Metrics:
        """One iteration from a rollout with leading dimensions (T, N), in normalised units.

        Raises:
            ConfigError: `hybrid` without recorded data.
            DataError: with `policy=stepwise`, an episode that does not have the policy's number of steps.
        """
        if batch.chain is None:
            raise DataError(f"algo={self.registry_name} needs chain in its rollout, from Policy.act")
        if self.config.hybrid and self._recorded is None:
            raise ConfigError(
                f"algo={self.registry_name} learns from recorded data too and none is attached. "
                "Fix: data.path=<store>, or algo.hybrid=false"
            )
        fresh = self._fresh(batch)
        recorded = self._draw(fresh["reward"].numel() // self._count) if self._recorded else None
        self.updates += 1
        return self.iterate(fresh, recorded)

    def _fresh(self, batch: Batch) -> dict[str, Tensor]:
        """The rollout as (T, N), or with per-step policies (H, episodes)."""
        assert batch.chain is not None
        done = batch.terminated | batch.truncated
        tensors = {
            "action": batch.action,
            "chain": batch.chain[:, :, -1, 0],
            "reward": batch.reward,
            "done": done,
            "discount": batch.discount,
        }
        tensors |= {f"obs/{key}": batch.obs[key] for key in self.policy.obs_keys}
        if not self._per_step:
            return tensors | {f"next_obs/{key}": batch.next_obs[key] for key in self.policy.obs_keys}
        horizon = self._count
        if self.device.type == "cpu" or self.updates == 0:  # on a GPU a look at the flags would wait for it
            _check_episodes(done, horizon)
        fold = lambda x: x.unflatten(0, (-1, horizon)).transpose(0, 1).flatten(1, 2)  # noqa: E731
        tensors = {key: fold(value) for key, value in tensors.items()}
        last = torch.arange(horizon, device=self.device) == horizon - 1
        tensors["discount"] = torch.where(last, 0.0, self.config.gamma)[:, None].expand_as(tensors["reward"])
        return tensors

    def _draw(self, fresh: int) -> dict[str, Tensor]:
        """Recorded transitions (G, B, ...): per step of the episode with per-step policies."""
        assert self._recorded is not None
        dataset, table = self._recorded.dataset, self._recorded.table
        heads, available = table.shape
        count = self.config.offline_batch or min(fresh, available)
        pick = torch.randint(available, (heads, count), generator=self.generator, device=self.device)
        steps = table.gather(1, pick.to(table.device)).flatten()
        batch = dataset.transitions_at(
            steps, gamma=self.config.gamma, history=self.policy.history, keys=self.policy.obs_keys
        )
        batch = batch.map(lambda tensor: tensor.unflatten(0, (heads, count)))
        tensors = {"action": batch.action, "reward": batch.reward, "discount": batch.discount}
        tensors |= {f"obs/{key}": value for key, value in batch.obs.items()}
        return tensors | {f"next_obs/{key}": value for key, value in batch.next_obs.items()}

    def iterate(self, fresh: dict[str, Tensor], recorded: dict[str, Tensor] | None) -> Metrics:
        """Fit the critics, then step the policies; a pure function of the data."""
        cfg, heads, obs = self.config, self._heads, _part(fresh, "obs/")
        with torch.no_grad():
            metrics = self._fit(fresh, recorded)
            value = self._value(obs)
            advantage, returns = gae(
                fresh["reward"],
                fresh["discount"],
                fresh["done"],
                value,
                self._next_value(fresh, value),
                cfg.gamma * cfg.gae_lambda,
            )
            explained = 1 - (returns - value).var() / returns.var().clamp_min(1e-8)
            states = {key: self._group(item) for key, item in obs.items()}
            chain, advantage = self._group(fresh["chain"]), self._group(advantage)
            if recorded is not None:
                # The policy's own actions, not the recorded ones: A = Q(s, a) - V(s), a ~ pi.
                old = _part(recorded, "obs/")
                ours = heads.sample(old)
                gain = heads.q(old, heads.executed(ours)) - heads.value(old)
                states = {key: torch.cat([item, old[key]], 1) for key, item in states.items()}
                chain, advantage = torch.cat([chain, ours], 1), torch.cat([advantage, gain], 1)
            if cfg.normalise_advantage:
                spread = advantage.std(1, keepdim=True) + 1e-8
                advantage = (advantage - advantage.mean(1, keepdim=True)) / spread
        result = self.policy_step(states, chain, advantage)
        return metrics | {
            "loss/actor": -result.before.mean(),
            "policy/improvement": (result.after - result.before).mean(),
            "policy/kl": result.kl.mean(),
            "policy/step": result.share.mean(),
            "policy/accepted": (result.share > 0).float().mean(),
            "policy/entropy": heads.entropy(states),
            "value/explained_variance": explained,
            "value/v_mean": value.mean(),
        }

    def policy_step(self, states: Obs, chain: Tensor, advantage: Tensor) -> StepResult:
        """Natural-gradient step of every policy on its own rows.

        Args:
            states: (G, B, ...) normalised observations.
            chain: (G, B, A) what the policy sampled, before clipping or squashing.
            advantage: (G, B).
        """
        cfg, heads = self.config, self._heads
        with torch.no_grad():
            mean, log_std = heads.distribution(states)
            old = normal_log_density(chain, mean, log_std).sum(-1)

        def objective() -> Tensor:
            # The density of a squashed sample differs by a factor that both sides of the ratio share.
            density = normal_log_density(chain, *heads.distribution(states)).sum(-1)
            return surrogate(advantage, density - old)

        def divergence() -> Tensor:
            return gaussian_kl(mean, log_std, *heads.distribution(states)).sum(-1).mean(1)

        return natural_step(
            self._rows,
            objective,
            divergence,
            max_kl=cfg.max_kl,
            damping=cfg.damping,
            iterations=cfg.cg_iterations,
            backtracks=cfg.backtracks,
            check_kl=cfg.check_kl,
        )

    def _fit(self, fresh: dict[str, Tensor], recorded: dict[str, Tensor] | None) -> Metrics:
        """Refit Q: mean over fresh (Q - G)^2 + mean over recorded (Q - y)^2.

        G is the return (bootstrapped where a time limit or the rollout's end cut it), y = r + discount Q(s', a')
        with one a' ~ pi. With per-step policies backwards in time, y from the next step's critic, refitted before.
        """
        cfg, heads, obs = self.config, self._heads, _part(fresh, "obs/")
        reward, done, cut = fresh["reward"], fresh["done"], torch.zeros_like(fresh["reward"])
        if not self._per_step:
            after = self._value(_part(fresh, "next_obs/"))
            cut = torch.where(done, after, cut)
            cut[-1] = after[-1]
        _, returns = gae(reward, fresh["discount"], done, torch.zeros_like(cut), cut, cfg.gamma)
        x = self._group(torch.cat([heads.join(obs), fresh["action"]], -1))
        target, count = self._group(returns).unsqueeze(-1), x.shape[1]
        if recorded is not None:
            old = torch.cat([heads.join(_part(recorded, "obs/")), recorded["action"]], -1)
            x = torch.cat([x, old], 1)
        losses = []
        for _ in range(cfg.critic_sweeps):
            ahead = heads.ahead(_part(recorded, "next_obs/")) if recorded is not None else None
            for head in reversed(range(self._count)):
                goal = target[head]
                if recorded is not None and ahead is not None:
                    goal = torch.cat([goal, self._bootstrap(recorded, ahead, head)])
                losses.append(self._fit_head(head, x[head], goal, count))
        loss = torch.stack(losses).mean(0)
        metrics = {"loss/critic": loss.sum(), "loss/critic_fresh": loss[0], "value/return": returns.mean()}
        return metrics if recorded is None else metrics | {"loss/critic_recorded": loss[1]}

    def _bootstrap(self, recorded: dict[str, Tensor], ahead: Tensor, head: int) -> Tensor:
        """Y (B, 1) of a head's recorded transitions; the last step of an episode has nothing behind it."""
        y = recorded["reward"][head].unsqueeze(-1)
        if not self._per_step:
            return y + recorded["discount"][head].unsqueeze(-1) * self._regression.predict(head, ahead[head])
        if head == self._count - 1:
            return y
        return y + self.config.gamma * self._regression.predict(head + 1, ahead[head])

    def _fit_head(self, head: int, x: Tensor, target: Tensor, fresh: int) -> Tensor:
        """Fit one critic, fresh rows first; both mean squares (2,) before the last Adam step."""
        cfg, recorded, pick = self.config, len(x) - fresh, None
        if cfg.critic_batch_size:
            shape = (cfg.critic_steps, cfg.critic_batch_size)
            draw = lambda n: torch.randint(n, shape, generator=self.generator, device=self.device)  # noqa: E731
            pick = torch.cat([draw(fresh), fresh + draw(recorded)], 1) if recorded else draw(fresh)
            fresh, recorded = shape[1], shape[1] if recorded else 0
        weight = halves(fresh, recorded, x)
        residual = self._regression.fit(
            head, x, target, weight, steps=cfg.critic_steps, lr=cfg.critic_lr, pick=pick
        )
        squares = weight * residual.square()
        return torch.stack([squares[:fresh].sum(), squares[fresh:].sum()])

    def _group(self, x: Tensor) -> Tensor:
        """(T, N, ...) to (G, B, ...)."""
        return x if self._per_step else x.flatten(0, 1).unsqueeze(0)

    def _value(self, obs: Obs) -> Tensor:
        """V for observations (T, N, ...): (T, N)."""
        value = self._heads.value({key: self._group(item) for key, item in obs.items()})
        return value if self._per_step else value[0].unflatten(0, next(iter(obs.values())).shape[:2])

    def _next_value(self, fresh: dict[str, Tensor], value: Tensor) -> Tensor:
        """V of the true next observations; within an episode the estimate of the row that follows."""
        last = torch.zeros_like(value[:1])
        if self._per_step:
            return torch.cat([value[1:], last])
        after = self._value(_part(fresh, "next_obs/"))
        return torch.where(fresh["done"], after, torch.cat([value[1:], after[-1:]]))


def _part(tensors: dict[str, Tensor], prefix: str) -> Obs:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def _check_episodes(done: Tensor, horizon: int) -> None:
    """Raise DataError unless every episode of a rollout (T, N) has exactly `horizon` steps."""
    ended = done.unflatten(0, (-1, horizon))
    early = ended[:, :-1].any(0).any(1)
    if bool(early.any()):
        at = int(early.nonzero()[0, 0]) + 1
        raise DataError(
            f"an episode ended after {at} of {horizon} steps; policy=stepwise needs episodes of equal length. "
            "Fix: policy=gaussian algo.gamma=0.99"
        )
    if not bool(ended[:, -1].all()):
        raise DataError(
            f"an episode goes on after step {horizon}, the last that policy=stepwise has. "
            "Fix: policy.steps=<steps of an episode>"
        )
