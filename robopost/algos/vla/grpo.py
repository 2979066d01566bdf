# SPDX-License-Identifier: Apache-2.0
"""GRPO on token policies: episodes of one and the same start are compared by their outcome (arXiv 2402.03300).

As SimpleVLA-RL (arXiv 2509.09674) trains VLAs: no critic, no KL term, token-level ratios with a higher upper clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.algos.base import Metrics
from robopost.algos.online.ppo import approximate_kl
from robopost.algos.vla.frame import (
    Decisions,
    EpisodeAlgorithm,
    EpisodesConfig,
    score_taken,
    set_temperature,
    tokens_only,
)
from robopost.algos.vla.objectives import clipped_tokens, entropy, group_advantages, slot_mean
from robopost.data.batch import Spec, below
from robopost.errors import ConfigError, unknown
from robopost.policies.base import Policy
from robopost.policies.tokens import TokenPolicy, taken
from robopost.registry import ALGOS

OUTCOMES = ("success", "return")


@dataclass
class OutcomeConfig(EpisodesConfig):
    """Config of methods with a group-relative term."""

    clip_low: float = 0.2  # ratios of tokens are clipped to 1 - clip_low .. 1 + clip_high
    clip_high: float = 0.28
    outcome: str = "success"  # success | return: what episodes of a group are compared by

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outcome not in OUTCOMES:
            raise unknown("algo.outcome", self.outcome, OUTCOMES)
        if not 0 < self.clip_low < 1:
            raise ConfigError(f"algo.clip_low={self.clip_low} must lie in (0, 1)")
        if not self.clip_high > 0:
            raise ConfigError(f"algo.clip_high={self.clip_high} must be above 0")

    def needs_groups(self, what: str) -> None:
        """Raise ConfigError where there is nothing to compare an episode with."""
        if self.group < 2:
            raise ConfigError(
                f"algo.group={self.group}: {what} compares episodes of the same start. Fix: algo.group=8, a divisor of "
                "env.num_envs"
            )


@dataclass
class GRPOConfig(OutcomeConfig):
    """Config of `GRPO`."""

    name: str = "grpo"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_groups("algo=grpo")
        if self.entropy_coef < 0:
            raise ConfigError(f"algo.entropy_coef={self.entropy_coef} must be 0 or more")


def outcome_loss(log_prob: Tensor, rows: dict[str, Tensor], config: OutcomeConfig) -> tuple[Tensor, Metrics]:
    """Clipped surrogate, a mean over the valid slots of groups with unequal outcomes.

    Args:
        log_prob: (B, H, A) of the taken tokens now.
        rows: `old` (B, H, A) when they were drawn, `advantage` (B,), `mixed` (B,) bool, `valid` (B, H, A) bool.
        config: the clip range.
    """
    valid = rows["valid"] & rows["mixed"][:, None, None]
    log_ratio = torch.where(valid, log_prob - rows["old"], torch.zeros_like(log_prob))
    ratio = log_ratio.exp()
    low, high = config.clip_low, config.clip_high
    loss = slot_mean(clipped_tokens(ratio, rows["advantage"][:, None, None], low, high), valid)
    with torch.no_grad():
        beyond = ((ratio < 1 - low) | (ratio > 1 + high)).float()
        metrics = {
            "loss/outcome": loss.detach(),
            "policy/clip_fraction": slot_mean(beyond, valid),
            "policy/kl": approximate_kl(log_ratio) * valid.numel() / valid.sum().clamp_min(1),
        }
    return loss, metrics


def outcome_columns(rows: Decisions, config: OutcomeConfig) -> tuple[dict[str, Tensor], Metrics]:
    """`advantage` (n,) and `mixed` (n,) of decisions, from the outcomes of their episodes."""
    outcome = rows.success if config.outcome == "success" else rows.returns
    advantage, mixed = group_advantages(outcome, config.group)
    columns = {"advantage": advantage[rows.episode], "mixed": mixed[rows.episode]}
    return columns, {"data/mixed_groups": mixed.float().mean()}


@ALGOS.register("grpo", config=GRPOConfig)
class GRPO(EpisodeAlgorithm):
    """GRPO: clipped policy gradient on tokens, advantages from the outcomes of a group."""

    registry_name = "grpo"
    config: GRPOConfig
    policy: TokenPolicy

    def __init__(
        self,
        config: GRPOConfig,
        policy: Policy,
        spec: Spec,
        *,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        tokens_only(policy, "grpo")
        super().__init__(config, policy, spec, device=device, generator=generator)
        set_temperature(self.policy, config.temperature)

    def prepare(self, rows: Decisions) -> tuple[dict[str, Tensor], Metrics]:
        """Log-probabilities of the taken tokens, and advantages; groups of equal outcomes are dropped."""
        columns, metrics = outcome_columns(rows, self.config)
        metrics |= {"data/valid": rows.mask.float().mean()}
        rows = rows.keep(columns["mixed"])
        columns, _ = outcome_columns(rows, self.config)
        data = rows.columns() | columns | {"tokens": rows.tokens}
        if len(rows):
            data["old"] = score_taken(self.policy, rows.obs, rows.tokens)
        return data, metrics

    def loss(self, rows: dict[str, Tensor]) -> tuple[Tensor, Metrics]:
        """L_clip - c_ent h, h the mean entropy of a slot."""
        log_probs = self.policy.log_probs(below(rows, "obs/"), rows["tokens"]).float()
        loss, metrics = outcome_loss(taken(log_probs, rows["tokens"]), rows, self.config)
        spread = slot_mean(entropy(log_probs), rows["valid"])
        loss = loss - self.config.entropy_coef * spread if self.config.entropy_coef else loss
        return loss, metrics | {"policy/entropy": spread.detach()}
