# SPDX-License-Identifier: Apache-2.0
"""How smoothly a policy moves: executed actions, the motion they cause, and whether its chunks fit together.

Actions enter as fractions of their range, x = (a - low) / (high - low) in [0, 1], over the dimensions that have finite
bounds. Time derivatives are finite differences over the control period dt, or per step where the environment doesn't
say how fast it is controlled. Every number is of one episode first; nothing crosses an episode's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.data.batch import Obs
from robopost.evaluate.statistics import Interval, t_interval
from robopost.policies.base import Policy
from robopost.results import number
from robopost.vector import Arrays, VecEnv

AT_BOUND = 0.005  # of the range: an action this close to a bound counts as saturated
ORDERS = {"action_rate": 1, "action_acceleration": 2, "action_jerk": 3}
CUT_HZ, CUT_AMPLITUDE, PAD = 10.0, 0.05, 4  # of the spectral arc length, as its authors set them
NAMES = (*ORDERS, "saturation", "sparc", "seam_jump", "chunk_overlap_rms", "sample_std")  # in this order
TRACKED = ("action_jerk", "saturation", "chunk_seam_ratio", "chunk_overlap_rms", "sample_std")


def difference_rms(x: np.ndarray, lengths: np.ndarray, order: int, dt: float = 1.0) -> np.ndarray:
    """RMS of the `order`-th time derivative: sqrt(mean_{t,j} (Delta^k x_{t,j})^2) / dt^k, per episode.

    Order 1 is the action rate that legged-robot rewards penalise (mean ||a_t - a_{t-1}||^2), order 3 the RMS jerk by
    which action coherence of generative policies is judged (Park et al. 2025, ACG, arXiv 2510.22201).

    Args:
        x: (T, N, D) scaled actions of N episodes side by side, anything behind an episode's end.
        lengths: (N,) steps of each episode.
        order: k.
        dt: control period in seconds, 1 = per step.

    Returns:
        (N,), NaN where an episode has no more than k steps.
    """
    change = np.diff(x, order, axis=0)
    return np.sqrt(_mean_square(change, _inside(len(change), lengths - order))) / dt**order


def saturation(x: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Share of action components within `AT_BOUND` of a bound, per episode; shapes as in `difference_rms`."""
    held = (x <= AT_BOUND) | (x >= 1 - AT_BOUND)
    return _mean_square(held.astype(np.float64), _inside(len(x), lengths))


def seam_jumps(x: np.ndarray, lengths: np.ndarray, begins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMS change of the action from one step to the next at the seams of chunks, and within chunks.

    Args:
        x: (T, N, D) scaled actions.
        lengths: (N,).
        begins: (T, N) bool, a chunk's first action is executed at this step. An episode's first step is no seam.

    Returns:
        ((N,), (N,)): sqrt(mean_{seams} |x_t - x_{t-1}|^2 / D) and the same over all other steps; NaN where there are
        none.
    """
    change, inside = np.diff(x, axis=0), _inside(len(x) - 1, lengths - 1)
    return tuple(np.sqrt(_mean_square(change, inside & at)) for at in (begins[1:], ~begins[1:]))  # type: ignore[return-value]


def sparc(speed: np.ndarray, hz: float) -> float:
    """Spectral arc length of a speed profile (Balasubramanian et al. 2015, J NeuroEng Rehab 12:112, eq. 6).

    -sum_k sqrt((1 / (K - 1))^2 + (V_{k+1} - V_k)^2) over the K lines of the spectrum V = |F| / |F_0| up to the last
    of at least `CUT_AMPLITUDE`, at most `CUT_HZ`; the profile is padded with zeros to 2^PAD times its length. Free of
    amplitude and duration: -1.41 for one minimum-jerk movement, more negative the more submovements.

    Args:
        speed: (T,) at least 0, any unit.
        hz: samples per second.

    Returns:
        The spectral arc length, NaN where nothing moves.
    """
    if len(speed) < 2 or not speed.any():
        return math.nan
    size = 2 ** (math.ceil(math.log2(len(speed))) + PAD)
    spectrum = np.abs(np.fft.rfft(speed, size))
    spectrum = spectrum[: int(CUT_HZ * size / hz) + 1] / spectrum[0]
    spectrum = spectrum[: np.flatnonzero(spectrum >= CUT_AMPLITUDE)[-1] + 1]
    if len(spectrum) < 2:
        return math.nan
    return -float(np.hypot(1.0 / (len(spectrum) - 1), np.diff(spectrum)).sum())


@dataclass
class Smoothness:
    """What `MotionLog` measured.

    Attributes:
        episodes: name -> (E,) one number per episode, NaN where it has none. Names: those of `ORDERS`, `saturation`,
            `sparc`, `seam_jump` and `inner_jump` (see `seam_jumps`), `chunk_overlap_rms`, `sample_std`; what a
            policy or a task has no such thing for is left out.
        dt: control period in seconds, 0 where it isn't known and derivatives are per step.
        draws: chunks drawn per query for `sample_std`.
    """

    episodes: dict[str, np.ndarray] = field(default_factory=dict)
    dt: float = 0.0
    draws: int = 0

    def intervals(self, level: float = 0.95) -> dict[str, Interval]:
        """Mean over episodes with Student's t interval, by name.

        `chunk_seam_ratio` is the mean jump at seams over the mean jump within chunks; its interval is the linearised
        (delta method) one of a ratio of means.
        """
        found = {}
        for name in NAMES:
            if name not in self.episodes:
                continue
            values = self.episodes[name]
            if name == "seam_jump":
                name, values = "chunk_seam_ratio", ratio_samples(values, self.episodes["inner_jump"])
            values = values[np.isfinite(values)]
            if len(values):
                found[name] = t_interval(values, level)
        return found

    def metrics(self) -> dict[str, float]:
        """Scalars for the trackers."""
        found = self.intervals()
        return {f"eval/{name}": found[name].value for name in TRACKED if name in found}

    def rows(self, level: float = 0.95) -> list[tuple[str, Interval, str]]:
        """(label, interval, unit) for people."""
        time = "s" if self.dt else "step"
        powers = {"action_rate": "", "action_acceleration": "²", "action_jerk": "³"}
        units = {name: f"range/{time}{power}" for name, power in powers.items()}
        units |= {
            "saturation": "%",
            "chunk_seam_ratio": "x",
            "chunk_overlap_rms": "range",
            "sample_std": "range",
        }
        out = []
        for name, interval in self.intervals(level).items():
            if name == "saturation":
                low, high = max(0.0, interval.low), min(1.0, interval.high)
                interval = Interval(100 * interval.value, 100 * low, 100 * high, interval.n, level)
            label = "SPARC" if name == "sparc" else name.replace("_", " ").replace("rms", "RMS")
            out.append((label, interval, units.get(name, "")))
        return out

    def line(self) -> str:
        """The most telling numbers in one line, empty where nothing was measured."""
        wanted = ("action jerk", "saturation", "chunk seam ratio", "chunk overlap RMS")
        rows = {label: f"{number(interval.value)} {unit}" for label, interval, unit in self.rows()}
        return ", ".join(f"{label} {rows[label]}" for label in wanted if label in rows)

    def to_json(self) -> dict[str, Any]:
        """Intervals by name and the raw episodes (six digits, null for none); `from_json` reverses it."""
        plain = lambda v: float(f"{v:.6g}") if math.isfinite(v) else None  # noqa: E731
        raw = {name: [plain(v) for v in values] for name, values in self.episodes.items()}
        found = {name: interval.to_json() for name, interval in self.intervals().items()}
        return {"dt": self.dt, "draws": self.draws, **found, "raw": raw}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Smoothness:
        """Rebuild from `to_json` output."""
        raw = {
            name: np.array([math.nan if v is None else v for v in row]) for name, row in data["raw"].items()
        }
        return cls(raw, float(data["dt"]), int(data["draws"]))


def ratio_samples(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Per-episode values r + (a_i - r b_i) / mean(b), whose mean is r = mean(a) / mean(b) and whose spread is r's.

    A mean of ratios would be ruled by the episode whose denominator is smallest. Only episodes with both count; empty
    where the denominators are all zero.
    """
    both = np.isfinite(above) & np.isfinite(below)
    above, below = above[both], below[both]
    if not below.any():
        return above[:0]
    ratio = above.mean() / below.mean()
    return ratio + (above - ratio * below) / below.mean()


class MotionLog:
    """Collects what `Smoothness` needs while `evaluate` runs its waves of episodes side by side.

    Reads two keys of the environment's `metadata`, both optional: `control_hz`, and `motion`, which says where an
    observation holds the position of what moves: {observation key: (first column, one behind the last)}, in any
    isotropic unit.

    Args:
        env: the environments.
        policy: who acts in them.
        episodes: E.
        draws: chunks to draw at every query for `sample_std`, 0 = none. They come from a generator of their own: the
            episodes are the same with and without.
        seed: of that generator.
    """

    def __init__(self, env: VecEnv, policy: Policy, episodes: int, *, draws: int = 0, seed: int = 0) -> None:
        low, high = np.asarray(env.spec.action_low), np.asarray(env.spec.action_high)
        self._bounded = np.isfinite(high - low) & (high > low)
        self._low, self._range = low[self._bounded], (high - low)[self._bounded]
        self.measures = not env.spec.choices and bool(self._bounded.any())
        self._policy, self._num_envs = policy, env.num_envs
        # A policy that asks another one at each step (residual) is not asked twice: that would move its queue on.
        self._draws = 0 if policy.wraps_env else draws
        self._generator = torch.Generator(device=policy.device).manual_seed(seed) if self._draws else None
        self._chunked = policy.horizon > 1
        self._overlap = policy.horizon - policy.execute
        self._hz = float(env.env.metadata.get("control_hz") or 0.0)
        offered = {
            key: at for key, at in (env.env.metadata.get("motion") or {}).items() if key in env.spec.obs
        }
        self._motion = next(iter(offered.items()), None) if self._hz else None
        self._found: dict[str, np.ndarray] = {}
        self._episodes = episodes
        self._running = np.zeros(env.num_envs, bool)

    @property
    def watch(self) -> Callable[[Tensor, Obs, Tensor], None] | None:
        """What `StepPolicy.watch` is to be."""
        return self._query if self.measures and (self._chunked or self._draws) else None

    def begin(self, obs: Arrays, running: np.ndarray) -> None:
        """A wave starts at `obs`. `running` (N,) bool is read throughout: the caller clears what has ended."""
        self._running = running
        self._actions: list[np.ndarray] = []
        self._positions = [self._position(obs)] if self._motion else []
        self._chunks: list[tuple[int, np.ndarray, np.ndarray]] = []  # (step, environments (b,), (b, H, A))
        self._spread = np.zeros((2, self._num_envs))  # sum of variances, number of queries

    def step(self, action: np.ndarray, next_obs: Arrays) -> None:
        """`action` (N, A) was executed and led to `next_obs`, an ended episode's own final observation included."""
        if self.measures:
            self._actions.append(action)
            if self._motion:
                self._positions.append(self._position(next_obs))

    def end(self, index: np.ndarray, counted: np.ndarray, lengths: np.ndarray) -> None:
        """The wave is over.

        Args:
            index: (N,) episode of each environment.
            counted: (N,) bool, environments whose first episode counts.
            lengths: (N,) steps of those episodes.
        """
        if not self.measures or not self._actions:
            return
        # What a slot does behind its first episode counts nowhere.
        ends, lengths, at = np.where(counted, lengths, 0), lengths[counted], index[counted]
        actions = np.stack(self._actions)[:, counted]
        x = self._scaled(actions)
        dt = 1.0 / self._hz if self._hz else 1.0
        for name, order in ORDERS.items():
            self._put(name, at, difference_rms(x, lengths, order, dt))
        self._put("saturation", at, saturation(x, lengths))
        if self._motion:
            speed = np.linalg.norm(np.diff(np.stack(self._positions)[:, counted], axis=0), axis=-1)
            arcs = [sparc(speed[:length, i], self._hz) for i, length in enumerate(lengths)]
            self._put("sparc", at, np.array(arcs))
        if self._chunked and self._policy.execute > 1:
            begins = np.zeros((len(x), self._num_envs), bool)
            for step, envs, _ in self._chunks:
                begins[step, envs] = True
            seams, inner = seam_jumps(x, lengths, begins[:, counted])
            self._put("seam_jump", at, seams)
            self._put("inner_jump", at, inner)
        if self._overlap:
            self._put("chunk_overlap_rms", at, self._overlaps(ends)[counted])
        if self._draws:
            total, count = self._spread[:, counted]
            self._put("sample_std", at, np.sqrt(total / count))

    def result(self) -> Smoothness | None:
        """Everything measured; None where actions are discrete or have no bounds."""
        if not self.measures:
            return None
        return Smoothness(self._found, 1.0 / self._hz if self._hz else 0.0, self._draws)

    def _query(self, envs: Tensor, obs: Obs, chunk: Tensor) -> None:
        """Environments `envs` (b,) got new chunks (b, H, A) for raw observations `obs`."""
        where = envs.cpu().numpy()
        if self._chunked:
            self._chunks.append((len(self._actions), where, chunk.cpu().numpy()))
        live = np.flatnonzero(self._running[where]) if self._draws else ()
        if len(live):
            rows = envs.new_tensor(live).repeat_interleave(self._draws)
            many = {key: value[rows] for key, value in obs.items()}
            drawn = self._policy.act(many, generator=self._generator).chunk
            x = self._scaled(drawn.cpu().numpy()).reshape(len(live), self._draws, -1)
            self._spread[:, where[live]] += x.var(1, ddof=1).mean(1), np.ones(len(live))

    def _overlaps(self, lengths: np.ndarray) -> np.ndarray:
        """RMS difference (N,) of what two chunks in a row say about the same steps; NaN where an episode has one chunk.

        The backward coherence of Liu et al. 2024 (Bidirectional Decoding, arXiv 2408.17355) without decay:
        sqrt(mean over chunks k >= 1, steps h < H - E and dimensions of (c_{k-1}[E + h] - c_k[h])^2), E steps executed.
        """
        execute, shape = self._policy.execute, self._chunks[0][2].shape[1:]
        table = np.zeros((-(-len(self._actions) // execute), self._num_envs, *shape), np.float32)
        for step, envs, chunk in self._chunks:  # an episode asks every E steps, from its first one on
            live = step < lengths[envs]
            table[step // execute, envs[live]] = chunk[live]
        x = self._scaled(table)
        change = x[:-1, :, execute:] - x[1:, :, : self._overlap]
        return np.sqrt(_mean_square(change, _inside(len(change), -(-lengths // execute) - 1)))

    def _put(self, name: str, at: np.ndarray, values: np.ndarray) -> None:
        self._found.setdefault(name, np.full(self._episodes, np.nan))[at] = values

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        # Environments clip what a policy with wider bounds of its own asks for.
        return ((action[..., self._bounded] - self._low) / self._range).clip(0.0, 1.0)

    def _position(self, obs: Arrays) -> np.ndarray:
        assert self._motion is not None
        key, (first, last) = self._motion
        return obs[key][..., first:last].reshape(self._num_envs, -1, last - first)[:, -1]


def _inside(steps: int, lengths: np.ndarray) -> np.ndarray:
    """(steps, N) bool: row t lies within the first `lengths` rows of its column."""
    return np.arange(steps)[:, None] < lengths


def _mean_square(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Mean of squares (N,) over the rows chosen by `where` (T, N) and all dimensions behind; NaN for no rows."""
    means = np.square(values, dtype=np.float64).mean(tuple(range(2, values.ndim)))
    total = np.where(where, means, 0.0).sum(0)
    count = where.sum(0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
