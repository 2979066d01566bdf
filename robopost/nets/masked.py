# SPDX-License-Identifier: Apache-2.0
"""Means that leave padding out."""

from __future__ import annotations

from torch import Tensor


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of `value` (B, H, A) over the steps where `mask` (B, H) is True; 0 when there are none."""
    weight = mask.unsqueeze(-1).to(value.dtype)
    return (value * weight).sum() / (weight.sum() * value.shape[-1]).clamp_min(1)
