# SPDX-License-Identifier: Apache-2.0
"""PRDC: TD3 held near the nearest state-action pair of the whole dataset (Ran et al. 2023, arXiv 2306.06569).

Reference implementation: github.com/LAMDA-RL/PRDC. Everything but the point that the policy is pulled to is
TD3+BC's; the search is `robopost.data.neighbours`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from robopost.accel import resolve
from robopost.algos.base import Metrics, Needs
from robopost.algos.offline.td3_bc import TD3BC, td3_bc_loss
from robopost.algos.online.td3 import TD3CoreConfig
from robopost.data.batch import Batch, Spec
from robopost.data.dataset import Dataset
from robopost.data.neighbour_cells import ENTRY
from robopost.data.neighbours import LIST_BYTES, SEARCHES, Neighbours
from robopost.errors import ConfigError, DataError, unknown
from robopost.nets.vectorise import by_rows
from robopost.policies.base import Policy
from robopost.registry import ALGOS

ROWS = 1 << 16  # steps whose states are gathered at once


@dataclass
class PRDCConfig(TD3CoreConfig):
    """Config of `PRDC`."""

    name: str = "prdc"
    alpha: float = 2.5  # weight of Q against the constraint; 0 = the constraint alone
    beta: float = 2.0  # weight of the state in the distance; 0 = nearest action of the whole dataset
    k: int = 1  # neighbours whose mean action is the target
    kth: bool = False  # the k-th neighbour alone, as the reference code has it
    search: str = "exact"  # exact | lists: answers without a certificate are taken as they are (CPU)
    list_bytes: int = LIST_BYTES  # most of a step's list in the index, on a CPU; 0 = no index
    index: str = ""  # folder of the index; empty = with the dataset's cache

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"algo.{name}={getattr(self, name)} must be 0 or more, and finite")
        if self.k < 1:
            raise ConfigError(f"algo.k={self.k} must be at least 1")
        if self.search not in SEARCHES:
            raise unknown("algo.search", self.search, SEARCHES)
        if self.list_bytes < 0:
            raise ConfigError(f"algo.list_bytes={self.list_bytes} must be 0 (no lists) or more")
        if self.search == "lists" and self.list_bytes < ENTRY:
            raise ConfigError("algo.search=lists needs lists. Fix: algo.list_bytes=32768")


@ALGOS.register("prdc", config=PRDCConfig)
class PRDC(TD3BC):
    """PRDC: policy regularisation with dataset constraint.

    The objective is TD3+BC's with the nearest neighbour's action in the place of the sample's own (Ran et al.
    2023, eq. 6): -lambda * mean Q(s, pi(s)) + mean (pi(s) - a*)^2, where a* belongs to the pair of the dataset
    that is closest to (beta * s) ++ pi(s). Only the action part of the distance has a gradient.
    """

    registry_name = "prdc"
    regime = "offline"
    can_go_online = False  # new experience has no place in the index

    def __init__(
        self, config: Any, policy: Policy, spec: Spec, *, device: torch.device, generator: torch.Generator
    ) -> None:
        super().__init__(config, policy, spec, device=device, generator=generator)
        for key in policy.obs_keys:
            if not spec.obs[key][1].startswith("float"):
                raise ConfigError(
                    f"algo=prdc measures distances between states, and {key!r} is {spec.obs[key][1]}. "
                    "Fix: name float observations in policy.obs_keys"
                )
        if config.search == "lists" and device.type != "cpu":
            raise ConfigError(
                "algo.search=lists runs on a CPU. Fix: algo.search=exact, which is fast on a GPU"
            )
        self.neighbours: Neighbours | None = None
        self._search: Callable[..., Tensor] = self._lookup

    @property
    def needs(self) -> Needs:
        """Transitions of the dataset, and where they are in it."""
        return replace(super().needs, extra=("step",))

    def attach(self, dataset: Dataset) -> None:
        """Open or build the index of the dataset's state-action pairs.

        Raises:
            DataError: no transitions, fewer than k + 1 steps, NaN, or `index` belongs to another dataset.
        """
        cfg = self.config
        if dataset.num_transitions == 0:
            raise DataError(
                f"dataset {dataset.dataset_id} has no transition with a next observation. "
                "Fix: record final observations, or train by behaviour cloning"
            )
        self.neighbours = Neighbours.open(
            states(dataset, self.policy).to(self.device),
            dataset.action.to(self.device),
            beta=cfg.beta,
            k=cfg.k,
            name=dataset.dataset_id,
            folder=cfg.index or None,
            cache=dataset.folder,
            list_bytes=cfg.list_bytes,
        )

    def accelerate(self, mode: str) -> None:
        """As `Algorithm.accelerate`; the compiler leaves the search alone, a CUDA graph holds it."""
        if resolve(mode, self.device) == "compile":
            self._search = cast(Any, torch.compiler.disable)(self._lookup)
        super().accelerate(mode)

    def actor_loss(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """TD3+BC's objective with the nearest pair's action as target."""
        action = self.policy.sample(batch.obs, deterministic=True)[0][:, 0]
        q = self.critic.frozen(batch.obs, action, members=1)[0]
        if batch.extra is None or "step" not in batch.extra:
            raise DataError("algo=prdc needs batches with the dataset step of each sample (extra 'step')")
        found = by_rows(self._search, batch.extra["step"], action.detach())
        target, (distance, own, certified, asked) = found[:, :-4], found[:, -4:].unbind(1)
        loss, constraint = td3_bc_loss(q, action, target, self.config.alpha)
        apart = lambda data: torch.linalg.vector_norm(action.detach() - data, dim=-1).mean()  # noqa: E731
        return loss, {
            "loss/constraint": constraint.detach(),
            "policy/constraint_distance": apart(target),
            "policy/bc_distance": apart(batch.action),
            "neighbours/distance": distance.mean(),
            "neighbours/own": own.mean(),
            "neighbours/certified": certified.mean(),
            "neighbours/fallback": asked.mean(),
        }

    def _lookup(self, steps: Tensor, action: Tensor) -> Tensor:
        cfg = self.config
        if self.neighbours is None:
            raise DataError("algo=prdc searches its dataset: call attach(dataset) before the first update")
        exact = cfg.search == "exact"
        return self.neighbours.lookup(steps, action, kth=cfg.kth, exact=exact)


def states(dataset: Dataset, policy: Policy) -> Tensor:
    """(N, S) the policy's observations at every dataset step, flattened, history included."""
    parts = []
    for steps in torch.arange(dataset.num_steps).split(ROWS):
        obs = dataset.chunks_at(steps.to(dataset.action.device), 1, history=policy.history).obs
        parts.append(torch.cat([obs[key].flatten(1) for key in policy.obs_keys], 1))
    return torch.cat(parts)
