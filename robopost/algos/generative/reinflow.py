# SPDX-License-Identifier: Apache-2.0
"""ReinFlow: PPO on flow policies whose steps carry learned, bounded noise (arXiv 2505.22094).

Reference implementation: github.com/ReinFlow/ReinFlow. The noise lives in this algorithm: what it exports is a flow
policy like the one it began with, without any.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.generative.noisy_chain import NoisyChainConfig, NoisyChainPPO
from robopost.algos.online.ppo import approximate_kl, clipped_loss
from robopost.data.batch import Batch, below
from robopost.errors import ConfigError
from robopost.nets.mlp import MLP
from robopost.policies.flow import FlowPolicy
from robopost.policies.gaussian import HALF_LOG_2PI
from robopost.registry import ALGOS

HOLD = 0.35  # share of noise_decay_updates before the upper bound begins to fall
KEPT = 0.7  # of the distance between the bounds that is left at the end


@dataclass
class ReinFlowConfig(NoisyChainConfig):
    """Config of `ReinFlow`."""

    name: str = "reinflow"
    noise_min: float = 0.1  # bounds of the noise's std, normalised action units; equal = constant noise
    noise_max: float = 0.24
    noise_hidden: list[int] = field(default_factory=lambda: [64, 64])
    noise_decay_updates: int = 0  # rollouts over which noise_max falls towards noise_min, 0 = constant bounds
    normalise_ratio: bool = True  # clip the ratio's geometric mean over steps and dimensions, not the ratio
    log_prob_bound: float = 1.0  # clamp of the normalised log-probability, 0 = none
    entropy_coef: float = 0.03
    anchor_coef: float = 0.0  # of the squared distance to the actions of the policy that training began with

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.noise_min <= self.noise_max:
            raise ConfigError(
                f"algo.noise_min={self.noise_min} must lie in (0, {self.noise_max}] (algo.noise_max)"
            )
        for name in ("noise_decay_updates", "log_prob_bound", "entropy_coef", "anchor_coef"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


class NoiseNet(nn.Module):
    """Std of the noise from time and observation, within bounds whatever the weights (ReinFlow, section 4).

    log sigma^2 = log low^2 + (log high^2 - log low^2) (tanh z + 1) / 2
    """

    high: Tensor

    def __init__(
        self, inputs: int, hidden: list[int], shape: tuple[int, int], low: float, high: float
    ) -> None:
        super().__init__()
        self.net = MLP(inputs, hidden, shape[0] * shape[1], "tanh")
        self.shape = shape
        self.low = low
        self.register_buffer("high", torch.tensor(high))

    def forward(self, time: Tensor, cond: Tensor) -> Tensor:
        """Times (n, T) and observations (B, D), both embedded, to (B, n, H, A)."""
        rows = torch.cat(
            [time.expand(len(cond), -1, -1), cond[:, None].expand(-1, time.shape[0], -1)], dim=-1
        )
        share = (self.net(rows).tanh() + 1) / 2
        low = math.log(self.low)
        return (low + (self.high.log() - low) * share).exp().unflatten(-1, self.shape)


def chain_sum(values: Tensor, execute: int) -> Tensor:
    """Sum (B,) of per-dimension values (B, n, H, A) of a chain's last n steps, as far as they matter.

    What the very last step draws for the actions behind the first `execute` reaches neither the environment nor another
    step. Its density integrates to 1 whatever the rest, so leaving it out is exact, and takes its noise out of the
    ratio. In the steps before, those dimensions go through the network and shape what is executed: they stay.
    """
    return values[:, :-1].sum((1, 2, 3)) + values[:, -1, :execute].sum((1, 2))


def chain_size(values: Tensor, execute: int) -> int:
    """How many numbers `chain_sum` adds up in one sample, and those of x_0."""
    _, steps, horizon, actions = values.shape
    return (steps * horizon + execute) * actions


def geometric_log_prob(density: Tensor, start: Tensor, execute: int, bound: float) -> Tensor:
    """Log p(x_0 .. x_K) per step and dimension (B,), clamped to +-bound (ReinFlow, appendix; bound 0 = no clamp).

    Args:
        density: (B, n, H, A) of the fine-tuned steps, per dimension.
        start: (B, H, A) x_0, whose density under N(0, I) counts as one more step.
        execute: executed steps of a chunk, see `chain_sum`.
        bound: largest magnitude.
    """
    begin = (-0.5 * start.square() - HALF_LOG_2PI).sum((1, 2))
    mean = (begin + chain_sum(density, execute)) / chain_size(density, execute)
    return mean.clamp(-bound, bound) if bound else mean


def entropy_rate(std: Tensor, execute: int) -> Tensor:
    """Entropy per step and dimension (B,) of what `geometric_log_prob` is the density of, given std (B, n, H, A)."""
    unit = 0.5 + HALF_LOG_2PI  # of N(0, 1)
    begin = std[0, 0].numel() * unit
    return (begin + chain_sum(std.log() + unit, execute)) / chain_size(std, execute)


@ALGOS.register("reinflow", config=ReinFlowConfig)
class ReinFlow(NoisyChainPPO):
    """ReinFlow: clipped policy gradient on the density of a noisy flow."""

    registry_name = "reinflow"
    policies = (FlowPolicy,)
    config: ReinFlowConfig
    policy: FlowPolicy

    def build_actor(self) -> list[nn.Module]:
        """The policy and the noise network."""
        modules = super().build_actor()
        cfg, policy = self.config, self.policy
        if policy.grid.solver != "euler":
            raise ConfigError(
                f"algo={self.registry_name} adds noise to Euler steps, policy.solver={policy.grid.solver}. "
                "Fix: policy.solver=euler when training the base policy"
            )
        if cfg.anchor_coef:
            self.anchor = copy.deepcopy(policy).requires_grad_(False)
        if cfg.noise_min == cfg.noise_max:
            return modules
        probe = policy.time_embedding(range(1))
        self.noise = NoiseNet(
            probe.shape[-1] + policy.feature_dim,
            cfg.noise_hidden,
            (policy.horizon, policy.spec.action_dim),
            cfg.noise_min,
            cfg.noise_max,
        ).to(self.device)
        return [*modules, self.noise]

    def stds(self, cond: Tensor, steps: range) -> Tensor:
        """Learned in fine-tuned steps, `noise_min` before; no gradient reaches the policy's embeddings."""
        cfg = self.config
        if cfg.noise_min == cfg.noise_max:
            shape = (1, len(steps), self.policy.horizon, self.policy.spec.action_dim)
            return torch.full(shape, cfg.noise_min, device=cond.device)
        std = self.noise(self.policy.time_embedding(steps).detach(), self.policy.features(cond).detach())
        frozen = self.policy.frozen_steps - steps.start
        if frozen > 0:
            std = torch.cat([torch.full_like(std[:, :frozen], cfg.noise_min), std[:, frozen:]], 1)
        return std

    def reduce(self, density: Tensor, chain: Tensor) -> Tensor:
        """The geometric mean's logarithm, or with `normalise_ratio=false` the sum over steps and dimensions; (B,)."""
        execute = self.policy.execute
        if self.config.normalise_ratio:
            return geometric_log_prob(density, chain[:, 0], execute, self.config.log_prob_bound)
        return chain_sum(density, execute)

    def chain_loss(
        self, log_prob: Tensor, rows: dict[str, Tensor], std: Tensor
    ) -> tuple[Tensor, Tensor, Metrics]:
        """L_clip - c_ent h + c_anchor |a - a_base|^2 (ReinFlow, section 4)."""
        cfg = self.config
        log_ratio = log_prob - rows["log_prob"]
        ratio = log_ratio.exp()
        entropy = entropy_rate(std, self.policy.execute).mean()
        loss = clipped_loss(ratio, rows["advantage"], cfg.clip) - cfg.entropy_coef * entropy
        with torch.no_grad():
            metrics = {
                "policy/clip_fraction": ((ratio - 1).abs() > cfg.clip).float().mean(),
                "policy/entropy_rate": entropy.detach(),
                "policy/noise": std.mean(),
            }
            if cfg.normalise_ratio and cfg.log_prob_bound:
                metrics["policy/clamped"] = (log_prob.abs() >= cfg.log_prob_bound).float().mean()
        if cfg.anchor_coef:
            obs = below(rows, "obs/")
            start = rows["chain"][:, 0]
            distance = (self.policy.chain(obs, start)[-1] - self.anchor.chain(obs, start)[-1]).square().mean()
            loss = loss + cfg.anchor_coef * distance
            metrics["policy/anchor_distance"] = distance.detach()
        return loss, approximate_kl(log_ratio.detach()), metrics

    def update(self, batch: Batch) -> Metrics:
        """See `ChunkPPO.update`; afterwards the upper bound of the noise takes its next value."""
        metrics = super().update(batch)
        cfg = self.config
        if cfg.noise_min == cfg.noise_max:
            return metrics
        metrics["policy/noise_bound"] = self.noise.high.clone()
        if cfg.noise_decay_updates:
            self.noise.high.fill_(
                noise_bound(self.updates / cfg.noise_decay_updates, cfg.noise_min, cfg.noise_max)
            )
        return metrics


def noise_bound(progress: float, low: float, high: float) -> float:
    """Upper bound of the noise at `progress` in [0, 1]: held, then half a cosine to 0.3 low + 0.7 high."""
    fall = min(1.0, max(0.0, (progress - HOLD) / (1 - HOLD)))
    end = (1 - KEPT) * low + KEPT * high
    return end + (high - end) * 0.5 * (1 + math.cos(math.pi * fall))
