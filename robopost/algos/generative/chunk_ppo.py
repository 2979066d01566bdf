# SPDX-License-Identifier: Apache-2.0
"""The frame of on-policy fine-tuning of chunk policies: critic, advantages per decision, epochs of minibatches.

A transition is one decision: a chunk is sampled, `policy.execute` of its steps are executed, their rewards are summed.
ReinFlow, DPPO, PolicyFlow, FPO and PPO on tokens differ in how they explore (`decide`) and in the ratio they clip
(`actor_loss`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.algos.online.ppo import gae, normalise
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Obs, Spec, below
from robopost.errors import ConfigError
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.flat import Flat, adam, set_lr, step_where
from robopost.nets.mlp import MLP
from robopost.policies.base import Policy
from robopost.policies.chain import ChainPolicy

BLOCK = 4096  # decisions of a rollout that are evaluated at once
# Rows of a network whose activations stay in a CPU's cache from the forward to the backward pass. Minibatches of
# thousands of decisions take two thirds of the time in such parts.
CACHED_ROWS = 4096


@dataclass
class ChunkPPOConfig(AlgoConfig):
    """What the configs of all on-policy fine-tuning methods share."""

    rollout_steps: int = 50  # executed chunks per environment and rollout
    batch_size: int = 500  # decisions of a minibatch; those of an epoch that don't fill one are left out
    epochs: int = 5
    gamma: float = 0.99  # per decision
    gae_lambda: float = 0.95
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    lr_decay_updates: int = 0  # half a cosine of both rates to 0 over this many rollouts, 0 = constant
    weight_decay: float = 0.0  # decoupled
    critic_warmup: int = 0  # first rollouts that train the critic alone
    max_grad_norm: float = 1.0
    target_kl: float = 1.0  # beyond it the actor stays as it is for the rest of the rollout, 0 = off
    bootstrap_time_limits: bool = True  # false: a time limit ends like a failure, as in the authors' code
    scale_reward: bool = True  # divide rewards by a running standard deviation of discounted returns
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256])  # of the critic
    activation: str = "mish"  # of the critic

    def __post_init__(self) -> None:
        for name in ("rollout_steps", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size < 2:
            raise ConfigError(
                f"algo.batch_size={self.batch_size} must be at least 2: advantages are normalised"
            )
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("actor_lr", "critic_lr", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        for name in ("lr_decay_updates", "weight_decay", "critic_warmup", "target_kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


class ObsValue(nn.Module):
    """V(s) of any observations the policy reads, images included: (B, ...) to (B,)."""

    def __init__(self, policy: Policy, hidden: list[int], activation: str) -> None:
        super().__init__()
        config = policy.config if isinstance(policy.config, EncodedConfig) else EncodedConfig()
        self.encoder = ObsEncoder(policy.spec, policy.obs_keys, policy.history, config)
        self.net = MLP(self.encoder.out_dim, hidden, 1, activation)

    def forward(self, obs: Obs) -> Tensor:
        """Normalised observations to values."""
        return self.net(self.encoder(obs)).squeeze(-1)


class ReturnScale(nn.Module):
    """Running variance of discounted returns, to divide rewards by its root.

    Returns are summed forward in time, as OpenAI's baselines do, and start anew with every rollout.
    """

    count: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "mean", "spread"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def update(self, reward: Tensor, done: Tensor, valid: Tensor, gamma: float) -> Tensor:
        """Learn from rewards (D, N) of a rollout; returns the standard deviation, 1 where all are equal."""
        running, sums = torch.zeros_like(reward[0]), []
        for t in range(len(reward)):
            running = running * gamma + reward[t]
            sums.append(running)
            running = running * (~done[t]).to(running.dtype)
        values, weight = torch.stack(sums), valid.to(reward.dtype)
        # Chan et al. 1979: merge the rollout's moments into the running ones.
        count = weight.sum()
        mean = (values * weight).sum() / count
        spread = ((values - mean).square() * weight).sum()
        total = self.count + count
        shift = mean - self.mean
        self.spread += spread + shift.square() * self.count * count / total
        self.mean += shift * count / total
        self.count.copy_(total)
        std = (self.spread / self.count).sqrt()
        return torch.where(std > 1e-6, std, torch.ones_like(std))


class ChunkPPO(Algorithm):
    """PPO over decisions. Subclasses add what they explore with, what they remember of it, and the actor's loss."""

    regime = "onpolicy"
    steps = ("actor_step", "critic_step")
    policies: ClassVar[tuple[type[Policy], ...]] = (ChainPolicy,)  # policy classes that fit
    kind: ClassVar[str] = "flow or diffusion"  # what they are called where they are no registered ones
    fix: ClassVar[str] = "policy=pretrained policy.path=<run of a flow policy>, or policy=flow"

    def __init__(
        self,
        config: ChunkPPOConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if not isinstance(policy, self.policies):
            wanted = " or ".join(sorted(kind.registry_name for kind in self.policies if kind.registry_name))
            raise ConfigError(
                f"algo={self.registry_name} fine-tunes a {wanted or self.kind} policy, "
                f"policy={policy.registry_name} is none. Fix: {self.fix}"
            )
        self.config: ChunkPPOConfig = config
        modules = self.build_actor()
        self.critic = ObsValue(policy, config.hidden, config.activation).to(device)
        self._actor_flat, self._critic_flat = Flat(*modules), Flat(self.critic)
        self.actor_optimizer = self._optimizer(self._actor_flat, config.actor_lr)
        self.critic_optimizer = self._optimizer(self._critic_flat, config.critic_lr)
        self.scale = ReturnScale().to(device)
        self._keep = torch.ones((), dtype=torch.bool, device=device)  # False once target_kl is exceeded

    def _optimizer(self, flat: Flat, lr: float) -> torch.optim.Adam:
        decay = self.config.weight_decay
        return adam(flat, lr, scheduled=True, weight_decay=decay, decoupled_weight_decay=True)

    def build_actor(self) -> list[nn.Module]:
        """Modules whose parameters the actor's optimiser owns; called once by the constructor, which may need more."""
        return [self.policy]

    @property
    def rows_per_decision(self) -> int:
        """Evaluations of the network per decision in `actor_loss`."""
        return 1

    @property
    def needs(self) -> Needs:
        """Rollouts of executed chunks."""
        cfg = self.config
        return Needs(chunks=True, batch_size=cfg.batch_size, gamma=cfg.gamma, rollout_steps=cfg.rollout_steps)

    @abstractmethod
    def remember(self, rows: Batch) -> dict[str, Tensor]:
        """What `actor_loss` needs of M decisions besides `obs/*` and `advantage`, evaluated before the first step.

        Args:
            rows: decisions (M, ...) of the rollout, normalised.
        """

    @abstractmethod
    def actor_loss(self, rows: dict[str, Tensor], obs: Obs) -> tuple[Tensor, Tensor, Metrics]:
        """Loss of a minibatch, a mean over its rows; a pure function of tensors.

        Args:
            rows: what `remember` gave, and `advantage` (B,) normalised.
            obs: observations of the minibatch.

        Returns:
            (loss, an estimate of KL(old || new) for `target_kl`, detached metrics).
        """

    def before_step(self, kl: Tensor) -> Metrics:
        """Called with the minibatch's estimate of KL(old || new) before the actor's step; returns metrics."""
        return {}

    def update(self, batch: Batch) -> Metrics:
        """All epochs over one rollout of decisions (D, N).

        Raises:
            ConfigError: the rollout holds fewer decisions than a minibatch.
        """
        cfg = self.config
        assert batch.chunk_mask is not None
        valid = batch.chunk_mask.any(-1)
        data, metrics = self._data(batch, valid)
        total = len(data["advantage"])
        if total < cfg.batch_size:
            raise ConfigError(
                f"algo.batch_size={cfg.batch_size} is larger than a rollout of {total} executed chunks. "
                "Fix: raise algo.rollout_steps or env.num_envs, or lower algo.batch_size"
            )
        self._schedule()
        warming = self.updates < cfg.critic_warmup
        self.updates += 1
        self._keep.fill_(True)
        sums: Metrics = {}
        counts: dict[str, int] = {}
        for _ in range(cfg.epochs):
            order = torch.randperm(total, generator=self.generator, device=self.device)
            shuffled = {key: value.index_select(0, order) for key, value in data.items()}
            for start in range(0, total - cfg.batch_size + 1, cfg.batch_size):
                rows = {key: value[start : start + cfg.batch_size] for key, value in shuffled.items()}
                found = self.critic_step({k: v for k, v in rows.items() if k.startswith(("obs/", "returns"))})
                # Reading the flag costs nothing on CPU; on a GPU it would stall, and masked steps change nothing.
                stopped = cfg.target_kl and self.device.type == "cpu" and not self._keep
                if not warming and not stopped:
                    del rows["returns"]
                    found = found | self.actor_step(rows)
                for key, value in found.items():
                    sums[key] = sums[key] + value if key in sums else value
                    counts[key] = counts.get(key, 0) + 1
        return metrics | {key: value / counts[key] for key, value in sums.items()}

    def _schedule(self) -> None:
        cfg = self.config
        if cfg.lr_decay_updates:
            share = 0.5 * (1 + math.cos(math.pi * min(1.0, self.updates / cfg.lr_decay_updates)))
            set_lr(self.actor_optimizer, cfg.actor_lr * share)
            set_lr(self.critic_optimizer, cfg.critic_lr * share)

    @torch.no_grad()
    def _data(self, batch: Batch, valid: Tensor) -> tuple[dict[str, Tensor], Metrics]:
        """Decisions (M, ...) with advantages, value targets and what the subclass remembers."""
        cfg = self.config
        flat = batch.map(lambda tensor: tensor.flatten(0, 1))
        done = batch.terminated | batch.truncated
        # Padding is zero from here on: its advantage is 0, and nothing flows back from it.
        kept = lambda x: torch.where(valid, x.view_as(batch.reward), torch.zeros_like(batch.reward))  # noqa: E731
        reward, discount = kept(batch.reward), kept(batch.discount)
        if cfg.scale_reward:
            reward = reward / self.scale.update(reward, done, valid, cfg.gamma)
        if not cfg.bootstrap_time_limits:
            discount = discount * (~batch.truncated).to(discount.dtype)
        value, next_value = kept(self._values(flat.obs)), kept(self._values(flat.next_obs))
        advantage, returns = gae(reward, discount, done, value, next_value, cfg.gamma * cfg.gae_lambda)
        rows = torch.nonzero(valid.flatten()).flatten()  # the one wait for the device in a rollout
        chosen = flat.map(lambda tensor: tensor.index_select(0, rows))
        value, returns = value.flatten()[rows], returns.flatten()[rows]
        data = {f"obs/{key}": item for key, item in chosen.obs.items()}
        data |= {"advantage": advantage.flatten()[rows], "returns": returns} | self.remember(chosen)
        explained = 1 - (returns - value).var() / returns.var().clamp_min(1e-8)
        return data, {"value/explained_variance": explained, "value/mean": value.mean()}

    def _values(self, obs: Obs) -> Tensor:
        """Values of a whole rollout, in blocks: the features of all its images would not fit."""
        return torch.cat([self.critic(block) for block in blocks(obs)])

    def critic_step(self, rows: dict[str, Tensor]) -> Metrics:
        """One gradient step on the critic: mean squared error to the value targets."""
        total = len(rows["returns"])
        error = rows["returns"].new_zeros(())
        self._critic_flat.grad.zero_()
        for part in blocks(rows, CACHED_ROWS if self.device.type == "cpu" else total):
            loss = (part["returns"] - self.critic(below(part, "obs/"))).square().sum() / total
            self._critic_flat.add_backward(loss)
            error = error + loss.detach()
        self._critic_flat.clip(self.config.max_grad_norm)
        self.critic_optimizer.step()
        return {"loss/value": error}

    def actor_step(self, rows: dict[str, Tensor]) -> Metrics:
        """One gradient step on the actor; changes nothing once `target_kl` is exceeded."""
        cfg = self.config
        rows = rows | {"advantage": normalise(rows["advantage"])}
        metrics: Metrics = {}
        total = len(rows["advantage"])
        self._actor_flat.grad.zero_()
        for part in blocks(rows, self._part(total)):
            share = len(part["advantage"]) / total
            loss, kl, found = self.actor_loss(part, below(part, "obs/"))
            self._actor_flat.add_backward(loss * share)
            for key, value in (found | {"loss/actor": loss.detach(), "policy/kl": kl}).items():
                metrics[key] = metrics[key] + share * value if key in metrics else share * value
        norm = self._actor_flat.clip(cfg.max_grad_norm)
        metrics = metrics | self.before_step(metrics["policy/kl"])
        if cfg.target_kl:
            self._keep.logical_and_(metrics["policy/kl"] <= cfg.target_kl)
            step_where(self.actor_optimizer, self._actor_flat, self._keep)
        else:
            self.actor_optimizer.step()
        return metrics | {"grad/norm": norm}

    def _part(self, total: int) -> int:
        """Decisions whose gradient is computed at once."""
        part = max(1, CACHED_ROWS // self.rows_per_decision)
        return part if self.device.type == "cpu" and total > part else total


def blocks(rows: dict[str, Tensor], size: int = BLOCK) -> list[dict[str, Tensor]]:
    """Rows (M, ...) in parts of at most `size`."""
    parts = zip(*(value.split(size) for value in rows.values()), strict=True)
    return [dict(zip(rows, part, strict=True)) for part in parts]
