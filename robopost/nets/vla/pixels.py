# SPDX-License-Identifier: Apache-2.0
"""Camera images as image towers want them."""

from __future__ import annotations

import torch
from torch import Tensor


def square_pixels(image: Tensor, size: int, fill: float = -1.0) -> Tensor:
    """Images (B, H, W, 3) uint8 to (B, 3, size, size) float32 in [-1, 1], scaled to fit and centred on `fill`.

    The whole image is kept, as openpi's `resize_with_pad` does. Shrinking averages over pixels (antialiased).
    """
    height, width = image.shape[1:3]
    x = image.movedim(-1, 1).float() / 127.5 - 1
    if (height, width) == (size, size):
        return x
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    x = torch.nn.functional.interpolate(x, (rows, columns), mode="bilinear", antialias=scale < 1)
    top, left = (size - rows) // 2, (size - columns) // 2
    edges = (left, size - columns - left, top, size - rows - top)
    return torch.nn.functional.pad(x.clamp(-1, 1), edges, value=fill)
