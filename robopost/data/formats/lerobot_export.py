# SPDX-License-Identifier: Apache-2.0
"""Writes a LeRobotDataset v3.0 through the lerobot package; needs nothing else of robopost.

Run as a script in an environment that has lerobot, it reads a header and episodes from standard input, in the
form that `send_header` and `send_episode` write: JSON lines, each followed by the bytes of the arrays it
declares.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Arrays = dict[str, np.ndarray]


def send_header(pipe: BinaryIO, header: dict[str, Any]) -> None:
    """Write the description of the dataset."""
    pipe.write(json.dumps(header).encode() + b"\n")


def send_episode(pipe: BinaryIO, task: str, arrays: Arrays) -> None:
    """Write one episode."""
    plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    declared = [[name, value.dtype.str, list(value.shape)] for name, value in plain.items()]
    pipe.write(json.dumps({"task": task, "arrays": declared}).encode() + b"\n")
    for value in plain.values():
        pipe.write(value.tobytes())


def receive(pipe: BinaryIO, count: int) -> Iterator[tuple[str, Arrays]]:
    """Read `count` episodes; fewer of them (the sender died) raise EOFError."""
    for number in range(count):
        line = pipe.readline()
        if not line:
            raise EOFError(f"the sender stopped after {number} of {count} episodes")
        head = json.loads(line)
        arrays = {}
        for name, dtype, shape in head["arrays"]:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            data = pipe.read(size)
            if len(data) != size:
                raise EOFError(f"the sender stopped in episode {number} of {count}")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
        yield head["task"], arrays


def export(header: dict[str, Any], episodes: Iterable[tuple[str, Arrays]], root: Path) -> None:
    """Write the dataset into the new folder `root`.

    Args:
        header: `repo_id`, `fps`, `robot`, `codec`, `video` and `features` (LeRobot's declarations, each with
            the `source` array it is filled from).
        episodes: task and per-step arrays of each episode.
        root: must not exist.
    """
    module = importlib.import_module("lerobot.datasets.lerobot_dataset")
    version = str(module.CODEBASE_VERSION)
    if not version.startswith("v3"):
        raise RuntimeError(f"this lerobot writes {version}, v3.0 needs lerobot 0.4 or newer")
    dataset_class = module.LeRobotDataset
    sources = {name: feature["source"] for name, feature in header["features"].items()}
    features = {
        name: {"dtype": item["dtype"], "shape": tuple(item["shape"]), "names": item["names"]}
        for name, item in header["features"].items()
    }
    pictures = any(item["dtype"] in ("video", "image") for item in features.values())
    options = _accepted(dataset_class.create, vcodec=header["codec"])
    saving = _accepted(dataset_class.save_episode, parallel_encoding=False)
    dataset = dataset_class.create(
        repo_id=header["repo_id"],
        fps=header["fps"],
        features=features,
        root=root,
        robot_type=header["robot"],
        use_videos=header["video"],
        image_writer_threads=4 if pictures else 0,
        **options,
    )
    try:
        for task, arrays in episodes:
            for step in range(len(arrays["action"])):
                frame: dict[str, Any] = {"task": task}
                for name, source in sources.items():
                    frame[name] = np.asarray(arrays[source][step]).reshape(features[name]["shape"])
                dataset.add_frame(frame)
            dataset.save_episode(**saving)
    finally:
        if getattr(dataset, "image_writer", None) is not None:
            dataset.stop_image_writer()
        dataset.finalize()


def _accepted(method: Any, **options: Any) -> dict[str, Any]:
    """Those of `options` that `method` knows; they come and go between releases."""
    known = inspect.signature(method).parameters
    return {name: value for name, value in options.items() if name in known}


def main() -> None:
    """Entry point of the script: the only argument is the folder to create."""
    here = Path(__file__).resolve().parent  # holds a lerobot.py of ours, which would hide the package
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    pipe = sys.stdin.buffer
    header = json.loads(pipe.readline())
    export(header, receive(pipe, header["episodes"]), Path(sys.argv[1]))


if __name__ == "__main__":
    main()
