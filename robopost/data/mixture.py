# SPDX-License-Identifier: Apache-2.0
"""Recorded and a run's own experience in one batch: `MixedSampler` by share, `UniformSampler` by size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from robopost.data.batch import Batch, Spec, choose, concat
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.errors import ConfigError, DataError


class Sampler(Protocol):
    """What an update draws its batches from."""

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
    ) -> Batch:
        """As `ReplayBuffer.sample`."""
        ...


def check_same_task(env: Spec, demos: Spec) -> None:
    """Raise DataError where demonstrations have other keys, shapes or actions than the environment."""
    for key, declared in env.obs.items():
        if demos.obs.get(key) != declared:
            raise DataError(
                f"the environment has {key!r} {declared}, the demonstrations {demos.obs.get(key)}. "
                "Fix: choose common keys with env.obs_keys"
            )
    if env.action_dim != demos.action_dim:
        raise DataError(
            f"actions of the environment have {env.action_dim} dimensions, "
            f"those of the demonstrations {demos.action_dim}"
        )


def check_extras(extra: Sequence[str]) -> None:
    """Raise DataError where a per-sample quantity is wanted that new experience can't have."""
    if "step" in extra:
        raise DataError(
            "an algorithm that asks for each sample's dataset step can't learn online: new experience has none"
        )


class MixedSampler:
    """Batches with an exact share of demonstrations: round(batch_size * fraction) of them come first."""

    def __init__(self, buffer: ReplayBuffer, dataset: Dataset, fraction: float) -> None:
        """Check that both hold the same task.

        Raises:
            ConfigError: the fraction is outside 0..1.
            DataError: keys, shapes or the action size differ.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ConfigError(f"algo.demo_fraction={fraction} must lie in 0..1")
        check_same_task(buffer.spec, dataset.spec)
        self.buffer = buffer
        self.dataset = dataset
        self.fraction = fraction

    @property
    def online_fraction(self) -> float:
        """Share of the run's own experience in a batch."""
        return 1.0 - self.fraction

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
    ) -> Batch:
        """As `ReplayBuffer.sample`, demonstrations first."""
        check_extras(extra)
        demos = round(batch_size * self.fraction)
        parts: list[Batch] = []
        if demos:
            keys = self.buffer.spec.obs.keys()
            demo = self.dataset.sample(
                demos,
                generator,
                n_step=n_step,
                gamma=gamma,
                extra=extra,
                history=self.buffer.history,
                keys=keys,
            )
            parts.append(demo)
        if batch_size > demos:
            parts.append(
                self.buffer.sample(batch_size - demos, generator, n_step=n_step, gamma=gamma, extra=extra)
            )
        return parts[0] if len(parts) == 1 else concat(*parts)


class UniformSampler:
    """Batches drawn uniformly from a dataset and a buffer as if they were one: shares follow the sizes."""

    def __init__(self, buffer: ReplayBuffer, dataset: Dataset) -> None:
        """Check that both hold the same task.

        Raises:
            DataError: keys, shapes or the action size differ.
        """
        check_same_task(buffer.spec, dataset.spec)
        self.buffer = buffer
        self.dataset = dataset

    @property
    def online_fraction(self) -> float:
        """Share of the run's own experience in a batch, on average."""
        return len(self.buffer) / (len(self.buffer) + self.dataset.num_transitions)

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
    ) -> Batch:
        """As `ReplayBuffer.sample`; the order of recorded and own experience is random."""
        check_extras(extra)
        recorded = self.dataset.num_transitions
        high = recorded + len(self.buffer)
        pick = torch.randint(high, (batch_size,), generator=generator, device=generator.device)
        ours = pick >= recorded
        # Each sample is looked up in both and chosen afterwards: shapes stay fixed, the host never learns the split.
        ahead = {"n_step": n_step, "gamma": gamma, "extra": extra}
        old = self.dataset.transitions_at(
            self.dataset.transition_steps(torch.where(ours, 0, pick)),
            history=self.buffer.history,
            keys=self.buffer.spec.obs.keys(),
            **ahead,
        )
        new = self.buffer.transitions_at(torch.where(ours, pick - recorded, 0), **ahead)
        return choose(ours.to(self.buffer.device), new, old)
