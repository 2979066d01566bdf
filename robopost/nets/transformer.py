# SPDX-License-Identifier: Apache-2.0
"""Minimal transformer denoiser: one token per action, the condition through adaptive LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError
from robopost.nets.time import TimeEmbedding


class Block(nn.Module):
    """Self-attention and MLP; scale, shift and gate from the condition (Peebles and Xie 2023, adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)
        self.modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, H, W) tokens and (B, W) condition to (B, H, W)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(cond).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self._attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def _attend(self, x: Tensor) -> Tensor:
        batch, horizon, width = x.shape
        q, k, v = self.qkv(x).view(batch, horizon, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, horizon, width))


class ChunkTransformer(nn.Module):
    """Denoiser for chunks: (B, H, A), condition (B, D) and scalar times (B,) to (B, H, A).

    Raises:
        ConfigError: `width` is not divisible by `heads`.
    """

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        cond_dim: int,
        width: int = 128,
        depth: int = 4,
        *,
        heads: int = 4,
        times: int = 1,
        time_dim: int = 64,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"policy.width={width} must be a multiple of the {heads} attention heads")
        self.time = TimeEmbedding(time_dim, times)
        self.inp = nn.Linear(action_dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.cond = nn.Sequential(nn.Linear(cond_dim + time_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, action_dim)

    def forward(self, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
        """Denoise `x` (B, H, A)."""
        cond = self.cond(torch.cat([cond, self.time(*times)], dim=-1))
        h = self.inp(x) + self.position
        for block in self.blocks:
            h = block(h, cond)
        scale, shift = self.modulation(cond).unsqueeze(1).chunk(2, dim=-1)
        return self.out(self.norm(h) * (1 + scale) + shift)
