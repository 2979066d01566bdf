# SPDX-License-Identifier: Apache-2.0
"""Linear layers of transformers' models on the faster library where there is one, see `robopost.nets.fused`."""

from __future__ import annotations

from torch import Tensor, nn

from robopost.nets import fused


class FusedLinear(nn.Linear):
    """`nn.Linear` through `fused.linear`: the same to float32 rounding."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return fused.linear(input, self.weight, self.bias)


def use_fused(module: nn.Module) -> None:
    """Turn every plain `nn.Linear` of `module` into a `FusedLinear` over the same parameters."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FusedLinear
