# SPDX-License-Identifier: Apache-2.0
"""`MixedSampler`: demonstrations and a run's own experience in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from robopost.data.batch import Batch, Spec, concat
from robopost.data.buffer import ReplayBuffer
from robopost.data.dataset import Dataset
from robopost.errors import ConfigError, DataError


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
