# SPDX-License-Identifier: Apache-2.0
"""Sinusoidal embedding of a scalar in [0, 1]: flow time, diffusion step, step size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError


class SinusoidalEmbedding(nn.Module):
    """(B,) scalars in [0, 1] to (B, dim): sines and cosines at geometric frequencies, 1 to `max_frequency`.

    Raises:
        ConfigError: `dim` is odd or below 4.
    """

    def __init__(self, dim: int, max_frequency: float = 1000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ConfigError(f"time embedding dim={dim} must be even and at least 4")
        exponent = torch.linspace(0, math.log(max_frequency), dim // 2)
        self.register_buffer("frequency", exponent.exp(), persistent=False)
        self.frequency: Tensor

    def forward(self, value: Tensor) -> Tensor:
        """Embed (B,) values."""
        angle = value.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class TimeEmbedding(nn.Module):
    """`inputs` scalars (B,) each to one (B, dim) embedding: sinusoids of all, then a two-layer MLP."""

    def __init__(self, dim: int, inputs: int = 1) -> None:
        super().__init__()
        self.embed = SinusoidalEmbedding(dim)
        self.net = nn.Sequential(nn.Linear(dim * inputs, dim * 2), nn.Mish(), nn.Linear(dim * 2, dim))

    def forward(self, *values: Tensor) -> Tensor:
        """Embed the scalars, in the order they were trained in."""
        return self.net(torch.cat([self.embed(value) for value in values], dim=-1))
