# SPDX-License-Identifier: Apache-2.0
"""Video frames of LeRobot datasets, through PyAV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from robopost.data.formats.lerobot_meta import EXTRA
from robopost.errors import DataError, require


def read_frames(
    path: Path,
    count: int,
    fps: float,
    start: float = 0.0,
    size: tuple[int, int] | None = None,
    whole: bool = False,
) -> np.ndarray:
    """Decode `count` consecutive frames.

    Args:
        path: video file, which may hold several episodes.
        count: frames of the episode.
        fps: frames per second of the dataset.
        start: seconds in the file at which the episode starts.
        size: (height, width) to scale to, bilinear; None = as recorded.
        whole: the file holds this episode alone, so that further frames are an error.

    Returns:
        (count, H, W, 3) uint8, RGB.

    Raises:
        DataError: missing, torn, or with another number of frames.
    """
    av = require("av", EXTRA)
    if not path.is_file():
        raise DataError(f"missing video {path}")
    reformatter = av.video.reformatter.VideoReformatter()  # one for all: making its tables dwarfs using them
    first = start - 0.5 / fps
    frames: np.ndarray | None = None
    filled = 0
    origin = 0.0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            origin = float((stream.start_time or 0) * stream.time_base)
            if start > 0:
                container.seek(int((start + origin) / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.time is not None and frame.time - origin < first:
                    continue
                if filled == count:
                    filled += whole
                    break
                height, width = size or (frame.height, frame.width)
                image = reformatter.reformat(
                    frame, width, height, "rgb24", interpolation="BILINEAR"
                ).to_ndarray()
                if frames is None:
                    frames = np.empty((count, *image.shape), np.uint8)
                if (
                    filled == 0
                    and frame.time is not None
                    and frame.time - origin > start + 0.5 / fps
                    and start > 0
                ):
                    raise DataError(
                        f"{path}: no frame at {start:.3f} s, the next one is at {frame.time:.3f} s"
                    )
                frames[filled] = image
                filled += 1
    except DataError:
        raise
    except Exception as error:  # libav has a tree of its own; a torn file can also break numpy's shapes
        raise DataError(
            f"{path} does not decode after {filled} frames ({error}). Fix: copy it again"
        ) from error
    if frames is None or filled != count:
        amount = f"more than {count}" if filled > count else f"{filled}"
        raise DataError(f"{path} has {amount} frames from {start:.3f} s on, the table has {count} rows")
    return frames


def probe(path: Path) -> dict[str, Any]:
    """Facts about a video without decoding it: frames, height, width, fps.

    Raises:
        DataError: the file does not open, or has no picture.
    """
    av = require("av", EXTRA)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = sum(1 for packet in container.demux(stream) if packet.size)
            rate = float(stream.average_rate) if stream.average_rate else 0.0
            return {"frames": frames, "height": stream.height, "width": stream.width, "fps": rate}
    except Exception as error:
        raise DataError(f"{path} does not open as video ({error})") from error


def read_images(cells: list[Any], where: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode images kept inside a table: cells `{"bytes": ..., "path": ...}`, PNG or JPEG.

    Returns:
        (T, H, W, 3) uint8.
    """
    imageio = require("imageio.v3", EXTRA)
    images = []
    for row, cell in enumerate(cells):
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if not data:
            raise DataError(f"{where}, row {row}: the image lies outside the table. Fix: cameras=none")
        try:
            image = imageio.imread(data)
        except Exception as error:
            raise DataError(f"{where}, row {row}: the image does not decode ({error})") from error
        image = np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image[..., :3]
        images.append(_scaled(image, size) if size else image)
    return np.stack(images).astype(np.uint8)


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    av = require("av", EXTRA)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image, dtype=np.uint8), format="rgb24")
    return frame.to_ndarray(format="rgb24", width=size[1], height=size[0], interpolation="BILINEAR")
