# SPDX-License-Identifier: Apache-2.0
"""DPPO: PPO whose actions are the denoising steps of a diffusion policy (arXiv 2409.00588).

Reference implementation: github.com/irom-princeton/dppo. The noise lives in this algorithm: what it exports is a
diffusion policy like the one it began with, without the floor under its noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.generative.noisy_chain import NoisyChainConfig, NoisyChainPPO
from robopost.algos.online.ppo import approximate_kl
from robopost.errors import ConfigError, unknown
from robopost.policies.diffusion import SAMPLERS, Diffusion
from robopost.registry import ALGOS


@dataclass
class DPPOConfig(NoisyChainConfig):
    """Config of `DPPO`."""

    name: str = "dppo"
    sampler: str = "ddpm"  # ddpm | ddim: the chain that is fine-tuned and, without the floor, exported
    eta: float = 1.0  # ddim: noise while training relative to ddpm's; the exported policy samples without
    min_sampling_std: float = 0.1  # floor under the noise of every step, normalised action units
    min_log_prob_std: float = 0.1  # floor under the std of densities; below min_sampling_std = no effect
    noise_clip: float = 3.0  # standard normal noise is clamped to +-this, inf = not
    clip_base: float = 0.01  # clip range of the first fine-tuned step; it grows to `clip` at the last one
    clip_rate: float = 3.0  # how late it grows
    gamma_denoising: float = 0.99  # discount of the advantage per step towards the noisy end
    log_prob_min: float = -5.0  # clamp of the log-density of every dimension, -inf and inf = none
    log_prob_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in SAMPLERS:
            raise unknown("algo.sampler", self.sampler, SAMPLERS)
        for name in ("eta", "gamma_denoising"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("min_sampling_std", "min_log_prob_std", "noise_clip", "clip_base", "clip_rate"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")
        if not self.log_prob_min < self.log_prob_max:
            raise ConfigError(
                f"algo.log_prob_min={self.log_prob_min} must be below algo.log_prob_max={self.log_prob_max}"
            )


def denoising_weights(count: int, gamma: float, device: torch.device) -> Tensor:
    """Weights gamma^(n - 1 - i) (n,) of the advantage in the n fine-tuned steps, noisiest first (DPPO, section 4)."""
    return gamma ** torch.arange(count - 1, -1, -1, dtype=torch.float32, device=device)


def clip_ranges(count: int, first: float, last: float, rate: float, device: torch.device) -> Tensor:
    """Clip ranges (n,), growing exponentially from the first fine-tuned step to the last (DPPO, appendix).

    eps_i = first + (last - first) (e^{rate u} - 1) / (e^rate - 1), u = i / (n - 1); a single step has `last`.
    """
    share = torch.linspace(0.0 if count > 1 else 1.0, 1.0, count, device=device)
    return first + (last - first) * (rate * share).expm1() / math.expm1(rate)


def step_log_prob(density: Tensor, executed: int, low: float, high: float) -> Tensor:
    """Log-probability of each step (B, n): mean over executed actions and dimensions, each clamped to [low, high].

    Args:
        density: (B, n, H, A) log-density per dimension.
        executed: actions of the chunk that the environment saw; the others earned nothing.
        low: see above.
        high: see above.
    """
    return density[:, :, :executed].clamp(low, high).mean((2, 3))


def dppo_loss(ratio: Tensor, advantage: Tensor, weight: Tensor, clip: Tensor) -> Tensor:
    """-E[min(r_i w_i A, clip(r_i, 1 - eps_i, 1 + eps_i) w_i A)] over decisions and steps (DPPO, section 4).

    Args:
        ratio: (B, n) of every step.
        advantage: (B,) of the decision.
        weight: (n,) w_i.
        clip: (n,) eps_i.
    """
    credit = advantage[:, None] * weight
    return -torch.minimum(ratio * credit, ratio.clamp(1 - clip, 1 + clip) * credit).mean()


class TunedSteps(nn.Module):
    """What differs between the fine-tuned steps: `denoising_weights` and `clip_ranges`, both (n,)."""

    weight: Tensor
    clip: Tensor

    def __init__(self, weight: Tensor, clip: Tensor) -> None:
        super().__init__()
        # Not persistent: they follow from the config, not from training.
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("clip", clip, persistent=False)


@ALGOS.register("dppo", config=DPPOConfig)
class DPPO(NoisyChainPPO):
    """DPPO: clipped policy gradient on every denoising step."""

    registry_name = "dppo"
    policies = (Diffusion,)
    fix = "policy=pretrained policy.path=<run of a diffusion policy>, or policy=diffusion"
    config: DPPOConfig
    policy: Diffusion

    def build_actor(self) -> list[nn.Module]:
        """The policy, which goes on sampling as it is trained, without additional noise."""
        modules = super().build_actor()
        cfg, policy, tuned = self.config, self.policy, len(self.tuned)
        self.noisy = policy.make_sampler(cfg.sampler, cfg.eta)
        policy.use_sampler(cfg.sampler)
        self.per_step = TunedSteps(
            denoising_weights(tuned, cfg.gamma_denoising, self.device),
            clip_ranges(tuned, cfg.clip_base, cfg.clip, cfg.clip_rate, self.device),
        )
        return modules

    @property
    def chain_options(self) -> dict[str, Any]:
        """The sampler of training."""
        return {"sampler": self.noisy}

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise without its tails."""
        return super().draw(shape, generator).clamp(-self.config.noise_clip, self.config.noise_clip)

    def stds(self, cond: Tensor, steps: range) -> Tensor:
        """The sampler's, floored in frozen steps too."""
        std = self.noisy.std[steps.start : steps.stop].clamp_min(self.config.min_sampling_std)
        return std[None, :, None, None]

    def density_std(self, std: Tensor) -> Tensor:
        """Never below `min_log_prob_std`."""
        return std.clamp_min(self.config.min_log_prob_std)

    def reduce(self, density: Tensor, chain: Tensor) -> Tensor:
        """Every step has a log-probability of its own (B, n)."""
        cfg = self.config
        return step_log_prob(density, self.policy.execute, cfg.log_prob_min, cfg.log_prob_max)

    def chain_loss(
        self, log_prob: Tensor, rows: dict[str, Tensor], std: Tensor
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Clipped loss of all steps of the minibatch's decisions."""
        log_ratio = log_prob - rows["log_prob"]
        ratio, clip = log_ratio.exp(), self.per_step.clip
        loss = dppo_loss(ratio, rows["advantage"], self.per_step.weight, clip)
        with torch.no_grad():
            beyond = ((ratio - 1).abs() > clip).float()
            metrics = {
                "policy/clip_fraction": beyond.mean(),
                "policy/clip_fraction_last": beyond[:, -1].mean(),
            }
        return loss, approximate_kl(log_ratio.detach()), metrics
