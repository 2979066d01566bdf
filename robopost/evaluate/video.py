# SPDX-License-Identifier: Apache-2.0
"""Videos of episodes: H.264 mp4 that plays in browsers, before/after side by side, GIF and PNG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robopost.errors import ConfigError, RobopostError

if TYPE_CHECKING:
    from robopost.vector import VecEnv

MAX_FRAMES = 500  # per episode; longer ones are shown faster, and the caption says so
MAX_FPS = 50
TILE = 256  # longest side of a recorded frame in pixels
_BAND, _TITLE, _GAP, _FRAME = 22, 34, 10, 3
_DARK, _PANEL, _TEXT, _DIM = (17, 20, 26), (30, 35, 44), (236, 239, 244), (148, 158, 174)
_GOOD, _BAD = (52, 199, 120), (214, 84, 84)


@dataclass
class Clip:
    """The recorded frames of one episode.

    Attributes:
        frames: (H, W, 3) uint8 arrays of one size, every `stride` environment steps.
        episode: index of the episode in its evaluation.
        length: environment steps of the episode.
        success_at: step at which success was first reported, None for never.
        judged: False where the task has no success predicate: neither mark is drawn.
        fps: playback rate.
        stride: environment steps between two frames.
        speed: playback speed against real time.
    """

    frames: list[np.ndarray]
    episode: int = 0
    length: int = 0
    success_at: int | None = None
    judged: bool = True
    fps: float = 30.0
    stride: int = 1
    speed: int = 1


@dataclass
class Recorder:
    """Collects frames of the first `episodes` episodes of an evaluation."""

    episodes: int
    max_steps: int = 0
    render_fps: float | None = None
    _clips: dict[int, Clip] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rate = float(self.render_fps or 30)
        skip = math.ceil(rate / MAX_FPS)
        self._speed = max(1, math.ceil(self.max_steps / skip / MAX_FRAMES))
        self._fps, self._stride = rate / skip, skip * self._speed

    def frames(self, vec: VecEnv, first: int, running: np.ndarray, steps: int) -> None:
        """Render the running recorded episodes before a step; slot i holds episode `first + i`."""
        slots = [int(i) for i in np.flatnonzero(running) if first + i < self.episodes]
        for i in slots:
            clip = self._clips.setdefault(
                first + i, Clip([], first + i, fps=self._fps, stride=self._stride, speed=self._speed)
            )
            clip.length = steps + 1
        if slots and steps % self._stride == 0:
            for i, frame in zip(slots, vec.render(slots), strict=True):
                self._clips[first + i].frames.append(shrink(frame))

    def successes(self, first: int, running: np.ndarray, success: np.ndarray, steps: int) -> None:
        """Note the first success of running recorded episodes after step number `steps`."""
        for i in np.flatnonzero(running & success):
            clip = self._clips.get(first + int(i))
            if clip is not None and clip.success_at is None:
                clip.success_at = steps

    def clips(self, successes: np.ndarray | None) -> list[Clip]:
        """All clips in the order of their episodes."""
        for clip in self._clips.values():
            clip.judged = successes is not None
        return [self._clips[key] for key in sorted(self._clips)]


def shrink(frame: np.ndarray, size: int = TILE) -> np.ndarray:
    """Scale (H, W, 3) down so that its longest side is at most `size`; smaller frames stay as they are."""
    height, width = frame.shape[:2]
    factor = size / max(height, width)
    if factor >= 1:
        return np.ascontiguousarray(frame[..., :3], dtype=np.uint8)
    new = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(frame[..., :3]).resize(new, Image.Resampling.LANCZOS))


def write_mp4(frames: Iterator[np.ndarray] | Sequence[np.ndarray], path: Path, fps: float) -> int:
    """Write frames (H, W, 3) uint8 as H.264, yuv420p, index first; odd sides are padded by one pixel.

    Returns:
        Number of frames written. The file appears whole or not at all.

    Raises:
        RobopostError: there are no frames, they differ in size, or ffmpeg fails.
    """
    partial = path.with_name(f".{path.stem}.partial.mp4")
    writer, shape, count = None, None, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for frame in frames:
            if frame.shape[0] % 2 or frame.shape[1] % 2:
                frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
            if writer is None:
                shape = frame.shape
                size = (shape[1], shape[0])
                options = [
                    "-crf",
                    "23",
                    "-preset",
                    "veryfast",
                    "-movflags",
                    "+faststart",
                    "-pix_fmt",
                    "yuv420p",
                ]
                writer = imageio_ffmpeg.write_frames(
                    str(partial),
                    size,
                    fps=fps,  # type: ignore[arg-type]  # a float is fine, its signature infers int
                    codec="libx264",
                    quality=None,  # type: ignore[arg-type]  # None leaves -crf alone
                    macro_block_size=1,
                    output_params=options,
                    ffmpeg_log_level="error",
                )
                writer.send(None)
            if frame.shape != shape:
                raise RobopostError(
                    f"video {path.name}: frame {count} has shape {frame.shape}, the first {shape}"
                )
            writer.send(np.ascontiguousarray(frame, dtype=np.uint8))
            count += 1
        if writer is None:
            raise RobopostError(f"video {path.name}: there are no frames to write")
        writer.close()
        if not partial.exists() or partial.stat().st_size == 0:
            raise RobopostError(f"video {path.name}: ffmpeg wrote nothing; is the disk full?")
        partial.replace(path)
    except OSError as error:
        raise RobopostError(f"video {path.name} can't be written: {error}") from error
    finally:
        if writer is not None:
            writer.close()
        with suppress(OSError):
            partial.unlink()
    return count


Block = tuple[str, Sequence[Clip]]


def compose(blocks: Sequence[Block], *, columns: int = 0, hold: float = 1.0) -> Iterator[np.ndarray]:
    """Frames of titled blocks of clips, side by side, with success marks and step counters.

    Args:
        blocks: (title, clips); an empty title leaves the title band out.
        columns: tiles per row of a block, 0 = as square as possible.
        hold: seconds the last frame stays.
    """
    blocks = [(title, list(clips)) for title, clips in blocks]
    every = [clip for _, clips in blocks for clip in clips]
    if not every or any(not clip.frames for clip in every):
        raise ConfigError("video: there are no recorded frames. Fix: evaluate with video_episodes >= 1")
    height = max(clip.frames[0].shape[0] for clip in every)
    width = max(clip.frames[0].shape[1] for clip in every)
    most = max(len(clips) for _, clips in blocks)
    columns = columns or math.ceil(math.sqrt(most))
    rows = math.ceil(most / columns)
    cell_w, cell_h = width + 2 * _FRAME, height + 2 * _FRAME + _BAND
    title_h = _TITLE if any(title for title, _ in blocks) else 0
    block_w = columns * cell_w + (columns - 1) * _GAP
    # Even sides: yuv420p halves the colour planes.
    total_w = _even(len(blocks) * block_w + (len(blocks) + 1) * 2 * _GAP)
    total_h = _even(title_h + rows * cell_h + (rows - 1) * _GAP + 2 * _GAP)
    longest = max(len(clip.frames) for clip in every)
    for t in range(longest + round(hold * every[0].fps)):
        canvas = Image.new("RGB", (total_w, total_h), _DARK)
        draw = ImageDraw.Draw(canvas)
        for b, (title, clips) in enumerate(blocks):
            left = 2 * _GAP + b * (block_w + 2 * _GAP)
            if title:
                _title(draw, title, clips, t, left, block_w)
            for k, clip in enumerate(clips):
                x = left + (k % columns) * (cell_w + _GAP)
                y = title_h + _GAP + (k // columns) * (cell_h + _GAP)
                _tile(canvas, draw, clip, t, (x, y, cell_w, cell_h))
        yield np.asarray(canvas)


def write_grid(clips: Sequence[Clip], path: Path, *, columns: int = 0) -> int:
    """All clips of one evaluation as tiles of one mp4. Returns the number of frames."""
    return write_mp4(compose([("", clips)], columns=columns), path, _fps([("", clips)]))


def side_by_side(
    before: Sequence[Clip],
    after: Sequence[Clip],
    path: Path,
    *,
    titles: tuple[str, str] = ("before", "after"),
) -> int:
    """Two evaluations of the same episode seeds next to each other. Returns the number of frames."""
    blocks: list[Block] = [(titles[0], before), (titles[1], after)]
    return write_mp4(compose(blocks), path, _fps(blocks))


def write_gif(
    blocks: Sequence[Block], path: Path, *, width: int = 720, fps: float = 10, max_frames: int = 120
) -> int:
    """A small looping GIF of the same picture, for a README. Returns the number of frames."""
    frames = list(compose(blocks))
    step = max(1, round(_fps(blocks) / fps), math.ceil(len(frames) / max_frames))
    images = []
    for frame in frames[::step]:
        image = Image.fromarray(frame)
        if image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        images.append(image)
    images = _one_palette(images)
    path.parent.mkdir(parents=True, exist_ok=True)
    duration = round(1000 * step / _fps(blocks))
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=True)
    return len(images)


def _one_palette(images: list[Image.Image], colours: int = 128) -> list[Image.Image]:
    """Quantise all frames to one palette: small rare marks keep their colour, and equal pixels stay equal."""
    picks = [images[i].convert("RGB") for i in np.linspace(0, len(images) - 1, 4).round().astype(int)]
    sample = Image.fromarray(np.concatenate([np.asarray(pick) for pick in picks], axis=0))
    palette = sample.quantize(colors=colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    return [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]


def write_strip(clips: Sequence[Clip], path: Path, *, count: int = 6) -> None:
    """One PNG: a row of `count` evenly spaced frames per clip, first to last."""
    if not clips:
        raise ConfigError("video: there are no clips for a strip. Fix: evaluate with video_episodes >= 1")
    rows = []
    for clip in clips:
        picks = np.linspace(0, len(clip.frames) - 1, count).round().astype(int)
        rows.append(np.concatenate([clip.frames[i] for i in picks], axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(path, optimize=True)


def _fps(blocks: Sequence[Block]) -> float:
    return next((clip.fps for _, clips in blocks for clip in clips), 30.0)


def _even(value: int) -> int:
    return value + value % 2


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _title(
    draw: ImageDraw.ImageDraw, title: str, clips: Sequence[Clip], t: int, left: int, width: int
) -> None:
    draw.text((left, _GAP), title, font=_font(20), fill=_TEXT)
    if clips and all(clip.judged for clip in clips):
        won = sum(_succeeded(clip, t) for clip in clips)
        text = f"{won} of {len(clips)} solved"
        font = _font(15)
        draw.text((left + width - draw.textlength(text, font=font), _GAP + 4), text, font=font, fill=_DIM)


def _succeeded(clip: Clip, t: int) -> bool:
    return clip.success_at is not None and min(t, len(clip.frames)) * clip.stride >= min(
        clip.success_at, len(clip.frames) * clip.stride
    )


def _tile(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, clip: Clip, t: int, box: tuple[int, int, int, int]
) -> None:
    x, y, w, h = box
    over = t >= len(clip.frames)
    won = _succeeded(clip, t)
    lost = clip.judged and over and not won
    edge = _GOOD if clip.judged and won else _BAD if lost else _PANEL
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=_PANEL, outline=edge, width=_FRAME)
    frame = clip.frames[min(t, len(clip.frames) - 1)]
    canvas.paste(Image.fromarray(frame), (x + (w - frame.shape[1]) // 2, y + _FRAME))
    font, line = _font(13), y + h - _BAND + 1
    if clip.judged and (won or lost):
        _mark(draw, x + 10, line + 3, won)
    label = ("solved" if won else "not solved" if lost else "") if clip.judged else ""
    draw.text(
        (x + (26 if label else 10), line),
        label or f"episode {clip.episode}",
        font=font,
        fill=edge if label else _DIM,
    )
    step = min(t * clip.stride, clip.length)
    count = f"step {step}" + (f"  ×{clip.speed}" if clip.speed > 1 else "")
    draw.text((x + w - 10 - draw.textlength(count, font=font), line), count, font=font, fill=_DIM)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, won: bool) -> None:
    """A tick or a cross, drawn: the built-in font has neither glyph."""
    if won:
        draw.line([(x, y + 6), (x + 4, y + 10), (x + 11, y + 1)], fill=_GOOD, width=3, joint="curve")
    else:
        draw.line([(x + 1, y + 1), (x + 10, y + 10)], fill=_BAD, width=3)
        draw.line([(x + 10, y + 1), (x + 1, y + 10)], fill=_BAD, width=3)
