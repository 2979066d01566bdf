# SPDX-License-Identifier: Apache-2.0
import re
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from robopost.errors import ConfigError, RobopostError
from robopost.evaluate.video import (
    MAX_FPS,
    MAX_FRAMES,
    Clip,
    Recorder,
    compose,
    shrink,
    side_by_side,
    write_gif,
    write_grid,
    write_mp4,
    write_strip,
)

GREEN, RED = np.array([52, 199, 120]), np.array([214, 84, 84])


def frames(count, height=40, width=60, value=0):
    return [np.full((height, width, 3), (value + 5 * i) % 256, np.uint8) for i in range(count)]


def clip(count=10, success_at=None, judged=True, **kwargs):
    return Clip(frames(count), length=count, success_at=success_at, judged=judged, fps=20, **kwargs)


def has_colour(frame, colour):
    return bool((np.abs(frame.astype(int) - colour).sum(axis=-1) < 6).any())


def test_mp4_decodes_with_the_right_frames_size_and_rate(tmp_path):
    path = tmp_path / "a.mp4"
    source = frames(12, 64, 96)
    assert write_mp4(source, path, fps=20) == 12
    decoded = iio.imread(path, plugin="FFMPEG")
    assert decoded.shape == (12, 64, 96, 3)
    for got, sent in zip(decoded, source, strict=True):
        assert abs(int(got.mean()) - int(sent.mean())) <= 3
    assert iio.immeta(path, plugin="FFMPEG")["fps"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_mp4_is_what_browsers_play(tmp_path):
    path = tmp_path / "a.mp4"
    write_mp4(frames(4), path, fps=10)
    probe = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True)
    assert re.search(r"Video: h264.*yuv420p", probe.stderr)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts before it is loaded whole


def test_odd_sides_are_padded_not_refused(tmp_path):
    write_mp4(frames(3, 41, 63), tmp_path / "a.mp4", fps=10)
    assert iio.imread(tmp_path / "a.mp4", plugin="FFMPEG").shape == (3, 42, 64, 3)


def test_bad_frames_leave_nothing_behind(tmp_path):
    with pytest.raises(RobopostError, match="no frames"):
        write_mp4([], tmp_path / "a.mp4", fps=10)
    with pytest.raises(RobopostError, match=r"frame 2 has shape \(20, 60, 3\)"):
        write_mp4([*frames(2), *frames(1, height=20)], tmp_path / "a.mp4", fps=10)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RobopostError, match=r"a\.mp4 can't be written"):
        write_mp4(frames(2), tmp_path / "file" / "a.mp4", fps=10)


def test_marks_appear_at_success_and_at_the_end_only():
    shown = list(compose([("", [clip(10, success_at=4)])], hold=0.2))
    assert len(shown) == 14
    assert [has_colour(frame, GREEN) for frame in shown] == [False] * 4 + [True] * 10
    failed = list(compose([("", [clip(10)])], hold=0.2))
    assert [has_colour(frame, RED) for frame in failed] == [False] * 10 + [True] * 4
    plain = list(compose([("", [clip(10, judged=False)])], hold=0.2))
    assert not any(has_colour(f, RED) or has_colour(f, GREEN) for f in plain)


def test_a_success_in_the_last_step_is_marked():
    shown = list(compose([("", [clip(10, success_at=10)])], hold=0.1))
    assert [has_colour(frame, GREEN) for frame in shown] == [False] * 10 + [True] * 2
    # Seven steps at stride 3: frames of steps 0, 3, 6; the success of step 7 shows after the last frame.
    strided = Clip(frames(3), length=7, success_at=7, fps=10, stride=3)
    shown = list(compose([("", [strided])], hold=0.2))
    assert [has_colour(frame, GREEN) for frame in shown] == [False, False, False, True, True]


def test_side_by_side_shows_both_at_once(tmp_path):
    before, after = [clip(6), clip(8)], [clip(5, success_at=3), clip(4, success_at=2)]
    assert side_by_side(before, after, tmp_path / "a.mp4", titles=("cloned", "tuned")) == 8 + 20
    decoded = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")
    assert len(decoded) == 28
    assert decoded.shape[1] % 2 == 0
    assert decoded.shape[2] % 2 == 0
    first, last = list(compose([("cloned", before), ("tuned", after)]))[::27]
    half = first.shape[1] // 2
    assert has_colour(last[:, half:], GREEN)
    assert not has_colour(last[:, :half], GREEN)
    assert has_colour(last[:, :half], RED)


def test_clips_of_different_length_and_size_share_a_picture(tmp_path):
    clips = [Clip(frames(2, 30, 30), length=2), Clip(frames(5, 50, 20), length=5), Clip(frames(3), length=3)]
    assert write_grid(clips, tmp_path / "a.mp4") == 5 + 30
    with pytest.raises(ConfigError, match="video_episodes >= 1"):
        write_grid([], tmp_path / "b.mp4")
    with pytest.raises(ConfigError, match="no recorded frames"):
        write_grid([Clip([])], tmp_path / "b.mp4")


def test_gif_and_strip(tmp_path):
    blocks = [("before", [clip(60)]), ("after", [clip(60, success_at=30)])]
    count = write_gif(blocks, tmp_path / "a.gif", width=200, fps=10)
    image = Image.open(tmp_path / "a.gif")
    assert count == 40  # 80 frames at 20 per second, every second one
    durations = []
    for i in range(image.n_frames):  # equal frames at the end are stored once, shown longer
        image.seek(i)
        durations.append(image.info["duration"])
    assert durations[0] == 100
    assert sum(durations) == 4000
    assert image.width <= 200
    assert image.info["loop"] == 0
    write_strip([clip(20), clip(7)], tmp_path / "a.png", count=4)
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (80, 240, 3)
    assert strip[0, 0, 0] == 0
    assert strip[0, -1, 0] == 95  # frame 19 of the first clip


def test_long_episodes_are_shown_faster_and_fast_ones_thinned():
    slow = Recorder(1, max_steps=100, render_fps=20)
    assert (slow._stride, slow._speed, slow._fps) == (1, 1, 20)
    long = Recorder(1, max_steps=1000, render_fps=20)
    assert (long._stride, long._speed, long._fps) == (2, 2, 20)
    assert 1000 / long._stride <= MAX_FRAMES
    fast = Recorder(1, max_steps=500, render_fps=100)
    assert (fast._stride, fast._speed, fast._fps) == (2, 1, MAX_FPS)


def test_shrink_keeps_the_aspect_and_never_enlarges():
    assert shrink(np.zeros((480, 640, 3), np.uint8)).shape == (192, 256, 3)
    assert shrink(np.zeros((96, 96, 3), np.uint8)).shape == (96, 96, 3)
