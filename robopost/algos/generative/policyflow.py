# SPDX-License-Identifier: Apache-2.0
"""PolicyFlow: PPO on flow policies whose ratio comes from the velocity at one point (arXiv 2602.01156).

The action is the end of the flow plus Gaussian noise. The noise belongs to this algorithm: what it exports is a flow
policy like the one it began with, without any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.generative.chunk_ppo import ChunkPPOConfig
from robopost.algos.generative.plain_flow import PlainFlowPPO, interpolate
from robopost.algos.online.ppo import clipped_loss
from robopost.data.batch import Batch, Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.masked import masked_mean
from robopost.policies.base import Action, Policy
from robopost.policies.gaussian import HALF_LOG_2PI, gaussian_kl, normal_log_density
from robopost.registry import ALGOS

LOG_STD = (-5.0, 2.0)  # bounds of the noise's log std
STEP = 1.5  # factor by which the learning rate rises or falls
ROUNDING = 1e-7  # a KL below it is what rounding makes of equal velocities


@dataclass
class PolicyFlowConfig(ChunkPPOConfig):
    """Config of `PolicyFlow`."""

    name: str = "policyflow"
    actor_lr: float = 1e-4  # where it begins, with desired_kl
    weight_decay: float = 1e-5
    target_kl: float = 0.0
    clip: float = 0.2  # of the ratio
    noise_init: float = 0.2  # std of the noise at the start, normalised action units; learned from there
    entropy_coef: float = 0.0025  # of the noise's entropy
    brownian_coef: float = 0.0025  # of the term that keeps the flow from contracting to one mode
    desired_kl: float = 0.01  # the actor's learning rate follows it, 0 = constant
    lr_min: float = 1e-5  # bounds of the actor's learning rate
    lr_max: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.clip > 0:
            raise ConfigError(f"algo.clip={self.clip} must be above 0")
        low, high = (math.exp(bound) for bound in LOG_STD)
        if not low <= self.noise_init <= high:
            raise ConfigError(f"algo.noise_init={self.noise_init} must lie in [{low:.4f}, {high:.3f}]")
        for name in ("entropy_coef", "brownian_coef", "desired_kl"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")
        if not self.desired_kl:
            return
        if not 0 < self.lr_min <= self.actor_lr <= self.lr_max:
            raise ConfigError(
                f"algo.actor_lr={self.actor_lr} must lie in [{self.lr_min}, {self.lr_max}] (algo.lr_min, algo.lr_max)"
            )
        if self.lr_decay_updates:
            raise ConfigError(
                f"algo.lr_decay_updates={self.lr_decay_updates} and algo.desired_kl={self.desired_kl} both set the "
                "learning rate. Fix: one of them 0"
            )


class ActionNoise(nn.Module):
    """Learned std of the noise, one for all states: log std (H, A) within `LOG_STD`."""

    def __init__(self, horizon: int, action_dim: int, std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((horizon, action_dim), math.log(std)))

    def forward(self) -> Tensor:
        """Log std (H, A)."""
        return self.log_std.clamp(*LOG_STD)


def executed_sum(value: Tensor, mask: Tensor) -> Tensor:
    """Sum (B,) of `value` (B, H, A) over dimensions of the steps where `mask` (B, H) is True."""
    return (value * mask.unsqueeze(-1).to(value.dtype)).sum((1, 2))


def log_ratio(noise: Tensor, shift: Tensor, log_std: Tensor, old_log_std: Tensor, mask: Tensor) -> Tensor:
    """Logarithm (B,) of N(noise; shift, std^2) / N(noise; 0, old_std^2): the end of the flow has moved by `shift`.

    The noise is independent between steps, so leaving out those that were not executed gives the density of the
    others exactly.

    Args:
        noise: (B, H, A) what was added to the end of the flow.
        shift: (B, H, A) change of the velocity since then, at one point.
        log_std: (H, A) now.
        old_log_std: (B, H, A) as it was sampled with.
        mask: (B, H) executed steps.
    """
    old = normal_log_density(noise, torch.zeros_like(noise), old_log_std)
    return executed_sum(normal_log_density(noise, shift, log_std) - old, mask)


def noise_kl(shift: Tensor, log_std: Tensor, old_log_std: Tensor, mask: Tensor) -> Tensor:
    """KL(N(0, old_std^2) || N(shift, std^2)) over executed steps, mean over samples; a scalar."""
    each = gaussian_kl(torch.zeros_like(shift), old_log_std, shift, log_std.expand_as(shift))
    return executed_sum(each, mask).mean()


def noise_entropy(log_std: Tensor, mask: Tensor) -> Tensor:
    """Entropy of the noise in executed steps, summed over them, mean over samples; a scalar."""
    return executed_sum((log_std + 0.5 + HALF_LOG_2PI).expand(len(mask), -1, -1), mask).mean()


def brownian_loss(velocity: Tensor, old: Tensor, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """Mean of ((1 - t) v - (x_t - t v_old))^2 over executed steps and dimensions.

    On a straight line x_t - t v_old is its start: the term asks for a velocity that keeps the noise's spread.
    """
    at = t[:, None, None]
    return masked_mean(((1 - at) * velocity - (x - at * old)).square(), mask)


def adapted_lr(lr: Tensor, kl: Tensor, desired: float, low: float, high: float) -> Tensor:
    """Learning rate for the next step: a factor 1.5 down above 2 `desired`, up below `desired` / 2."""
    lower, higher = (lr / STEP).clamp_min(low), (lr * STEP).clamp_max(high)
    slow = (kl < desired / 2) & (kl > ROUNDING)
    return torch.where(kl > 2 * desired, lower, torch.where(slow, higher, lr))


@ALGOS.register("policyflow", config=PolicyFlowConfig)
class PolicyFlow(PlainFlowPPO):
    """PolicyFlow: clipped policy gradient on a flow's end with Gaussian noise."""

    registry_name = "policyflow"
    config: PolicyFlowConfig

    def __init__(
        self,
        config: PolicyFlowConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        if config.desired_kl:
            for group in self.actor_optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)

    def build_actor(self) -> list[nn.Module]:
        """The policy and the noise's std."""
        modules = super().build_actor()
        policy = self.policy
        self.noise = ActionNoise(policy.horizon, policy.spec.action_dim, self.config.noise_init).to(
            self.device
        )
        return [*modules, self.noise]

    @torch.no_grad()
    def decide(self, obs: Obs, generator: torch.Generator) -> Action:
        """The flow's end plus noise; the chain (B, 3, H, A) holds x_0, x_1 and x_1 + noise."""
        obs = self.policy.normaliser.obs(obs)
        start = self.policy.start(len(next(iter(obs.values()))), generator, deterministic=False)
        end = self.policy.chain(obs, start)[-1]
        draw = torch.randn(end.shape, generator=generator, device=end.device)
        chain = torch.stack([start, end, end + self.noise().exp() * draw], 1)
        chunk = chain[:, -1].clamp(-self.policy.clip, self.policy.clip)
        return Action(self.policy.normaliser.unnormalise_action(chunk), None, chain)

    def remember(self, rows: Batch) -> dict[str, Tensor]:
        """One point of the line from x_0 to x_1 per decision and the velocity there, before it changes."""
        assert rows.chain is not None
        assert rows.chunk_mask is not None
        start, end, noisy = rows.chain.unbind(1)
        t = self.draw_times(len(start))
        x = interpolate(start, end, t)
        velocity = self.velocity_at(rows.obs, x[:, None], t[:, None])[:, 0]
        return {
            "x": x,
            "t": t,
            "velocity": velocity,
            "noise": noisy - end,
            "log_std": self.noise().expand_as(x).clone(),
            "mask": rows.chunk_mask,
        }

    def actor_loss(self, rows: dict[str, Tensor], obs: Obs) -> tuple[Tensor, Tensor, Metrics]:
        """L_clip - c_ent H + c_br L_Brownian (arXiv 2602.01156)."""
        cfg, mask = self.config, rows["mask"]
        velocity = self.policy.velocity(rows["x"], rows["t"], self.policy.encoder(obs))
        shift, log_std = velocity - rows["velocity"], self.noise()
        ratio = log_ratio(rows["noise"], shift, log_std, rows["log_std"], mask).exp()
        entropy = noise_entropy(log_std, mask)
        loss = clipped_loss(ratio, rows["advantage"], cfg.clip) - cfg.entropy_coef * entropy
        brownian = brownian_loss(velocity, rows["velocity"], rows["x"], rows["t"], mask)
        if cfg.brownian_coef:
            loss = loss + cfg.brownian_coef * brownian
        with torch.no_grad():
            kl = noise_kl(shift, log_std, rows["log_std"], mask)
            metrics = {
                "policy/clip_fraction": ((ratio - 1).abs() > cfg.clip).float().mean(),
                "policy/entropy": entropy.detach(),
                "policy/noise": log_std.exp().mean(),
                "policy/velocity_change": masked_mean(shift.square(), mask).sqrt(),
                "loss/brownian": brownian.detach(),
            }
        return loss, kl, metrics

    @torch.no_grad()
    def before_step(self, kl: Tensor) -> Metrics:
        """The learning rate follows the KL divergence, on the device."""
        cfg = self.config
        if not cfg.desired_kl:
            return {}
        rate = self.actor_optimizer.param_groups[0]["lr"]
        rate.copy_(adapted_lr(rate, kl, cfg.desired_kl, cfg.lr_min, cfg.lr_max))
        return {"policy/lr": rate.clone()}
