# SPDX-License-Identifier: Apache-2.0
"""The replay journal of an off-policy run, as a dataset of the episodes that the run has seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from robopost.data.batch import Spec
from robopost.data.episode import Arrays, Episode
from robopost.data.formats import EpisodeSource, Format
from robopost.data.journal import segments
from robopost.errors import DataError
from robopost.registry import FORMATS

JOURNAL = "buffer"


@FORMATS.register("replay")
class Replay(Format):
    """Run folder of an off-policy algorithm: everything in its replay journal, warm-up included.

    Episodes come in the order in which they ended. One that is still running at the end (or at `steps`) is cut
    there: truncated, with the observation that followed. A journal that has outgrown `loop.buffer_size` begins
    inside an episode. Rewards are those of the buffer (with `data.reward_scale`, where the run had one); with an
    observation history only the newest frame of each step is kept; success is not in a replay buffer.
    """

    @classmethod
    def detect(cls, path: Path) -> bool:
        """True for a run folder that holds segments of a replay journal."""
        return (path / "config.json").is_file() and bool(segments(path / JOURNAL))

    @classmethod
    def read(cls, path: Path, *, steps: int = 0, fps: float = 0.0) -> EpisodeSource:
        """Open a run folder.

        Args:
            path: the run folder.
            steps: only the experience up to this environment step of the run (all copies together), e.g. that
                of a checkpoint; 0 = all there is.
            fps: steps per second, which a run doesn't know.
        """
        found = segments(path / JOURNAL)
        if not found:
            raise DataError(f"{path} holds no replay journal. Fix: name the folder of an off-policy run")
        config = _json(path / "config.json")
        num_envs = int((config.get("env") or {}).get("num_envs", 1))
        history = int((config.get("policy") or {}).get("history", 1))
        stop = found[-1][1]
        if steps < 0 or steps > stop * num_envs:
            raise DataError(
                f"steps={steps} must lie in 0..{stop * num_envs}, what the journal of {path} holds"
            )
        for (_, end, _), (start, _, after) in pairwise(found):
            if end != start:
                raise DataError(
                    f"{after} begins at step {start}, the one before ends at {end}: one is missing"
                )
        stop = -(-steps // num_envs) if steps else stop
        if stop <= found[0][0]:
            raise DataError(
                f"steps={steps}: the journal of {path} begins at {found[0][0] * num_envs}. Fix: a larger steps="
            )
        env = config.get("env") or {}
        return EpisodeSource(
            _spec(path),
            fps,
            f"replay of {(config.get('algo') or {}).get('name')} in {env.get('id') or env.get('name')}",
            _episodes([item for item in found if item[0] < stop], stop, num_envs, history > 1),
            options={"steps": steps},
            metadata={"run_seed": config.get("seed"), "env_steps": stop * num_envs},
        )


def _episodes(
    found: list[tuple[int, int, Path]], stop: int, num_envs: int, stacked: bool
) -> Iterator[Episode]:
    """Episodes of the steps before run step `stop`, one stream per environment."""
    newest = (lambda value: value[:, -1]) if stacked else (lambda value: value)
    pieces: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num_envs)]
    last: list[Arrays] = [{} for _ in range(num_envs)]
    for start, end, path in found:
        data = _load(path)
        obs = {key[4:]: value for key, value in data.items() if key.startswith("obs.")}
        rows = min(end, stop) - start
        # What follows the last row taken: the next row of the segment, or what the journal kept at its end.
        after = {
            key: value[rows] if rows < end - start else data[f"pending.{key}"] for key, value in obs.items()
        }
        last = [{key: newest(value)[i] for key, value in after.items()} for i in range(num_envs)]
        ends = (data["terminated"] | data["truncated"])[:rows]
        place = {int(flat): at for at, flat in enumerate(data["final_index"])}
        begun = np.zeros(num_envs, int)
        for row, i in np.argwhere(ends):
            pieces[i].append(_piece(data, obs, slice(begun[i], row + 1), i))
            at = place[int(row) * num_envs + int(i)]
            final = {key: newest(data[f"final.{key}"])[at] for key in obs}
            yield _join(pieces[i], final, bool(data["terminated"][row, i]), stacked)
            pieces[i], begun[i] = [], row + 1
        for i in range(num_envs):
            if begun[i] < rows:
                pieces[i].append(_piece(data, obs, slice(begun[i], rows), i))
    for i in range(num_envs):
        if pieces[i]:
            yield _join(pieces[i], last[i], False, stacked)


def _piece(data: Arrays, obs: Arrays, rows: slice, i: int) -> dict[str, np.ndarray]:
    piece = {"action": data["action"][rows, i], "reward": data["reward"][rows, i]}
    return piece | {f"obs.{key}": value[rows, i] for key, value in obs.items()}


def _join(pieces: list[dict[str, np.ndarray]], final: Arrays, terminated: bool, stacked: bool) -> Episode:
    whole = {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}
    obs: Arrays = {}
    for key, value in final.items():
        rows = whole[f"obs.{key}"]
        obs[key] = np.concatenate([rows[:, -1] if stacked else rows, value[None]])
    return Episode(
        obs=obs,
        action=whole["action"],
        reward=whole["reward"],
        terminated=terminated,
        truncated=not terminated,
    )


def _spec(path: Path) -> Spec:
    """Shapes and bounds as the newest policy of the run has stored them."""
    found = sorted((path / "checkpoints").glob("step_*/policy.json"))
    if not found:
        raise DataError(f"{path} has a replay journal and no checkpoint. Fix: copy the run folder again")
    return Spec.from_json(_json(found[-1])["spec"])


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}. Fix: copy the run folder again") from error


def _load(path: Path) -> Arrays:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} can't be read: {error}. Fix: copy the run folder again") from error
