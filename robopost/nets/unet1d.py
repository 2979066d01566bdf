# SPDX-License-Identifier: Apache-2.0
"""Conditional 1-D U-Net over the steps of a chunk (Chi et al. 2023, Diffusion Policy, section IV-A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError
from robopost.nets.time import TimeEmbedding

GROUPS = 8


class FiLMBlock(nn.Module):
    """Two convolutions with GroupNorm; the condition scales and shifts the features between them."""

    def __init__(self, in_channels: int, channels: int, cond_dim: int, kernel: int) -> None:
        super().__init__()
        self.first = _conv_block(in_channels, channels, kernel)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * channels))
        self.second = _conv_block(channels, channels, kernel)
        self.skip = nn.Conv1d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, C_in, H) and (B, cond_dim) to (B, C, H)."""
        scale, shift = self.film(cond).unsqueeze(-1).chunk(2, dim=1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)


class UNet1D(nn.Module):
    """Denoiser for chunks: (B, H, A), condition (B, D) and scalar times (B,) to (B, H, A).

    Args:
        horizon: chunk length H; must be divisible by 2^(levels - 1).
        action_dim: A.
        cond_dim: D.
        channels: width of each level; every level but the last halves the time resolution.
        times: number of scalar time inputs.
        time_dim: size of the time embedding.
        kernel: convolution length, odd.

    Raises:
        ConfigError: the horizon doesn't divide, or a width is not a multiple of 8.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        cond_dim: int,
        channels: Sequence[int] = (64, 128, 256),
        *,
        times: int = 1,
        time_dim: int = 64,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channels) - 1)
        if horizon % factor:
            raise ConfigError(
                f"policy.horizon={horizon} must be a multiple of {factor} with U-Net depth {len(channels)}. "
                "Fix: change horizon, lower depth, or use backbone=mlp"
            )
        if any(width % GROUPS for width in channels):
            raise ConfigError(f"U-Net widths {list(channels)} must be multiples of {GROUPS} (policy.width)")
        self.time = TimeEmbedding(time_dim, times)
        cond = cond_dim + time_dim
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        size = action_dim
        for level, width in enumerate(channels):
            last = level == len(channels) - 1
            self.down.append(
                nn.ModuleList(
                    [
                        FiLMBlock(size, width, cond, kernel),
                        FiLMBlock(width, width, cond, kernel),
                        nn.Identity() if last else nn.Conv1d(width, width, 3, stride=2, padding=1),
                    ]
                )
            )
            size = width
        self.middle = FiLMBlock(size, size, cond, kernel)
        for width in reversed(channels[:-1]):
            self.up.append(
                nn.ModuleList(
                    [
                        nn.ConvTranspose1d(size, size, 4, stride=2, padding=1),
                        FiLMBlock(size + width, width, cond, kernel),
                        FiLMBlock(width, width, cond, kernel),
                    ]
                )
            )
            size = width
        self.out = nn.Sequential(_conv_block(size, size, kernel), nn.Conv1d(size, action_dim, 1))

    def forward(self, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
        """Denoise `x` (B, H, A)."""
        cond = torch.cat([cond, self.time(*times)], dim=-1)
        h = x.transpose(1, 2)
        skips: list[Tensor] = []
        for first, second, shrink in self.down:  # type: ignore[misc]
            h = second(first(h, cond), cond)
            skips.append(h)
            h = shrink(h)
        h = self.middle(h, cond)
        skips.pop()
        for grow, first, second in self.up:  # type: ignore[misc]
            h = torch.cat([grow(h), skips.pop()], dim=1)
            h = second(first(h, cond), cond)
        return self.out(h).transpose(1, 2)


def _conv_block(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(in_channels, channels, kernel, padding=kernel // 2),
        nn.GroupNorm(GROUPS, channels),
        nn.Mish(),
    )
