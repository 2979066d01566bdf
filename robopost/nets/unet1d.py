# SPDX-License-Identifier: Apache-2.0
"""Conditional 1-D U-Net over the steps of a chunk (Chi et al. 2023, Diffusion Policy, section IV-A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError
from robopost.nets.time import TimeEmbedding

GROUPS = 8
MATRIX_ROWS = 32  # batch x steps up to which a convolution is a matrix product on the CPU


class Conv1d(nn.Conv1d):
    """`nn.Conv1d`; without gradients, one matrix product where batch and steps are few.

    For a single chunk torch takes a kernel on the CPU that needs three to seven times as long as the product.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H) to (B, O, H')."""
        if not _few(input):
            return super().forward(input)
        (size,), (stride,), pad = self.kernel_size, self.stride, int(self.padding[0])
        columns = nn.functional.pad(input, (pad, pad)).unfold(2, size, stride).transpose(1, 2)
        rows = columns.reshape(-1, columns.shape[2] * size)
        out = nn.functional.linear(rows, self.weight.flatten(1), self.bias)
        return out.unflatten(0, columns.shape[:2]).transpose(1, 2)


class ConvTranspose1d(nn.ConvTranspose1d):
    """`nn.ConvTranspose1d`, with the same exception."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, H) to (B, O, H')."""
        if not _few(input) or self.bias is None:
            return super().forward(input, output_size)
        (size,), (stride,), pad = self.kernel_size, self.stride, int(self.padding[0])
        batch, channels, steps = input.shape
        product = input.transpose(1, 2).reshape(-1, channels) @ self.weight.flatten(1)
        parts = product.unflatten(0, (batch, steps)).transpose(1, 2)
        length = (steps - 1) * stride - 2 * pad + size
        out = nn.functional.fold(parts, (1, length), (1, size), padding=(0, pad), stride=(1, stride))
        return out.squeeze(2) + self.bias[:, None]


def _few(x: Tensor) -> bool:
    return not torch.is_grad_enabled() and x.device.type == "cpu" and x.shape[0] * x.shape[2] <= MATRIX_ROWS


class FiLMBlock(nn.Module):
    """Two convolutions with GroupNorm; the condition scales and shifts the features between them."""

    def __init__(self, in_channels: int, channels: int, cond_dim: int, kernel: int) -> None:
        super().__init__()
        self.first = _conv_block(in_channels, channels, kernel)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * channels))
        self.second = _conv_block(channels, channels, kernel)
        self.skip = Conv1d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

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
                        nn.Identity() if last else Conv1d(width, width, 3, stride=2, padding=1),
                    ]
                )
            )
            size = width
        self.middle = FiLMBlock(size, size, cond, kernel)
        for width in reversed(channels[:-1]):
            self.up.append(
                nn.ModuleList(
                    [
                        ConvTranspose1d(size, size, 4, stride=2, padding=1),
                        FiLMBlock(size + width, width, cond, kernel),
                        FiLMBlock(width, width, cond, kernel),
                    ]
                )
            )
            size = width
        self.out = nn.Sequential(_conv_block(size, size, kernel), Conv1d(size, action_dim, 1))

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
        Conv1d(in_channels, channels, kernel, padding=kernel // 2),
        nn.GroupNorm(GROUPS, channels),
        nn.Mish(),
    )
