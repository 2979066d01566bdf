# SPDX-License-Identifier: Apache-2.0
"""Backbones of flow and diffusion policies behind one call: `net(x (B, H, A), cond (B, D), *times (B,))`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError, unknown
from robopost.nets import fused
from robopost.nets.mlp import ResidualMLP
from robopost.nets.time import TimeEmbedding
from robopost.nets.transformer import ChunkTransformer
from robopost.nets.unet1d import UNet1D

BACKBONES = ("mlp", "unet", "transformer")


class MLPDenoiser(nn.Module):
    """Residual MLP on the flattened chunk, the condition and the time embedding. The fastest on CPU."""

    def __init__(
        self,
        horizon: int,
        action_dim: int,
        cond_dim: int,
        width: int,
        depth: int,
        *,
        times: int,
        time_dim: int,
        activation: str,
        layernorm: bool,
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(time_dim, times)
        inputs, outputs = horizon * action_dim + cond_dim + time_dim, horizon * action_dim
        self.net = ResidualMLP(inputs, width, depth, outputs, activation, layernorm=layernorm)

    def forward(self, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
        """Denoise `x` (B, H, A)."""
        return self.net(torch.cat([x.flatten(1), cond, self.time(*times)], dim=-1)).view_as(x)

    def steps(self, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
        """See `denoise_steps`: condition and times go through the first layer once, not once per row."""
        layer = self.net.inp
        sizes = [x.shape[-2] * x.shape[-1], cond.shape[-1], layer.in_features]
        sizes[2] -= sizes[0] + sizes[1]
        # Contiguous: oneDNN falls back to a reference kernel on slices of a matrix.
        of_x, of_cond, of_time = (part.contiguous() for part in layer.weight.split(sizes, dim=1))
        shared = fused.linear(cond, of_cond)[:, None]
        timed = nn.functional.linear(self.time(*times), of_time, layer.bias)
        return self.net.blocks_of(fused.linear(x.flatten(2), of_x) + shared + timed).view_as(x)


def denoise_steps(net: nn.Module, x: Tensor, cond: Tensor, *times: Tensor) -> Tensor:
    """Denoise n chunks of each sample in one batch: x (B, n, H, A), cond (B, D), to (B, n, H, A).

    Each of `times` is (n,), the same for all samples, or (B, n).
    """
    batch, count = x.shape[:2]
    if count == 1:  # a step of a sampler: the plain network has the lowest overhead
        return net(x[:, 0], cond, *(time.expand(batch, 1).flatten() for time in times))[:, None]
    if isinstance(net, MLPDenoiser):
        return net.steps(x, cond, *times)
    rows = [time.expand(batch, count).flatten() for time in times]
    return net(x.flatten(0, 1), cond.repeat_interleave(count, 0), *rows).view_as(x)


def build_denoiser(
    backbone: str,
    horizon: int,
    action_dim: int,
    cond_dim: int,
    *,
    width: int,
    depth: int,
    times: int = 1,
    time_dim: int = 32,
    activation: str = "mish",
    layernorm: bool = True,
) -> nn.Module:
    """Build a backbone.

    Args:
        backbone: `mlp` (`depth` residual blocks of `width`), `unet` (`depth` levels of `width`, its double, ...)
            or `transformer` (`depth` blocks of `width`).
        horizon: chunk length H.
        action_dim: size of an action A.
        cond_dim: size of the encoded observation D.
        width: see `backbone`.
        depth: see `backbone`.
        times: number of scalar time inputs.
        time_dim: size of the time embedding.
        activation: of the mlp.
        layernorm: in the mlp's blocks.

    Raises:
        ConfigError: unknown backbone, or sizes it can't have.
    """
    if width < 1 or depth < 1:
        raise ConfigError(f"policy.width={width} and policy.depth={depth} must be at least 1")
    if backbone == "mlp":
        return MLPDenoiser(
            horizon,
            action_dim,
            cond_dim,
            width,
            depth,
            times=times,
            time_dim=time_dim,
            activation=activation,
            layernorm=layernorm,
        )
    if backbone == "unet":
        channels = [width * 2**level for level in range(depth)]
        return UNet1D(horizon, action_dim, cond_dim, channels, times=times, time_dim=time_dim)
    if backbone == "transformer":
        return ChunkTransformer(horizon, action_dim, cond_dim, width, depth, times=times, time_dim=time_dim)
    raise unknown("policy.backbone", backbone, BACKBONES)
