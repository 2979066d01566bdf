# SPDX-License-Identifier: Apache-2.0
"""Policy gradient through the density of a denoising chain: what ReinFlow and DPPO share.

With Gaussian noise added to its steps the chain x_0 .. x_K of a flow or diffusion policy is a Markov chain, and
log p(x_1 .. x_K | x_0, s) is a sum of Gaussian log-densities. Nothing is clipped between the steps, so it is exact.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.algos.base import Metrics
from robopost.algos.generative.chunk_ppo import ChunkPPO, ChunkPPOConfig
from robopost.data.batch import Batch, Obs
from robopost.errors import ConfigError
from robopost.policies.base import Action
from robopost.policies.chain import ChainPolicy
from robopost.policies.gaussian import normal_log_density


@dataclass
class NoisyChainConfig(ChunkPPOConfig):
    """Config of methods that add noise to the chain."""

    finetune_steps: int = (
        0  # last steps of the chain that are fine-tuned, 0 = all; a frozen copy takes the others
    )
    clip: float = 0.01  # of the ratio

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finetune_steps < 0:
            raise ConfigError(f"algo.finetune_steps={self.finetune_steps} must be 0 (all) or more")
        if not self.clip > 0:
            raise ConfigError(f"algo.clip={self.clip} must be above 0")


class NoisyChainPPO(ChunkPPO):
    """Explores with noise in every step of the chain, learns from the densities of the fine-tuned steps."""

    config: NoisyChainConfig
    policy: ChainPolicy

    def build_actor(self) -> list[nn.Module]:
        """The policy, its first steps frozen."""
        wanted, steps = self.config.finetune_steps, self.policy.num_steps
        if wanted > steps:
            raise ConfigError(
                f"algo.finetune_steps={wanted} must lie in 0..{steps}, the steps of the policy's chain; 0 = all"
            )
        self.policy.freeze_first(steps - wanted if wanted else self.policy.frozen_steps)
        return [self.policy]

    @property
    def tuned(self) -> range:
        """Indices k of the fine-tuned steps, the last ones of the chain."""
        return range(self.policy.frozen_steps, self.policy.num_steps)

    @property
    def rows_per_decision(self) -> int:
        """One for every fine-tuned step."""
        return len(self.tuned)

    @property
    def chain_options(self) -> dict[str, Any]:
        """What `ChainPolicy.means` needs besides chunks and observations."""
        return {}

    @abstractmethod
    def stds(self, cond: Tensor, steps: range) -> Tensor:
        """Standard deviation (B or 1, n, H, A) of the noise in `steps`, given encoded observations (B, D)."""

    def density_std(self, std: Tensor) -> Tensor:
        """Std that densities are evaluated with, from that of the noise; default: the same."""
        return std

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise of a whole chain."""
        return torch.randn(shape, generator=generator, device=self.device)

    @abstractmethod
    def reduce(self, density: Tensor, chain: Tensor) -> Tensor:
        """Log-densities (B, n, H, A) of the fine-tuned steps of `chain` (B, K + 1, H, A) to one (B,) or (B, n)."""

    @abstractmethod
    def chain_loss(
        self, log_prob: Tensor, rows: dict[str, Tensor], std: Tensor
    ) -> tuple[Tensor, Tensor, Metrics]:
        """See `actor_loss`; `log_prob` of the stored chain now, `std` (B or 1, n, H, A) of the noise now."""

    @torch.no_grad()
    def decide(self, obs: Obs, generator: torch.Generator) -> Action:
        """A chunk at the end of a noisy chain (B, K + 1, H, A), with the log-probability that `reduce` makes."""
        obs = self.policy.normaliser.obs(obs)
        first, steps = self.tuned.start, self.policy.num_steps
        start = self.policy.start(len(next(iter(obs.values()))), generator, deterministic=False)
        shape = (len(start), steps, *start.shape[1:])
        draw = self.draw(shape, generator)
        cond = self.policy.encoder(obs)
        std = self.stds(cond, range(steps)).expand(shape)
        chain = torch.stack(self.policy.chain(obs, start, std * draw, cond, **self.chain_options), 1)
        offset, spread = (std * draw)[:, first:], self.density_std(std[:, first:])
        density = normal_log_density(offset, torch.zeros_like(offset), spread.log())
        chunk = chain[:, -1].clamp(-self.policy.clip, self.policy.clip)
        return Action(self.policy.normaliser.unnormalise_action(chunk), self.reduce(density, chain), chain)

    def remember(self, rows: Batch) -> dict[str, Tensor]:
        """Chain and log-probability as they were sampled."""
        assert rows.chain is not None
        assert rows.log_prob is not None
        return {"chain": rows.chain, "log_prob": rows.log_prob}

    def actor_loss(self, rows: dict[str, Tensor], obs: Obs) -> tuple[Tensor, Tensor, Metrics]:
        """Density of the stored chain under the policy now, all steps in one batch."""
        cond = self.policy.encoder(obs)
        std = self.stds(cond, self.tuned)
        density = self.density(rows["chain"], cond, self.density_std(std))
        log_prob = self.reduce(density, rows["chain"])
        return self.chain_loss(log_prob, rows, std)

    def density(self, chain: Tensor, cond: Tensor, std: Tensor) -> Tensor:
        """Log-densities (B, n, H, A), per dimension, of the fine-tuned steps of `chain` (B, K + 1, H, A)."""
        first = self.tuned.start
        mean = self.policy.means(chain[:, first:-1], first, cond, **self.chain_options)
        return normal_log_density(chain[:, first + 1 :], mean, std.log())
