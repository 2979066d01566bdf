# SPDX-License-Identifier: Apache-2.0
"""The offline loop: updates from a fixed dataset; the unit of progress is one update."""

from __future__ import annotations

from typing import Any

from robopost.data.dataset import Dataset
from robopost.errors import ConfigError
from robopost.loops.run import Files, Run


def run_offline(run: Run) -> None:
    """Train from `config.data` until `config.loop.steps` updates are done."""
    config = run.config
    if not config.data.path:
        raise ConfigError(
            f"algo={config.algo.name} learns from recorded data and data.path is empty. "
            "Fix: data.path=<store or dataset file>; make one with `robopost collect`"
        )
    dataset = Dataset.load(config.data, device=run.device)
    algo = run.build(dataset.spec, dataset.stats, dataset.dataset_id)
    needs = algo.needs
    run.prepare(algo)
    # Statistics are fixed now (fitted or restored): normalise the whole dataset once instead of every batch.
    dataset = dataset.normalise(algo.policy.normaliser)
    generator = run.generators["data"]

    def extra_state() -> tuple[Files, dict[str, Any]]:
        return {}, {"dataset": dataset.dataset_id}

    for step in range(run.step + 1, config.loop.steps + 1):
        if needs.chunks:
            batch = dataset.sample_chunks(
                needs.batch_size, algo.policy.horizon, generator, history=algo.policy.history
            )
        else:
            batch = dataset.sample(
                needs.batch_size, generator, n_step=needs.n_step, gamma=needs.gamma, extra=needs.extra
            )
        run.record(algo.update(batch))
        run.after(step, algo, extra_state)
