# SPDX-License-Identifier: Apache-2.0
"""One learned number that stays positive."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LogScalar(nn.Module):
    """A scalar parameter kept as its logarithm: an entropy temperature, a Lagrange multiplier.

    Attributes:
        log: () the logarithm, what an optimiser moves.
    """

    def __init__(self, log: float = 0.0) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(float(log)))

    def forward(self) -> Tensor:
        """The positive number, ()."""
        return self.log.exp()
