# SPDX-License-Identifier: Apache-2.0
"""Multi-layer perceptrons: plain and residual."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError, unknown
from robopost.nets import fused

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
}
INITS = ("default", "orthogonal")


def build_activation(name: str) -> nn.Module:
    """Build the activation called `name`; an unknown name raises ConfigError with the list."""
    if name not in ACTIVATIONS:
        raise unknown("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def check_sizes(hidden: Sequence[int]) -> None:
    """Raise ConfigError where a hidden layer has no units: its output would be a constant."""
    if min(hidden, default=1) < 1:
        raise ConfigError(f"hidden={list(hidden)}: every layer needs at least 1 unit")


class MLP(nn.Sequential):
    """Linear layers with an activation between them: (..., in_dim) -> (..., out_dim).

    Args:
        in_dim: input size.
        hidden: sizes of the hidden layers; empty gives one linear layer.
        out_dim: output size.
        activation: a key of `ACTIVATIONS`.
        layernorm: put a LayerNorm between each hidden layer and its activation.
        init: `default` is torch's own; `orthogonal` uses gain sqrt(2) in hidden layers and zero biases.
        out_gain: orthogonal gain of the last layer (0.01 keeps an initial PPO policy near its mean).
    """

    def __init__(
        self,
        in_dim: int,
        hidden: Sequence[int],
        out_dim: int,
        activation: str = "relu",
        *,
        layernorm: bool = False,
        init: str = "default",
        out_gain: float = 1.0,
    ) -> None:
        if init not in INITS:
            raise unknown("init", init, INITS)
        check_sizes(hidden)
        layers: list[nn.Module] = []
        size = in_dim
        for width in hidden:
            layers.append(nn.Linear(size, width))
            if layernorm:
                layers.append(nn.LayerNorm(width))
            layers.append(build_activation(activation))
            size = width
        layers.append(nn.Linear(size, out_dim))
        super().__init__(*layers)
        if init == "orthogonal":
            linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
            for layer in linears:
                nn.init.orthogonal_(layer.weight, out_gain if layer is linears[-1] else math.sqrt(2))
                nn.init.zeros_(layer.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return fused.mlp(self, input) if fused.usable(self, input) else fused.sequential(self, input)

    def frozen(self, x: Tensor) -> Tensor:
        """As `forward`, with a gradient to the input alone: none of the weights' is computed."""
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        if fused.usable(self, x):
            return fused.mlp(self, x, list(weights.values()))
        return torch.func.functional_call(self, weights, (x,))


class ResidualMLP(nn.Module):
    """Residual blocks of one width, pre-norm with `layernorm`: (..., in_dim) -> (..., out_dim).

    Each block is `x + W2 act(W1 act(norm(x)))`. It trains better than a plain stack as a denoiser, where the
    output has to keep the detail of the noisy input.
    """

    def __init__(
        self,
        in_dim: int,
        width: int,
        blocks: int,
        out_dim: int,
        activation: str = "mish",
        *,
        layernorm: bool = True,
    ) -> None:
        super().__init__()
        self.inp = nn.Linear(in_dim, width)
        norm = [nn.LayerNorm(width)] if layernorm else []
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *copy.deepcopy(norm),
                build_activation(activation),
                nn.Linear(width, width),
                build_activation(activation),
                nn.Linear(width, width),
            )
            for _ in range(blocks)
        )
        self.out = nn.Sequential(build_activation(activation), nn.Linear(width, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., out_dim)."""
        return self.blocks_of(fused.linear(x, self.inp.weight, self.inp.bias))

    def blocks_of(self, h: Tensor) -> Tensor:
        """Everything behind the first layer, whose output `h` (..., width) is."""
        fast = fused.residual(self.blocks, self.out, h)
        if fast is not None:
            return fast
        for block in self.blocks:
            h = h + fused.sequential(block, h)
        return fused.sequential(self.out, h)
