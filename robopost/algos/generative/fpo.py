# SPDX-License-Identifier: Apache-2.0
"""FPO: PPO on flow policies whose ratio comes from flow-matching losses (arXiv 2507.21053, "Flow Matching
Policy Gradients").

Reference implementation: github.com/akanazawa/fpo. The policy explores as the flow it is: noise in, action out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Metrics
from robopost.algos.generative.chunk_ppo import ChunkPPOConfig
from robopost.algos.generative.plain_flow import PlainFlowPPO, interpolate
from robopost.algos.online.ppo import approximate_kl, clipped_loss
from robopost.data.batch import Batch, Obs
from robopost.errors import ConfigError, unknown
from robopost.policies.base import Action
from robopost.registry import ALGOS

LOSSES = ("own", "velocity", "epsilon", "sample")


@dataclass
class FPOConfig(ChunkPPOConfig):
    """Config of `FPO`."""

    name: str = "fpo"
    actor_lr: float = 3e-5
    target_kl: float = 0.0
    clip: float = 0.2  # of the ratio
    pairs: int = 8  # (noise, time) pairs per decision
    loss: str = "own"  # squared error of: own (what policy.prediction says) | velocity | epsilon | sample
    average_losses: bool = True  # one ratio per decision; false: one per pair
    normalise_loss: bool = (
        True  # losses in nats of a Gaussian whose variance is their mean; false: as they are
    )
    difference_bound: float = 3.0  # clamp of the change of a loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise unknown("algo.loss", self.loss, LOSSES)
        if self.pairs < 1:
            raise ConfigError(f"algo.pairs={self.pairs} must be at least 1")
        for name in ("clip", "difference_bound"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be above 0")


def matching_loss(velocity: Tensor, noise: Tensor, end: Tensor, t: Tensor, mask: Tensor, loss: str) -> Tensor:
    """Flow-matching losses (B, n) of chunks `end` (B, H, A), mean over dimensions of executed steps.

    All three are the squared error of the velocity with a weight: the prediction of the noise is x_t - t v, that of
    the chunk x_t + (1 - t) v.

    Args:
        velocity: (B, n, H, A) at x_t.
        noise: (B, n, H, A) the x_0 of each x_t.
        end: (B, H, A) executed chunks before clipping.
        t: (B, n) times.
        mask: (B, H) executed steps.
        loss: velocity, epsilon or sample.
    """
    error = (velocity - (end[:, None] - noise)).square().sum(-1) * mask[:, None].to(noise.dtype)
    mean = error.sum(-1) / (mask.sum(-1) * end.shape[-1]).clamp_min(1)[:, None]
    weight = {"velocity": torch.ones_like(t), "epsilon": t.square(), "sample": (1 - t).square()}[loss]
    return weight * mean


def loss_scale(loss: Tensor, mask: Tensor, action_dim: int) -> Tensor:
    """Factors (M, 1) that turn losses (M, n) of a rollout into nats: executed dimensions / (2 mean loss).

    A Gaussian's log-density is -|error|^2 / (2 variance), summed over dimensions; the mean loss stands for its
    variance. Without that the ratio of a policy that knows its actions well hardly leaves 1, whatever it does.
    """
    weight = mask.any(-1).to(loss.dtype)
    mean = (loss.mean(1) * weight).sum() / weight.sum().clamp_min(1)
    return (mask.sum(-1, keepdim=True) * action_dim) / (2 * mean.clamp_min(1e-8))


def log_ratios(old: Tensor, new: Tensor, scale: Tensor, bound: float, average: bool) -> Tensor:
    """Changes (`old` - `new`) `scale`, clamped to +-bound, of losses (B, n): their mean (B, 1), or all (B, n)."""
    change = ((old - new) * scale).clamp(-bound, bound)
    return change.mean(1, keepdim=True) if average else change


@ALGOS.register("fpo", config=FPOConfig)
class FPO(PlainFlowPPO):
    """FPO: clipped policy gradient on the change of the flow-matching loss of executed chunks."""

    registry_name = "fpo"
    config: FPOConfig

    @property
    def space(self) -> str:
        """What the loss is the squared error of."""
        loss = self.config.loss
        return self.policy.prediction if loss == "own" else loss

    @property
    def rows_per_decision(self) -> int:
        """One for every pair."""
        return self.config.pairs

    @torch.no_grad()
    def decide(self, obs: Obs, generator: torch.Generator) -> Action:
        """A sample of the flow; the chain (B, 1, H, A) holds its end before clipping."""
        action = self.policy.act(obs, generator=generator)
        assert action.chain is not None
        return Action(action.chunk, None, action.chain[:, -1:].clone())

    def remember(self, rows: Batch) -> dict[str, Tensor]:
        """Pairs of every decision and their losses, before the first step; later losses are of the same pairs."""
        cfg = self.config
        assert rows.chain is not None
        assert rows.chunk_mask is not None
        end = rows.chain[:, -1]
        t = self.draw_times(len(end), cfg.pairs)
        shape = (len(end), cfg.pairs, *end.shape[1:])
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        velocity = self.velocity_at(rows.obs, interpolate(noise, end[:, None], t), t)
        mask = rows.chunk_mask
        old = matching_loss(velocity, noise, end, t, mask, self.space)
        scale = loss_scale(old, mask, end.shape[-1]) if cfg.normalise_loss else torch.ones_like(old[:, :1])
        return {"end": end, "noise": noise, "t": t, "loss": old, "scale": scale, "mask": mask}

    def actor_loss(self, rows: dict[str, Tensor], obs: Obs) -> tuple[Tensor, Tensor, Metrics]:
        """L_clip with ratio exp(mean(L_old - L_new)), the mean over the pairs (arXiv 2507.21053)."""
        cfg = self.config
        end, noise, t = rows["end"], rows["noise"], rows["t"]
        velocity = self.policy.velocities(interpolate(noise, end[:, None], t), t, self.policy.encoder(obs))
        losses = matching_loss(velocity, noise, end, t, rows["mask"], self.space)
        change = log_ratios(rows["loss"], losses, rows["scale"], cfg.difference_bound, cfg.average_losses)
        ratio = change.exp()
        loss = clipped_loss(ratio, rows["advantage"][:, None].expand_as(ratio), cfg.clip)
        with torch.no_grad():
            metrics = {
                "policy/clip_fraction": ((ratio - 1).abs() > cfg.clip).float().mean(),
                "policy/ratio": ratio.mean(),
                "loss/matching": losses.mean(),
            }
        return loss, approximate_kl(change.detach()), metrics
