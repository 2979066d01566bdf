# SPDX-License-Identifier: Apache-2.0
"""`Dataset`: recorded experience as contiguous tensors, sampled by index arithmetic on their device."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robopost.config import DataConfig
from robopost.data.batch import Batch, Obs, Spec
from robopost.data.cache import Columns, columns_of, obs_rows, open_columns
from robopost.data.convert import open_any
from robopost.data.episode import Episode
from robopost.data.indexing import last_flags, make_index, returns_to_go, take
from robopost.data.layout import stats_keys
from robopost.data.stats import Running, finite_problem, moments
from robopost.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    from robopost.nets.norm import Normaliser

DEVICE_SHARE = 0.5  # of the free GPU memory that "auto" gives to a dataset


class Dataset:
    """Experience from a store, or from episodes in memory, sampled with replacement, uniformly over steps.

    On a CPU the tensors are memory-mapped files; on a GPU they live in its memory where they fit.

    **Which steps are transitions.** A transition needs its true next observation. The last step of an episode
    that was recorded without a final observation has none: it is left out of `sample` (and used in
    `sample_chunks`), and n-step returns stop before it. It stays in where the episode terminated, because
    nothing is bootstrapped there; its `next_obs` is then the episode's last observation, and `discount` is 0.

    Attributes:
        spec: shapes of the data.
        stats: statistics of the rows in use, before `normalise`, see `EpisodeStore.stats`.
        dataset_id: identity of the content; `"<id>[:N]"` for the first N episodes.
        device: where batches are.
        folder: of the cache that the tensors are mapped from, None in memory.
    """

    def __init__(
        self,
        columns: Columns,
        spec: Spec,
        stats: dict[str, dict[str, Any]],
        dataset_id: str,
        *,
        device: torch.device | str = "cpu",
        storage: torch.device | str | None = None,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        sparse_reward: bool = False,
    ) -> None:
        """Use `load` or `from_episodes`. `storage` is where the tensors live, default: on `device`."""
        self.spec = spec
        self.stats = stats
        self.dataset_id = dataset_id
        mapped = columns.action
        self.folder = (
            Path(mapped.filename).parent if isinstance(mapped, np.memmap) and mapped.filename else None
        )
        self.device = torch.device(device)
        self._home = torch.device(storage if storage is not None else device)
        put = lambda array: torch.from_numpy(np.asarray(array)).to(self._home)  # noqa: E731
        self.obs: Obs = {key: put(value) for key, value in columns.obs.items()}
        self.action = put(columns.action)
        self.reward = put(columns.reward)
        if reward_scale != 1.0 or reward_shift != 0.0:
            self.reward = self.reward * reward_scale + reward_shift
        self.extras: Obs = {key: put(value) for key, value in columns.extras.items()}
        self._lengths = columns.lengths
        self._endless = ~columns.terminated if sparse_reward else None
        self._index = make_index(columns).to(self._home)
        self.terminated = last_flags(columns.terminated, columns).to(self._home)
        self.truncated = last_flags(columns.truncated, columns).to(self._home)
        self._goes_on = (~self.terminated).to(torch.float32)
        self._returns: dict[float, Tensor] = {}

    @classmethod
    def load(
        cls, config: DataConfig, *, device: torch.device | str, options: dict[str, Any] | None = None
    ) -> Dataset:
        """Open what `config.path` names: a store, or a file of any registered format (imported once).

        Args:
            config: path, format, number of episodes, device, reward scale and shift.
            device: the training device; batches come out there.
            options: reader options of a foreign format.

        Raises:
            DataError: nothing there, damaged, empty, or with NaN or inf in it.
        """
        if not config.path:
            raise ConfigError("data.path is empty. Fix: data.path=<a store, or a file of a known format>")
        with open_any(config.path, config.format, options) as store:
            columns = open_columns(store)
            stats, identity = store.stats(), store.dataset_id
            if config.episodes < 0 or config.episodes > len(store):
                raise ConfigError(
                    f"data.episodes={config.episodes} must lie in 1..{len(store)}, or be 0 for all"
                )
            if 0 < config.episodes < len(store):
                identity = f"{identity}[:{config.episodes}]"
                columns = columns.head(config.episodes)
                stats = column_stats(columns, store.spec, identity)
            bad = finite_problem(stats)
            if bad is not None:
                raise DataError(
                    f"{store.path} has NaN or inf in {bad!r}. Fix: robopost data verify {store.path}"
                )
            return cls(
                columns,
                store.spec,
                stats,
                identity,
                device=device,
                storage=_storage(config.device, torch.device(device), columns),
                reward_scale=config.reward_scale,
                reward_shift=config.reward_shift,
                sparse_reward=config.sparse_reward,
            )

    @classmethod
    def from_episodes(
        cls,
        episodes: Iterable[Episode],
        spec: Spec,
        *,
        device: torch.device | str = "cpu",
        name: str = "memory",
        sparse_reward: bool = False,
    ) -> Dataset:
        """A dataset of episodes held in memory; `name` becomes its `dataset_id`."""
        columns = columns_of(episodes, spec)
        stats = column_stats(columns, spec, name)
        return cls(columns, spec, stats, name, device=device, sparse_reward=sparse_reward)

    def stats_for(self, action: str) -> dict[str, dict[str, Any]]:
        """`stats` with what `Normaliser.fit(action=...)` needs beyond it: quantiles of the actions for `quantile`."""
        if action != "quantile":
            return self.stats
        low, high = np.quantile(self.action.cpu().numpy(), (0.01, 0.99), axis=0)
        return self.stats | {"action": self.stats["action"] | {"q01": low, "q99": high}}

    @property
    def num_steps(self) -> int:
        """Recorded steps."""
        return int(self.action.shape[0])

    @property
    def num_episodes(self) -> int:
        """Recorded episodes."""
        return len(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """(E,) recorded steps of every episode."""
        return self._lengths

    @property
    def num_transitions(self) -> int:
        """Steps that `sample` draws from."""
        usable = self._index.usable
        return self.num_steps if usable is None else int(usable.shape[0])

    def __len__(self) -> int:
        return self.num_steps

    def normalise(self, normaliser: Normaliser) -> Dataset:
        """A dataset in normalised units: float observations and actions mapped once, images as they are."""
        norm = copy.deepcopy(normaliser).to(self._home)
        out = copy.copy(self)
        with torch.no_grad():
            out.obs = norm.obs(self.obs)
            out.action = norm.action(self.action)
        return out

    def first_rows(self) -> Tensor:
        """(R,) for every observation row, the row of its episode's first observation."""
        starts = torch.unique(self._index.first_row)
        rows = torch.arange(len(next(iter(self.obs.values()))), device=self._home)
        return starts[torch.searchsorted(starts, rows, right=True) - 1]

    def with_obs(self, key: str, values: Tensor) -> Dataset:
        """A dataset with one more float observation: `values` (R, ...), one row per observation row."""
        rows = len(next(iter(self.obs.values())))
        if len(values) != rows:
            raise DataError(f"observation {key!r} has {len(values)} rows, the dataset has {rows}")
        out = copy.copy(self)
        out.obs = self.obs | {key: values.to(self._home, torch.float32)}
        out.spec = replace(self.spec, obs=self.spec.obs | {key: (tuple(values.shape[1:]), "float32")})
        return out

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
        history: int = 1,
        keys: Collection[str] | None = None,
    ) -> Batch:
        """Draw transitions. Never waits for the device.

        Args:
            batch_size: B.
            generator: on the dataset's device.
            n_step: rewards summed per sample; fewer where the episode ends before.
            gamma: discount per step.
            extra: any of `"return_to_go"` (discounted sum of the rewards from here to the episode's end, no
                bootstrap; see `returns_to_go`), `"next_action"` (the action taken at `next_obs`, with
                `"next_action_mask"` False where none was recorded), `"step"` (the dataset step a sample begins
                at, (B,) int64), or a per-step extra of the store.
            history: h observations (B, h, ...) as in `sample_chunks`.
            keys: observation keys wanted, None = all.

        Returns:
            Batch with `discount` = gamma^k for the true k, 0 on terminated.
        """
        steps = self.draw(batch_size, generator)
        return self.transitions_at(steps, n_step=n_step, gamma=gamma, extra=extra, history=history, keys=keys)

    def transition_steps(self, pick: Tensor) -> Tensor:
        """The steps of the transitions numbered `pick` (B,) int64, each in 0..num_transitions - 1."""
        usable = self._index.usable
        pick = pick.to(self._home)
        return pick if usable is None else take(usable, pick)

    def draw(self, batch_size: int, generator: torch.Generator, *, chunks: bool = False) -> Tensor:
        """The steps (B,) int64 at which `sample`, or with `chunks` `sample_chunks`, begins."""
        if chunks:
            return self._draw(self.num_steps, batch_size, generator)
        return self.transition_steps(self._draw(self.num_transitions, batch_size, generator))

    def transitions_at(
        self,
        steps: Tensor,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        extra: Sequence[str] = (),
        history: int = 1,
        keys: Collection[str] | None = None,
    ) -> Batch:
        """The transitions that begin at `steps` (B,) int64 (each one usable); see `sample`."""
        index = self._index
        if n_step == 1:
            last, reward, power = steps, take(self.reward, steps), gamma
        else:
            span = torch.clamp(take(index.limit, steps) - steps, max=n_step)
            offset = torch.arange(n_step, device=self._home)
            within = offset < span[:, None]
            window = torch.clamp(steps[:, None] + offset, max=self.num_steps - 1)
            weight = torch.pow(float(gamma), offset.to(torch.float32))
            reward = (take(self.reward, window) * within * weight).sum(1)
            last = steps + span - 1
            power = torch.pow(float(gamma), span.to(torch.float32))
        row, next_row = take(index.row, steps), take(index.next_row, last)
        if history > 1:
            first = take(index.first_row, steps)
            row, next_row = self._past(row, first, history), self._past(next_row, first, history)
        wanted = self.obs if keys is None else {key: self.obs[key] for key in keys}
        batch = Batch(
            obs={key: take(value, row) for key, value in wanted.items()},
            action=take(self.action, steps),
            reward=reward,
            next_obs={key: take(value, next_row) for key, value in wanted.items()},
            terminated=take(self.terminated, last),
            truncated=take(self.truncated, last),
            discount=take(self._goes_on, last) * power,
            extra=self._extra(steps, last, gamma, extra) if extra else None,
        )
        return self._deliver(batch)

    def sample_chunks(
        self, batch_size: int, horizon: int, generator: torch.Generator, *, history: int = 1
    ) -> Batch:
        """Draw observations with the action chunks that follow them, from every recorded step.

        Args:
            batch_size: B.
            horizon: H actions; behind the episode's end the last repeats and `chunk_mask` is False.
            generator: on the dataset's device.
            history: h observations (B, h, ...), oldest first; before the episode's start its first repeats.
                With h = 1 there is no history dimension.

        Returns:
            Batch with action (B, H, A), chunk_mask (B, H), no `next_obs`; reward and flags are
            those of the first step.
        """
        steps = self.draw(batch_size, generator, chunks=True)
        return self.chunks_at(steps, horizon, history=history)

    def chunks_at(self, steps: Tensor, horizon: int, *, history: int = 1, extra: Sequence[str] = ()) -> Batch:
        """The chunks that begin at `steps` (B,) int64; see `sample_chunks`, and `sample` for `extra` (of step one)."""
        index = self._index
        ahead = steps[:, None] + torch.arange(horizon, device=self._home)
        end = take(index.end, steps)[:, None]
        rows = take(index.row, steps)
        if history > 1:
            rows = self._past(rows, take(index.first_row, steps), history)
        batch = Batch(
            obs={key: take(value, rows) for key, value in self.obs.items()},
            action=take(self.action, torch.minimum(ahead, end - 1)),
            reward=take(self.reward, steps),
            next_obs={},
            terminated=take(self.terminated, steps),
            truncated=take(self.truncated, steps),
            discount=take(self._goes_on, steps),
            chunk_mask=ahead < end,
            extra=self._extra(steps, steps, 1.0, extra) if extra else None,
        )
        return self._deliver(batch)

    def _past(self, rows: Tensor, first: Tensor, history: int) -> Tensor:
        back = torch.arange(1 - history, 1, device=self._home)
        return torch.maximum(rows[:, None] + back, first[:, None])

    def _draw(self, high: int, batch_size: int, generator: torch.Generator) -> Tensor:
        if high == 0:
            raise DataError(
                f"dataset {self.dataset_id} has no transition with a next observation. "
                "Fix: record final observations, or train by behaviour cloning"
            )
        pick = torch.randint(high, (batch_size,), generator=generator, device=generator.device)
        return pick.to(self._home)

    def _deliver(self, batch: Batch) -> Batch:
        return batch if self._home == self.device else batch.to(self.device)

    def _extra(self, steps: Tensor, last: Tensor, gamma: float, names: Sequence[str]) -> Obs:
        out: Obs = {}
        for name in names:
            if name == "return_to_go":
                out[name] = take(self._return_to_go(gamma), steps)
            elif name == "next_action":
                mask = last + 1 < take(self._index.end, steps)
                out[name] = take(self.action, torch.where(mask, last + 1, last))
                out["next_action_mask"] = mask
            elif name == "step":
                out[name] = steps
            elif name in self.extras:
                out[name] = take(self.extras[name], steps)
            else:
                raise unknown("extra", name, ["return_to_go", "next_action", "step", *self.extras], DataError)
        return out

    def _return_to_go(self, gamma: float) -> Tensor:
        if gamma not in self._returns:
            returns = returns_to_go(self.reward.cpu().numpy(), self._lengths, gamma, self._endless)
            self._returns[gamma] = torch.from_numpy(returns).to(self._home)
        return self._returns[gamma]


def column_stats(columns: Columns, spec: Spec, source: str) -> dict[str, dict[str, Any]]:
    """Statistics as `EpisodeStore.stats` has them, computed from columns (final observations not counted)."""
    rows = obs_rows(columns.lengths, columns.has_final)
    out: dict[str, dict[str, Any]] = {}
    for key, shape in stats_keys(spec).items():
        running = Running.empty(shape)
        values = {"action": columns.action, "reward": columns.reward}.get(key)
        for start in range(0, len(rows), 4096):
            part = rows[start : start + 4096]
            moments(values[start : start + 4096] if values is not None else columns.obs[key][part], running)
        out[key] = running.result(source)
    return out


def _storage(choice: str, device: torch.device, columns: Columns) -> torch.device:
    if choice == "auto":
        if device.type != "cuda":
            return torch.device("cpu")
        arrays = [*columns.obs.values(), *columns.extras.values(), columns.action, columns.reward]
        free = torch.cuda.mem_get_info(device)[0]
        return device if sum(a.nbytes for a in arrays) < DEVICE_SHARE * free else torch.device("cpu")
    try:
        return torch.device(choice)
    except RuntimeError as error:
        raise ConfigError(
            f"data.device={choice!r} is no device. Allowed: auto, cpu, cuda, cuda:<n>"
        ) from error
