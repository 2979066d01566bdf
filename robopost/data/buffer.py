# SPDX-License-Identifier: Apache-2.0
"""`ReplayBuffer`: the experience of an off-policy run, in RAM, on the device or in memory-mapped files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.data import journal
from robopost.data.batch import Batch, Obs, Spec
from robopost.data.files import disk_errors
from robopost.data.indexing import take
from robopost.data.returns import EpisodeReturns, on_host
from robopost.errors import ConfigError, DataError, unknown

STORAGES = ("auto", "ram", "device", "mmap")


class ReplayBuffer:
    """A ring of transitions per environment, so that n-step returns follow one environment's time.

    Observations are stored once: `next_obs` of a step is the observation of the next step in its stream,
    the final observations of episodes lie in a side table that grows with their number, and those of the
    newest steps in one row per environment. `add` therefore expects the contract of the vector environments:
    after a step that neither terminated nor was truncated, the next `obs` is that step's `next_obs`.

    Attributes:
        spec: shapes of the transitions.
        steps_per_env: ring length L; the capacity is L * num_envs.
        total: steps added per environment since the start of the run, the cursor of `journal` and `restore`.
        device: where batches are.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        num_envs: int = 1,
        device: torch.device | str = "cpu",
        storage: str = "auto",
        *,
        path: str | Path | None = None,
        history: int = 1,
        return_gamma: float | None = None,
        sparse_reward: bool = False,
    ) -> None:
        """Allocate the buffer.

        Args:
            spec: shapes without history.
            capacity: transitions, rounded down to a multiple of `num_envs`.
            num_envs: environments that add together.
            device: where batches are wanted.
            storage: where transitions live: `"device"`, `"ram"`, `"mmap"` (files), `"auto"` = `"device"`.
            path: folder of the files of `"mmap"`, default: a temporary one.
            history: observations per step; above 1 every key has the shape (history, ...).
            return_gamma: discount of the extra `"return_to_go"`, None = it isn't kept.
            sparse_reward: see `robopost.data.indexing.returns_to_go`.
        """
        if storage not in STORAGES:
            raise unknown("buffer storage", storage, STORAGES)
        if num_envs < 1 or capacity < 2 * num_envs:
            raise ConfigError(
                f"loop.buffer_size={capacity} must be at least {2 * max(num_envs, 1)} "
                f"with {num_envs} environments"
            )
        self.spec = spec
        self.num_envs = num_envs
        self.history = history
        self.steps_per_env = capacity // num_envs
        self.device = torch.device(device)
        self._home = self.device if storage in ("auto", "device") else torch.device("cpu")
        self._folder: Path | None = None
        if storage == "mmap":
            if path is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="robopost-buffer-")
            self._folder = Path(path) if path is not None else Path(self._temporary.name)
            self._folder.mkdir(parents=True, exist_ok=True)
        rows = self.steps_per_env * num_envs
        self._rows = rows  # ring rows; row of step t, environment n: (t % L) * num_envs + n
        self._slots = max(rows // 64, num_envs)  # final observations; grows
        lead = (history,) if history > 1 else ()
        self._shapes = {
            key: ((*lead, *shape), getattr(torch, dtype)) for key, (shape, dtype) in spec.obs.items()
        }
        self.obs: Obs = {
            key: self._allocate(f"obs.{key}", (rows + num_envs + self._slots, *shape), dtype)
            for key, (shape, dtype) in self._shapes.items()
        }
        self.action = self._allocate("action", (rows, spec.action_dim), torch.float32)
        self.reward = self._allocate("reward", (rows,), torch.float32)
        self.terminated = self._allocate("terminated", (rows,), torch.bool)
        self.truncated = self._allocate("truncated", (rows,), torch.bool)
        self.next_row = self._allocate("next_row", (rows,), torch.int64)
        self.total = 0
        self.journaled = 0
        self._free = list(range(self._slots - 1, -1, -1))
        self._slot_of = np.full(
            (self.steps_per_env, num_envs), -1, np.int64
        )  # slot of a step that ended an episode
        self._ended = np.ones(num_envs, bool)  # which environments' newest step ended an episode
        self._env = torch.arange(num_envs, device=self._home)
        self._returns = EpisodeReturns(self.steps_per_env, num_envs, return_gamma, sparse_reward, self._home)

    def __len__(self) -> int:
        return min(self.total, self.steps_per_env) * self.num_envs

    @property
    def capacity(self) -> int:
        """Transitions held at most."""
        return self._rows

    def add(
        self,
        obs: dict[str, Any],
        action: Any,
        reward: Any,
        next_obs: dict[str, Any],
        terminated: Any,
        truncated: Any,
    ) -> None:
        """Add one step of every environment: tensors or arrays (N, ...) in environment units.

        Flags that live on a GPU make this wait for it; give them as arrays.

        Raises:
            DataError: a key is missing or a shape is wrong.
        """
        n = self.num_envs
        position = self.total % self.steps_per_env
        base = position * n
        ended = on_host(terminated, bool) | on_host(truncated, bool)
        if ended.shape != (n,):
            raise DataError(
                f"terminated and truncated have shape {ended.shape}, the buffer has {n} environments"
            )
        self._release(position)
        for key, store in self.obs.items():
            store[base : base + n] = self._fit(key, obs, n)
            store[self._rows : self._rows + n] = self._fit(key, next_obs, n)
        self.action[base : base + n] = self._tensor("action", action, (n, self.spec.action_dim))
        self.reward[base : base + n] = self._tensor("reward", reward, (n,))
        self.terminated[base : base + n] = self._tensor("terminated", terminated, (n,))
        self.truncated[base : base + n] = self._tensor("truncated", truncated, (n,))
        self._link_previous(base)
        self.next_row[base : base + n] = self._env + self._rows
        if ended.any():
            self._keep_final(position, np.flatnonzero(ended))
        self._returns.add(position, reward, terminated, ended)
        self._ended = ended
        self.total += 1

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
    ) -> Batch:
        """Draw transitions uniformly, with replacement. Never waits for the device.

        Args:
            batch_size: B.
            generator: on the buffer's device.
            n_step: rewards summed per sample; fewer at an episode's end and at the newest step.
            gamma: discount per step.
            extra: `"next_action"` (with `"next_action_mask"`), `"return_to_go"` (-inf while the episode runs).

        Returns:
            Batch with `discount` = gamma^k for the true k, 0 on terminated.
        """
        if len(self) == 0:
            raise DataError("the replay buffer is empty. Fix: collect at least one step before sampling")
        rows = torch.randint(len(self), (batch_size,), generator=generator, device=generator.device)
        return self.transitions_at(rows.to(self._home), n_step=n_step, gamma=gamma, extra=extra)

    def transitions_at(
        self, rows: Tensor, *, n_step: int = 1, gamma: float = 0.99, extra: Sequence[str] = ()
    ) -> Batch:
        """The transitions in the ring's `rows` (B,) int64; see `sample`."""
        power: float | Tensor = gamma
        if n_step == 1:
            last, reward = rows, take(self.reward, rows)
        else:
            window, within = self._window(rows, n_step)
            weight = torch.pow(float(gamma), torch.arange(n_step, device=self._home, dtype=torch.float32))
            reward = (take(self.reward, window) * within * weight).sum(1)
            span = within.sum(1, keepdim=True)
            last = window.gather(1, span - 1)[:, 0]
            power = torch.pow(float(gamma), span[:, 0].to(torch.float32))
        next_row = take(self.next_row, last)
        terminated = take(self.terminated, last)
        batch = Batch(
            obs={key: take(value, rows) for key, value in self.obs.items()},
            action=take(self.action, rows),
            reward=reward,
            next_obs={key: take(value, next_row) for key, value in self.obs.items()},
            terminated=terminated,
            truncated=take(self.truncated, last),
            discount=(~terminated).to(torch.float32) * power,
            extra=self._extra(rows, next_row, last, gamma, extra) if extra else None,
        )
        return batch if self._home == self.device else batch.to(self.device)

    def journal(self, folder: str | Path) -> int:
        """Write what was added since the last call as one segment, whole or not at all.

        Returns:
            the cursor that a checkpoint stores and `restore` takes.

        Raises:
            DataError: the disk is full; earlier segments are untouched.
        """
        return journal.write(self, Path(folder))

    def prune(self, folder: str | Path, cursor: int) -> None:
        """Remove segments that a restore at `cursor` doesn't read; call it when that checkpoint is whole."""
        journal.prune(self, Path(folder), cursor)

    def restore(self, folder: str | Path, cursor: int) -> None:
        """Fill this empty buffer as it was when `journal` returned `cursor`; removes the segments after it.

        Sampling then gives bitwise what the buffer that wrote the journal would have given.

        Raises:
            CheckpointError: segments are missing, or of a buffer with other shapes.
        """
        journal.restore(self, Path(folder), cursor)
        self._returns.rebuild(self.total, self.reward, self.terminated, self.truncated)

    def cut(self) -> None:
        """Truncate every running episode after its newest step: the next `add` starts new ones."""
        going = np.flatnonzero(~self._ended)
        if self.total == 0 or len(going) == 0:
            return
        position = (self.total - 1) % self.steps_per_env
        self.truncated[torch.from_numpy(going).to(self._home) + position * self.num_envs] = True
        self._keep_final(position, going)
        self._returns.end(position, going, np.zeros(self.num_envs, bool))
        self._ended = np.ones(self.num_envs, bool)

    def load_steps(self, start: int, steps: dict[str, Tensor], pending: Obs | None) -> None:
        """Put back steps [start, start + k) of the run; used by `restore`.

        Args:
            start: run step of the first one; the calls go forward in time without gaps.
            steps: arrays (k, N, ...) under `action`, `reward`, `terminated`, `truncated`, `obs.<key>`, and
                `final_index` (m,) with `final.<key>` (m, ...): flat index of the steps that ended an episode.
            pending: newest next observations (N, ...), None when further steps follow.
        """
        count, n, length = steps["reward"].shape[0], self.num_envs, self.steps_per_env
        move = lambda tensor: tensor.to(self._home)  # noqa: E731
        at = torch.arange(start, start + count)
        rows = move(((at % length)[:, None] * n + torch.arange(n)).reshape(-1))
        for key, store in self.obs.items():
            store[rows] = move(steps[f"obs.{key}"]).flatten(0, 1)
        for name in ("action", "reward", "terminated", "truncated"):
            getattr(self, name)[rows] = move(steps[name]).flatten(0, 1)
        self.next_row[rows] = move((((at + 1) % length)[:, None] * n + torch.arange(n)).reshape(-1))
        if pending is not None:
            self.next_row[rows[-n:]] = self._env + self._rows
            for key, store in self.obs.items():
                store[self._rows : self._rows + n] = move(pending[key])
        index = steps["final_index"].numpy()
        slots = self._take_slots(len(index))
        if len(index):
            position = (start + index // n) % length
            self._slot_of[position, index % n] = slots
            final = move(torch.from_numpy(slots) + self._rows + n)
            self.next_row[move(torch.from_numpy(position * n + index % n))] = final
            for key, store in self.obs.items():
                store[final] = move(steps[f"final.{key}"])
        self._ended = self._slot_of[(start + count - 1) % length] >= 0
        self.total = self.journaled = start + count

    def dump_steps(self, start: int) -> tuple[dict[str, Tensor], Obs]:
        """Steps [start, total) on the CPU as `load_steps` takes them, and the newest next observations."""
        n, length = self.num_envs, self.steps_per_env
        at = np.arange(start, self.total)
        rows = torch.from_numpy(((at % length)[:, None] * n + np.arange(n)).reshape(-1)).to(self._home)
        get = lambda store, index: take(store, index).cpu()  # noqa: E731
        fold = lambda tensor: tensor.view(len(at), n, *tensor.shape[1:])  # noqa: E731
        steps = {f"obs.{key}": fold(get(store, rows)) for key, store in self.obs.items()}
        for name in ("action", "reward", "terminated", "truncated"):
            steps[name] = fold(get(getattr(self, name), rows))
        slots = self._slot_of[at % length].reshape(-1)
        index = np.flatnonzero(slots >= 0)
        final = torch.from_numpy(slots[index]).to(self._home) + self._rows + n
        steps["final_index"] = torch.from_numpy(index)
        steps |= {f"final.{key}": get(store, final) for key, store in self.obs.items()}
        newest = {key: store[self._rows : self._rows + n].cpu().clone() for key, store in self.obs.items()}
        return steps, newest

    def _window(self, rows: Tensor, n_step: int) -> tuple[Tensor, Tensor]:
        """Rows (B, n) of the next n steps in each row's stream, and which of them belong to the return."""
        n, length = self.num_envs, self.steps_per_env
        offset = torch.arange(n_step, device=self._home)
        step, env = torch.div(rows, n, rounding_mode="floor"), rows % n
        window = ((step[:, None] + offset) % length) * n + env[:, None]
        ended = (take(self.terminated, window) | take(self.truncated, window)).to(torch.int64)
        ended_before = ended.cumsum(1) - ended
        until_newest = ((self.total - 1) % length - step) % length
        return window, (ended_before == 0) & (offset <= until_newest[:, None])

    def _extra(self, rows: Tensor, next_row: Tensor, last: Tensor, gamma: float, names: Sequence[str]) -> Obs:
        out: Obs = {}
        for name in names:
            if name == "next_action":
                # A next observation inside the ring is a step whose action is known.
                mask = next_row < self._rows
                out[name] = take(self.action, torch.where(mask, next_row, last))
                out["next_action_mask"] = mask
            elif name == "return_to_go":
                out[name] = take(self._returns.of(gamma), rows)
            else:
                known = ["next_action", "return_to_go"]
                raise unknown("extra of a replay buffer", name, known, DataError)
        return out

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._folder is None:
            return torch.zeros(shape, dtype=dtype, device=self._home)
        kind = torch.zeros((), dtype=dtype).numpy().dtype
        path = self._folder / f"{name}.bin"
        with disk_errors(f"can't allocate the replay buffer {path}"), path.open("ab") as file:
            size = int(np.prod(shape)) * kind.itemsize
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk fails here, not as SIGBUS in the map
        return torch.from_numpy(np.memmap(path, dtype=kind, mode="r+", shape=shape))

    def _link_previous(self, base: int) -> None:
        if self.total == 0 or self._ended.all():
            return
        n = self.num_envs
        before = ((self.total - 1) % self.steps_per_env) * n
        if not self._ended.any():
            self.next_row[before : before + n] = self._env + base
            return
        env = torch.from_numpy(np.flatnonzero(~self._ended)).to(self._home)
        self.next_row[env + before] = env + base

    def _keep_final(self, position: int, envs: np.ndarray) -> None:
        slots = self._take_slots(len(envs))
        self._slot_of[position, envs] = slots
        env = torch.from_numpy(envs).to(self._home)
        final = torch.from_numpy(slots).to(self._home) + self._rows + self.num_envs
        self.next_row[env + position * self.num_envs] = final
        for store in self.obs.values():
            store[final] = store[env + self._rows]

    def _take_slots(self, count: int) -> np.ndarray:
        if len(self._free) < count:
            self._grow(count)
        return np.array([self._free.pop() for _ in range(count)], np.int64)

    def _grow(self, count: int) -> None:
        more = max(self._slots, count)
        self._free = [*range(self._slots + more - 1, self._slots - 1, -1), *self._free]
        self._slots += more
        for key, (shape, dtype) in self._shapes.items():
            rows = self._rows + self.num_envs + self._slots
            grown = self._allocate(f"obs.{key}", (rows, *shape), dtype)
            if self._folder is None:
                grown[: rows - more] = self.obs[key]
            self.obs[key] = grown  # a file only gets longer, its content stays

    def _release(self, position: int) -> None:
        if self.total < self.steps_per_env:
            return
        slots = self._slot_of[position]
        self._free.extend(slots[slots >= 0].tolist())
        slots[:] = -1

    def _fit(self, key: str, obs: dict[str, Any], n: int) -> Tensor:
        if key not in obs:
            raise DataError(f"add() lacks the observation key {key!r}; it got {', '.join(obs) or 'none'}")
        return self._tensor(key, obs[key], (n, *self._shapes[key][0]))

    def _tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.as_tensor(value)
        if tensor.shape != shape:
            raise DataError(f"add() got {name!r} of shape {tuple(tensor.shape)}, the buffer holds {shape}")
        return tensor.to(self._home)
