# SPDX-License-Identifier: Apache-2.0
"""Export of a store as LeRobotDataset v3.0: here, or in another interpreter that has lerobot."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from robopost.data.episode import Episode
from robopost.data.files import disk_errors
from robopost.data.formats import lerobot_export
from robopost.data.formats.common import declare
from robopost.data.formats.lerobot_meta import OURS
from robopost.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from robopost.data.store import EpisodeStore

PYTHON_VARIABLE = "ROBOPOST_LEROBOT_PYTHON"
CODECS = ("libsvtav1", "h264", "hevc")
INSTRUCTION = "instruction"


def export(
    store: EpisodeStore,
    path: Path,
    *,
    python: str,
    repo_id: str,
    video: bool,
    codec: str,
    robot: str,
    fps: int,
) -> None:
    """See `LeRobot.write`. All or nothing: the dataset is built beside `path` and renamed when complete."""
    if codec not in CODECS:
        raise DataError(f"codec={codec!r} must be one of {', '.join(CODECS)}")
    python = python or os.environ.get(PYTHON_VARIABLE, "")
    if not python and importlib.util.find_spec("lerobot") is None:
        raise MissingExtraError(
            "lerobot is not installed. Fix: pip install 'robopost[lerobot]', or name the interpreter of "
            f"an environment that has it with -o python=<path> or {PYTHON_VARIABLE}"
        )
    header = _header(store, path, repo_id, video, codec, robot, fps)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with disk_errors(f"can't export to {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            if python:
                _elsewhere(python, header, store, partial)
            else:
                lerobot_export.export(header, (_fields(episode, header) for episode in store), partial)
            (partial / OURS).write_text(json.dumps(declare(store)))
            with contextlib.suppress(OSError):
                _remove_empty(partial / "images")
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    """Remove what lerobot leaves of the frames it has encoded: folders without files."""
    if not any(path.is_file() for path in folder.rglob("*")):
        shutil.rmtree(folder)


def _header(
    store: EpisodeStore, path: Path, repo_id: str, video: bool, codec: str, robot: str, fps: int
) -> dict[str, Any]:
    rate = fps or store.fps
    if rate <= 0 or rate != int(rate):
        raise DataError(
            f"the store runs at {store.fps} steps/s, LeRobot needs a whole number. Fix: -o fps=<number>"
        )
    names = store.metadata.get("names", {})
    features: dict[str, dict[str, Any]] = {}
    for key, (shape, dtype) in store.spec.obs.items():
        if key == INSTRUCTION:
            continue  # the task says it
        if len(shape) == 3 and dtype == "uint8":
            name = (
                f"observation.images.{key.removeprefix('image_')}" if key != "image" else "observation.image"
            )
            _check_video(key, shape, video)
            features[name] = {
                "source": f"obs.{key}",
                "dtype": "video" if video else "image",
                "shape": list(shape),
            }
            features[name]["names"] = ["height", "width", "channels"]
        else:
            name = f"observation.{key}"
            features[name] = {"source": f"obs.{key}", "dtype": dtype, "shape": list(shape)}
            features[name]["names"] = names.get(name)
    features["action"] = {"source": "action", "dtype": "float32", "shape": [store.spec.action_dim]}
    features["action"]["names"] = names.get("action")
    features["next.reward"] = {"source": "reward", "dtype": "float32", "shape": [1], "names": None}
    for name in ("done", "truncated", "success"):
        features[f"next.{name}"] = {"source": name, "dtype": "bool", "shape": [1], "names": None}
    for key, (shape, dtype) in store.extras.items():
        if key != "timestamp":
            features[key] = {
                "source": f"extra.{key}",
                "dtype": dtype,
                "shape": list(shape) or [1],
                "names": None,
            }
    if not any(info["success"] is not None for info in store.episode_info):
        del features["next.success"]
    return {
        "repo_id": repo_id or f"local/{path.name}",
        "fps": int(rate),
        "robot": robot or store.metadata.get("robot") or None,
        "codec": codec,
        "video": video,
        "features": features,
        "episodes": len(store),
    }


def _check_video(key: str, shape: tuple[int, ...], video: bool) -> None:
    height, width, channels = shape
    if channels != 3:
        raise DataError(f"{key} has {channels} channels, LeRobot cameras have 3")
    if video and (min(height, width) < 64 or height % 2 or width % 2):
        raise DataError(
            f"{key} is {height}x{width}: encoders need at least 64x64 and even sides. Fix: -o video=false"
        )


def _fields(episode: Episode, header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Task and per-step arrays of one episode, by the `source` names of the header."""
    steps = len(episode)
    last = np.arange(steps) == steps - 1
    arrays: dict[str, Any] = {
        "action": episode.action,
        "reward": episode.reward,
        "done": last & episode.terminated,
        "truncated": last & episode.truncated,
        "success": last & bool(episode.success),
    }
    arrays |= {f"obs.{key}": value[:steps] for key, value in episode.obs.items()}
    arrays |= {f"extra.{key}": value for key, value in episode.extras.items()}
    text = episode.instruction
    if not text and INSTRUCTION in episode.obs:
        text = bytes(episode.obs[INSTRUCTION][0]).rstrip(b"\0").decode("utf-8", "replace")
    wanted = [feature["source"] for feature in header["features"].values()]
    return text, {name: arrays[name] for name in wanted}


def _elsewhere(python: str, header: dict[str, Any], store: EpisodeStore, partial: Path) -> None:
    """Stream the episodes into the exporter script, run by `python`."""
    script = Path(lerobot_export.__file__)
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+b") as errors:
        try:
            process = subprocess.Popen(
                [python, str(script), str(partial)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=env,
            )
        except OSError as error:
            raise MissingExtraError(
                f"python={python!r} does not start ({error.strerror}). Fix: -o python=<interpreter>"
            ) from error
        pipe = cast("BinaryIO", process.stdin)
        try:
            with contextlib.suppress(BrokenPipeError), pipe:
                lerobot_export.send_header(pipe, header)
                for episode in store:
                    lerobot_export.send_episode(pipe, *_fields(episode, header))
            code = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code != 0:
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines() or ["no message"]
            text = lines[-1]
            if "No module named 'lerobot'" in text:
                raise MissingExtraError(f"{python} has no lerobot. Fix: {python} -m pip install lerobot")
            raise DataError(f"lerobot in {python} failed: {text}")
