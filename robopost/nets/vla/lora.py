# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al. 2021) through peft: put in, read out for single rows, merged in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError, require

ADAPTER = "default"


def add_lora(module: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Give the linear layers of `module` whose last name is in `targets` adapters; freeze everything else in it.

    Adapters are float32 whatever the layers are: their updates are too small for bfloat16 weights.

    Raises:
        ConfigError: no layer has such a name.
    """
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    unmatched = [target for target in targets if not any(name.split(".")[-1] == target for name in names)]
    if not targets or unmatched:
        offered = ", ".join(sorted({name.split(".")[-1] for name in names}))
        raise ConfigError(f"policy.lora_targets={list(targets)}: there are linear layers {offered}")
    peft: Any = require("peft", "vla")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
    peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    module.requires_grad_(False)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def weight_rows(layer: Any, rows: slice) -> Tensor:
    """Rows of a linear layer's weight in float32, with its adapter where it has one."""
    base = layer.base_layer if hasattr(layer, "lora_A") else layer
    weight = base.weight[rows].float()
    if base is layer:
        return weight
    return weight + layer.scaling[ADAPTER] * (
        layer.lora_B[ADAPTER].weight[rows] @ layer.lora_A[ADAPTER].weight
    )


@torch.no_grad()
def merge_lora(module: nn.Module) -> int:
    """Add adapters to the weights they adapt, in place, and take them out; returns how many there were.

    The sum is taken in float32 and rounded once, whatever the dtype of the weights.
    """
    merged = 0
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
                base: Any = layer.base_layer
                base.weight.copy_(weight_rows(layer, slice(None)))
                setattr(parent, name, base)
                merged += 1
    return merged
