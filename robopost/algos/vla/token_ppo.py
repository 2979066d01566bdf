# SPDX-License-Identifier: Apache-2.0
"""PPO on token policies: a critic per decision, clipped ratios of its tokens (Schulman et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.generative.chunk_ppo import ChunkPPO, ChunkPPOConfig
from robopost.algos.online.ppo import approximate_kl
from robopost.algos.vla.frame import score_taken, set_temperature
from robopost.algos.vla.objectives import clipped_tokens, entropy, slot_mean
from robopost.data.batch import Batch, Obs
from robopost.errors import ConfigError
from robopost.policies.tokens import TokenPolicy, taken
from robopost.registry import ALGOS


@dataclass
class TokenPPOConfig(ChunkPPOConfig):
    """Config of `TokenPPO`."""

    name: str = "token_ppo"
    clip_low: float = 0.2  # ratios of tokens are clipped to 1 - clip_low .. 1 + clip_high
    clip_high: float = 0.28
    entropy_coef: float = 0.0
    temperature: float = 0.0  # of sampling and of every log-probability; 0 = the policy's own

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip_low < 1:
            raise ConfigError(f"algo.clip_low={self.clip_low} must lie in (0, 1)")
        if not self.clip_high > 0:
            raise ConfigError(f"algo.clip_high={self.clip_high} must be above 0")
        for name in ("entropy_coef", "temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more")


@ALGOS.register("token_ppo", config=TokenPPOConfig)
class TokenPPO(ChunkPPO):
    """PPO on token policies: clipped policy gradient on every token of an executed step."""

    registry_name = "token_ppo"
    policies = (TokenPolicy,)
    kind = "token"
    fix = "policy=pretrained policy.path=<run of a token policy>, or policy=token"
    config: TokenPPOConfig
    policy: TokenPolicy

    def build_actor(self) -> list[nn.Module]:
        """The policy, at the temperature of the config."""
        set_temperature(self.policy, self.config.temperature)
        return super().build_actor()

    def remember(self, rows: Batch) -> dict[str, Tensor]:
        """Tokens, their log-probabilities, and which of them were executed."""
        assert rows.chain is not None
        assert rows.chunk_mask is not None
        tokens = rows.chain[:, 0]
        old = score_taken(self.policy, rows.obs, tokens)
        return {"tokens": tokens, "old": old, "valid": rows.chunk_mask.unsqueeze(-1).expand_as(tokens)}

    def actor_loss(self, rows: dict[str, Tensor], obs: Obs) -> tuple[Tensor, Tensor, Metrics]:
        """L_clip - c_ent h over executed tokens, all with the advantage of their decision."""
        cfg, valid = self.config, rows["valid"]
        log_probs = self.policy.log_probs(obs, rows["tokens"]).float()
        log_prob = taken(log_probs, rows["tokens"])
        log_ratio = torch.where(valid, log_prob - rows["old"], torch.zeros_like(log_prob))
        ratio = log_ratio.exp()
        surrogate = clipped_tokens(ratio, rows["advantage"][:, None, None], cfg.clip_low, cfg.clip_high)
        spread = slot_mean(entropy(log_probs), valid)
        loss = slot_mean(surrogate, valid) - cfg.entropy_coef * spread
        with torch.no_grad():
            beyond = ((ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)).float()
            metrics = {"policy/clip_fraction": slot_mean(beyond, valid), "policy/entropy": spread.detach()}
            # Per executed token; the others add nothing to the sum.
            divergence = approximate_kl(log_ratio) * valid.numel() / valid.sum().clamp_min(1)
        return loss, divergence, metrics
