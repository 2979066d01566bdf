# SPDX-License-Identifier: Apache-2.0
"""TRPO (Schulman et al. 2015, arXiv 1502.05477) and NPG (Kakade 2001): HNPG without recorded data.

Critic, advantages and step are HNPG's. TRPO's line search asks for KL <= max_kl; NPG takes the full step of length
max_kl in the quadratic model.
"""

from __future__ import annotations

from dataclasses import dataclass

from robopost.algos.online.hnpg import HNPG, HNPGConfig
from robopost.errors import ConfigError
from robopost.registry import ALGOS


@dataclass
class TRPOConfig(HNPGConfig):
    """Config of `TRPO`."""

    name: str = "trpo"
    hybrid: bool = False
    check_kl: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hybrid:
            raise ConfigError(f"algo.hybrid=true with algo={self.name} is algo=hnpg. Fix: algo=hnpg")


@dataclass
class NPGConfig(TRPOConfig):
    """Config of `NPG`."""

    name: str = "npg"
    check_kl: bool = False
    backtracks: int = 0

    def __post_init__(self) -> None:
        if self.backtracks:
            raise ConfigError(f"algo.backtracks={self.backtracks}: NPG has no line search. Fix: algo=trpo")
        super().__post_init__()


@ALGOS.register("trpo", config=TRPOConfig)
class TRPO(HNPG):
    """TRPO: natural policy gradient whose step a line search keeps within a KL divergence."""

    registry_name = "trpo"


@ALGOS.register("npg", config=NPGConfig)
class NPG(HNPG):
    """NPG: natural policy gradient, full steps of one length in the quadratic KL."""

    registry_name = "npg"
