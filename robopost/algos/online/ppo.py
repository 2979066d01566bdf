# SPDX-License-Identifier: Apache-2.0
"""PPO: proximal policy optimisation with a clipped objective (Schulman et al. 2017, arXiv 1707.06347).

Defaults are those of stable-baselines3's PPO for continuous actions. Advantages follow GAE (Schulman et al.
2016, arXiv 1506.02438) and respect both kinds of episode end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robopost.algos.base import Algorithm, Metrics, Needs
from robopost.config import AlgoConfig
from robopost.data.batch import Batch, Obs, Spec, below
from robopost.errors import ConfigError, DataError
from robopost.nets.flat import Flat, adam, set_lr, step_where
from robopost.nets.value import ValueNet
from robopost.policies.base import Policy
from robopost.policies.gaussian import Gaussian, standard_log_density
from robopost.registry import ALGOS

# From a gradient (B,) in log-probabilities to pairs of a tensor with a graph and the gradient in it.
Pull = Callable[[Tensor], list[tuple[Tensor, Tensor]]]


@dataclass
class PPOConfig(AlgoConfig):
    """Config of `PPO`."""

    name: str = "ppo"
    rollout_steps: int = 2048  # per environment
    batch_size: int = 64  # of a minibatch; samples of an epoch that don't fill one are left out
    epochs: int = 10
    gamma: float = 0.99
    gae_lambda: float = 0.95
    lr: float = 3e-4
    lr_decay_updates: int = 0  # linear decay of lr to 0 over this many rollouts, 0 = constant
    adam_eps: float = 1e-5
    clip: float = 0.2
    entropy_coef: float = 0.0
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    normalise_advantage: bool = True  # per minibatch
    target_kl: float = 0.0  # no more changes in this rollout beyond 1.5 times it, 0 = off
    hidden: list[int] = field(default_factory=lambda: [64, 64])  # of the value function
    activation: str = "tanh"  # of the value function

    def __post_init__(self) -> None:
        for name in ("rollout_steps", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("lr", "clip", "max_grad_norm", "adam_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        for name in ("lr_decay_updates", "target_kl", "entropy_coef", "value_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        if self.normalise_advantage and self.batch_size < 2:
            raise ConfigError("algo.batch_size=1 can't be normalised. Fix: algo.normalise_advantage=false")


def gae(
    reward: Tensor, discount: Tensor, done: Tensor, value: Tensor, next_value: Tensor, trace: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), all tensors (T, N).

    delta_t = r_t + discount_t V(s'_t) - V(s_t);  A_t = delta_t + trace (1 - done_t) A_{t+1}

    Args:
        reward: rewards.
        discount: gamma, 0 on termination; a time limit keeps it, so its end is bootstrapped.
        done: episode ended after this step, either way: nothing flows back from the next episode.
        value: V(s_t).
        next_value: V of the true next observation.
        trace: gamma * lambda.

    Returns:
        (advantages, value targets A + V).
    """
    delta = reward + discount * next_value - value
    keep = trace * (~done).to(delta.dtype)
    running = torch.zeros_like(delta[0])
    advantages = []
    # One operation per step: indexing tensors in the loop would take longer than the sum.
    for step_delta, step_keep in zip(reversed(delta.unbind()), reversed(keep.unbind()), strict=True):
        running = torch.addcmul(step_delta, step_keep, running)
        advantages.append(running)
    advantage = torch.stack(advantages[::-1])
    return advantage, advantage + value


def clipped_loss(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """-E[min(r A, clip(r, 1 - eps, 1 + eps) A)] (Schulman et al. 2017, eq. 7)."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def clipped_slope(ratio: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """`clipped_loss`, and its gradient (B,) in the log-probabilities behind `ratio`."""
    gain, bounded = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    # Where the clipped term is the smaller one, the loss doesn't depend on the ratio; elsewhere dr / d log pi = r.
    slope = torch.where(gain <= bounded, gain, 0.0) / -len(gain)
    return -torch.minimum(gain, bounded).mean(), slope


def gaussian_log_prob(chain: Tensor, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-density (B,) of a Gaussian with one std for all states, and what its gradients are made of.

    Args:
        chain: (B, A) the samples.
        mean: (B, A).
        log_std: (A,).

    Returns:
        log-density, its gradients (B, A) in the mean, and the samples (B, A) in units of the std.
    """
    inverse = (-log_std).exp()
    error = (chain - mean) * inverse
    return standard_log_density(error, log_std).sum(1), error * inverse, error


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """E[(r - 1) - log r], a non-negative estimate of KL(old || new) (Schulman 2020, blog)."""
    return (log_ratio.exp() - 1 - log_ratio).mean()


def normalise(advantage: Tensor) -> Tensor:
    """Zero mean and unit standard deviation over the minibatch."""
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)


@ALGOS.register("ppo", config=PPOConfig)
class PPO(Algorithm):
    """PPO: clipped policy gradient on fresh rollouts, for any policy with a log-probability."""

    registry_name = "ppo"
    regime = "onpolicy"
    discrete = True
    steps = ("minibatch_step",)

    def __init__(
        self,
        config: PPOConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if not policy.has_log_prob:
            raise ConfigError(
                f"algo={config.name} needs a policy with a log-probability, policy={policy.registry_name} has none. "
                "Fix: policy=gaussian"
            )
        self.value = ValueNet(
            spec,
            policy.obs_keys,
            config.hidden,
            activation=config.activation,
            init="orthogonal",
            history=policy.history,
        ).to(device)
        self._flat = Flat(policy, self.value)
        self.optimizer = adam(self._flat, config.lr, scheduled=True, eps=config.adam_eps)
        self._keep = torch.ones((), dtype=torch.bool, device=device)  # False once target_kl is exceeded

    @property
    def needs(self) -> Needs:
        """Rollouts of the current policy."""
        cfg = self.config
        return Needs(batch_size=cfg.batch_size, gamma=cfg.gamma, rollout_steps=cfg.rollout_steps)

    def update(self, batch: Batch) -> Metrics:
        """All epochs over one rollout with leading dimensions (T, N).

        Raises:
            DataError: the rollout is smaller than a minibatch, or carries no chain and log-probability.
        """
        cfg = self.config
        if batch.chain is None or batch.log_prob is None:
            raise DataError(f"algo={cfg.name} needs chain and log_prob in its rollout, from Policy.act")
        total = batch.reward.numel()
        if total < cfg.batch_size:
            raise ConfigError(
                f"algo.batch_size={cfg.batch_size} is larger than a rollout of {total} samples. "
                "Fix: raise algo.rollout_steps or lower algo.batch_size"
            )
        if cfg.lr_decay_updates:
            set_lr(self.optimizer, cfg.lr * max(0.0, 1 - self.updates / cfg.lr_decay_updates))
        self.updates += 1
        self._keep.fill_(True)
        advantage, returns, metrics = self._advantages(batch)
        data = {
            **{f"obs/{key}": value.flatten(0, 1) for key, value in batch.obs.items()},
            "chain": batch.chain.flatten(0, 1),
            "log_prob": batch.log_prob.flatten(),
            "advantage": advantage.flatten(),
            "returns": returns.flatten(),
        }
        sums: Metrics = {}
        count = 0
        for _ in range(cfg.epochs):
            order = torch.randperm(total, generator=self.generator, device=self.device)
            whole = order[: total - total % cfg.batch_size]
            columns = [value.index_select(0, whole).split(cfg.batch_size) for value in data.values()]
            for parts in zip(*columns, strict=True):
                rows = dict(zip(data, parts, strict=True))
                for key, value in self.minibatch_step(rows).items():
                    sums[key] = sums[key] + value if key in sums else value
                count += 1
            # Reading the flag costs nothing on CPU; on a GPU it would stall, and masked steps change nothing.
            if cfg.target_kl and self.device.type == "cpu" and not self._keep:
                break
        return metrics | {key: value / count for key, value in sums.items()}

    @torch.no_grad()
    def _advantages(self, batch: Batch) -> tuple[Tensor, Tensor, Metrics]:
        value, next_value = self.value(batch.obs), self.value(batch.next_obs)
        done = batch.terminated | batch.truncated
        trace = self.config.gamma * self.config.gae_lambda
        advantage, returns = gae(batch.reward, batch.discount, done, value, next_value, trace)
        explained = 1 - (returns - value).var() / returns.var().clamp_min(1e-8)
        flat_obs = {key: item.flatten(0, 1) for key, item in batch.obs.items()}
        metrics = {"value/explained_variance": explained, "policy/entropy": self._entropy(flat_obs, batch)}
        return advantage, returns, metrics

    def _entropy(self, obs: Obs, batch: Batch) -> Tensor:
        """Exact where the policy has one, else the estimate -log pi of the rollout's own samples."""
        exact = getattr(self.policy, "entropy", None)
        if exact is not None:
            return exact(obs).mean()
        assert batch.log_prob is not None
        return -batch.log_prob.mean()

    def minibatch_step(self, rows: dict[str, Tensor]) -> Metrics:
        """One gradient step on policy and value; a pure function of the minibatch."""
        cfg = self.config
        obs = below(rows, "obs/")
        log_prob, pull = self._log_prob(obs, rows["chain"])
        value = self.value(obs)
        with torch.no_grad():
            log_ratio = log_prob - rows["log_prob"]
            ratio = log_ratio.exp()
            advantage = normalise(rows["advantage"]) if cfg.normalise_advantage else rows["advantage"]
            policy_loss, slope = clipped_slope(ratio, advantage, cfg.clip)
            error = value - rows["returns"]
            kl = approximate_kl(log_ratio)
            clipped = ((ratio - 1).abs() > cfg.clip).float().mean()
        outputs, slopes = [value], [error * (2 * cfg.value_coef / len(error))]
        if cfg.entropy_coef:
            exact = getattr(self.policy, "entropy", None)
            if exact is None:
                slope = slope + cfg.entropy_coef / len(slope)
            else:
                outputs.append(exact(obs).mean())
                slopes.append(torch.full_like(policy_loss, -cfg.entropy_coef))
        for output, gradient in pull(slope):
            outputs.append(output)
            slopes.append(gradient)
        self._flat.pull_back(outputs, slopes)
        self._flat.clip(cfg.max_grad_norm)
        if cfg.target_kl:
            self._keep.logical_and_(kl <= 1.5 * cfg.target_kl)
            step_where(self.optimizer, self._flat, self._keep)
        else:
            self.optimizer.step()
        return {
            "loss/actor": policy_loss,
            "loss/value": error.square().mean(),
            "policy/kl": kl,
            "policy/clip_fraction": clipped,
        }

    def _log_prob(self, obs: Obs, chain: Tensor) -> tuple[Tensor, Pull]:
        """Log-probability (B,), and what takes a gradient in it back to outputs of the policy's network.

        A Gaussian with one std for all states has a closed form: a third of the operations of its graph.
        """
        policy = self.policy
        if not (isinstance(policy, Gaussian) and policy.constant_std):
            log_prob = policy.log_prob(obs, chain)
            return log_prob.detach(), lambda slope: [(log_prob, slope)]
        mean, log_std = policy.constant_head(policy.output(obs))
        with torch.no_grad():
            log_prob, in_mean, error = gaussian_log_prob(chain.flatten(1), mean, log_std)

        def pull(slope: Tensor) -> list[tuple[Tensor, Tensor]]:
            return [(mean, slope.unsqueeze(1) * in_mean), (log_std, slope @ (error.square() - 1))]

        return log_prob, pull
