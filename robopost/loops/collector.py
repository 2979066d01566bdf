# SPDX-License-Identifier: Apache-2.0
"""Steps a training environment for a loop: episode figures, exact resume, cuts at checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robopost.artefacts.checkpoint import load_arrays
from robopost.data.batch import below
from robopost.loops.run import Files, Run, stream_seed
from robopost.vector import Arrays, Step, VecEnv

ENV_STREAM = 50


class Collector:
    """Holds the current observation and the running episodes' figures of a `VecEnv`.

    Where the environment can save its state, a checkpoint holds it and a resumed run goes on in the middle of its
    episodes. Where it can't, running episodes are cut (truncated) at every checkpoint, in interrupted and
    uninterrupted runs alike, so that both stay identical; `cut` tells the loop that the last step was such an end.
    """

    def __init__(self, env: VecEnv, run: Run) -> None:
        self.env = env
        self.run = run
        self.obs: Arrays = {}
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, np.int64)
        self._success = np.zeros(env.num_envs, bool)
        self._resets = 0

    @property
    def length(self) -> np.ndarray:
        """(N,) int64 steps that the running episodes have had."""
        return self._length

    def start(self, state: dict[str, Any] | None) -> None:
        """Reset, or go on from the loop state of a checkpoint."""
        alone = self.run.ranks.size == 1 and not (state or {}).get("between_rollouts")
        if state is None or not self.env.can_save or not alone:
            self._resets = int(state["resets"]) if state is not None else 0
            self._reset()
            return
        arrays = load_arrays(Path(state["checkpoint"]) / "env.safetensors")
        self._resets = int(state["resets"])
        # A reset first: it creates what the environment allocates lazily.
        self.env.reset(seed=0)
        self.env.set_state(below(arrays, "state/"))
        self.obs = below(arrays, "obs/")
        self._return, self._length = arrays["episode/return"].copy(), arrays["episode/length"].copy()
        self._success = arrays["episode/success"].copy()

    def step(self, action: np.ndarray, running: np.ndarray | None = None) -> Step:
        """Execute `action` (N, A) and record episodes that end.

        With `running` (N,) bool, only those of these copies, which are over when they succeed, too.
        """
        step = self.env.step(action)
        self._return += step.reward
        self._length += 1
        if step.success is not None:
            self._success |= step.success
        over = step.done if running is None else running & (step.done | self._success)
        for i in over.nonzero()[0]:
            figures = {"train/return": float(self._return[i]), "train/length": float(self._length[i])}
            if step.success is not None:
                figures["train/success"] = float(self._success[i])
            self.run.record_episode(figures)
            self._return[i], self._length[i], self._success[i] = 0.0, 0, False
        self.obs = step.obs
        return step

    def begin_round(self, group: int) -> None:
        """Start a new episode in every copy; `group` neighbouring copies start alike."""
        self._resets += 1
        self._reset(group)

    def scaled(self, reward: np.ndarray) -> np.ndarray:
        """Rewards as the algorithm gets them, a new array: where data is recorded too, on one scale with it."""
        data = self.run.config.data
        scale, shift = (data.reward_scale, data.reward_shift) if data.path else (1.0, 0.0)
        return reward * scale + shift

    def state(self) -> tuple[Files, dict[str, Any]]:
        """Files and JSON for a checkpoint."""
        if not self.env.can_save:
            return {}, {"resets": self._resets + 1}
        if self.run.ranks.size > 1:
            # Several processes play whole episodes: nothing has to be known of those that are over.
            return {}, {"resets": self._resets, "between_rollouts": True}
        arrays = {f"state/{key}": value for key, value in self.env.get_state().items()}
        arrays |= {f"obs/{key}": value for key, value in self.obs.items()}
        arrays |= {
            "episode/return": self._return,
            "episode/length": self._length,
            "episode/success": self._success,
        }
        return {"env.safetensors": arrays}, {"resets": self._resets}

    def cut_if_unsaved(self) -> bool:
        """After a checkpoint: start new episodes where the environment can't save its state. True when it cut."""
        if self.env.can_save:
            return False
        self._resets += 1
        self._reset()
        return True

    def _reset(self, group: int = 1) -> None:
        seed = stream_seed(self.run.config.seed, ENV_STREAM + 1000 * self._resets) % 2**31
        n = self.env.num_envs
        first = self.run.ranks.index * n  # of the copies of all processes
        self.obs = self.env.reset(
            seed=seed + first if group == 1 else [seed + (first + i) // group for i in range(n)]
        )
        self._return[:] = 0.0
        self._length[:] = 0
        self._success[:] = False
