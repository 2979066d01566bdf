# SPDX-License-Identifier: Apache-2.0
"""Cal-QL: calibrated CQL, offline and then online (Nakamoto et al. 2023, arXiv 2303.05479).

Reference implementations: github.com/nakamotoo/Cal-QL and CORL's `algorithms/finetune/cal_ql.py`. CQL with one
change: Q at the policy's actions is not pushed down below the return that followed in the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robopost.algos.base import Metrics, Needs
from robopost.algos.offline.cql import CQL, CQLConfig
from robopost.data.batch import Batch
from robopost.errors import DataError
from robopost.registry import ALGOS


@dataclass
class CalQLConfig(CQLConfig):
    """Config of `CalQL`."""

    name: str = "cal_ql"
    actor_lr: float = 1e-4
    temperature_lr: float = 1e-4
    hidden: list[int] = field(default_factory=lambda: [256, 256, 256, 256])  # of the critics
    min_q_weight: float = 5.0
    calibrate_online: bool = True  # keep the floor in the online phase; off = CORL's variant


def calibrated(q_policy: Tensor, returns: Tensor) -> Tensor:
    """max(Q(s, a_j), G): nothing to push down where Q is below the data's return (Nakamoto et al. 2023, eq. 5.1).

    Args:
        q_policy: (E, B, m) at the policy's actions.
        returns: (B,) discounted return-to-go G of the data's transition.

    Returns:
        (E, B, m), without gradient where G is the larger.
    """
    return torch.maximum(q_policy, returns[:, None])


def bound_rate(q_policy: Tensor, returns: Tensor) -> Tensor:
    """Share of the policy's actions whose Q lies below G, a scalar in [0, 1]."""
    return (q_policy.detach() < returns[:, None]).float().mean()


@ALGOS.register("cal_ql", config=CalQLConfig)
class CalQL(CQL):
    """Cal-QL: CQL whose push-down stops at the return-to-go of the data."""

    registry_name = "cal_ql"

    @property
    def needs(self) -> Needs:
        """Transitions with their discounted return-to-go."""
        return replace(super().needs, extra=("return_to_go",))

    def policy_q(self, batch: Batch, q: Tensor) -> tuple[Tensor, Metrics]:
        """Q at the policy's actions with the data's return as its floor, see `calibrated`."""
        if batch.extra is None or "return_to_go" not in batch.extra:
            raise DataError("algo=cal_ql needs the return-to-go of every sample and this batch has none")
        returns = batch.extra["return_to_go"]
        metrics = {"value/bound_rate": bound_rate(q, returns)}
        if self.online and not self.config.calibrate_online:
            return q, metrics
        return calibrated(q, returns), metrics
