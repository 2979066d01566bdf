# SPDX-License-Identifier: Apache-2.0
"""LeRobot v2.0, v2.1 and v3.0 made by hand (parquet, mp4), and what can be wrong with them."""

import json

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robopost.data.convert import import_source
from robopost.data.formats import find_format, open_source
from robopost.data.formats.lerobot import LeRobot
from robopost.data.verify import verify
from robopost.errors import DataError

FPS = 10
LENGTHS = (4, 6)
SIZE = (16, 24)
TOP = "observation.images.top"
TASKS = ("open the door", "close the door")


def brightness(episode, step):
    return 20 + 60 * episode + 25 * step


def write_video(path, levels, size=SIZE, fps=FPS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "5", "g": "2"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rows(episode, start):
    steps = LENGTHS[episode]
    number = np.arange(steps)
    return {
        "observation.state": (number[:, None] + [[0.5, 100 * episode]]).tolist(),
        "observation.grip": number.astype(float).tolist(),
        "action": (-number[:, None] * [[1.0, 2.0, 3.0]]).tolist(),
        "next.reward": (number == steps - 1).astype(np.float32).tolist(),
        "next.done": (number == steps - 1).tolist(),
        "valid": [1] * steps,
        "timestamp": (number / FPS).astype(np.float32).tolist(),
        "frame_index": number.tolist(),
        "episode_index": [episode] * steps,
        "index": (start + number).tolist(),
        "task_index": [episode] * steps,
    }


def table(columns, fixed=True):
    arrays = {}
    for name, values in columns.items():
        if values and isinstance(values[0], list):
            kind = pa.list_(pa.float32(), len(values[0])) if fixed else pa.list_(pa.float64())
            arrays[name] = pa.array(values, kind)
        else:
            arrays[name] = pa.array(values)
    return pa.table(arrays)


def features():
    return {
        "observation.state": {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        "observation.grip": {"dtype": "float32", "shape": [1], "names": None},
        "action": {"dtype": "float32", "shape": [3], "names": None},
        "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        "next.done": {"dtype": "bool", "shape": [1], "names": None},
        "valid": {"dtype": "int64", "shape": [1], "names": None},
        "note": {"dtype": "string", "shape": [1], "names": None},
        TOP: {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channel"]},
        **{
            name: {"dtype": "int64", "shape": [1], "names": None}
            for name in ("timestamp", "frame_index", "episode_index", "index", "task_index")
        },
    }


def put_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(value) if isinstance(value, dict) else "".join(json.dumps(v) + "\n" for v in value)
    )


def write_v2(root, version="v2.1"):
    # GR00T's sets number their chunks by the episode's index.
    chunk = "chunk-{episode_chunk:03d}" if version == "v2.1" else "chunk-{episode_index:03d}"
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "chunks_size": 1000,
        "fps": FPS,
        "data_path": f"data/{chunk}/episode_{{episode_index:06d}}.parquet",
        "video_path": f"videos/{chunk}/{{video_key}}/episode_{{episode_index:06d}}.mp4",
        "features": features(),
    }
    put_json(root / "meta/info.json", info)
    put_json(root / "meta/tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(TASKS)])
    episodes = [
        {"episode_index": i, "tasks": [TASKS[i], "valid"], "length": n} for i, n in enumerate(LENGTHS)
    ]
    put_json(root / "meta/episodes.jsonl", episodes)
    start = 0
    for episode, steps in enumerate(LENGTHS):
        path = root / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(rows(episode, start), fixed=version == "v2.1"), path)
        levels = [brightness(episode, t) for t in range(steps)]
        write_video(root / f"videos/chunk-000/{TOP}/episode_{episode:06d}.mp4", levels)
        start += steps
    return root


def write_v3(root):
    """Both episodes in one table and one video, the second starting where the first ends."""
    info = {
        "codebase_version": "v3.0",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "fps": FPS,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features(),
    }
    put_json(root / "meta/info.json", info)
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    meta, tables, levels, start = [], [], [], 0
    for episode, steps in enumerate(LENGTHS):
        place = {f"videos/{TOP}/chunk_index": 0, f"videos/{TOP}/file_index": 0}
        span = {
            f"videos/{TOP}/from_timestamp": start / FPS,
            f"videos/{TOP}/to_timestamp": (start + steps) / FPS,
        }
        data = {"data/chunk_index": 0, "data/file_index": 0, "stats/action/mean": [0.0]}
        meta.append(
            {"episode_index": episode, "tasks": [TASKS[episode]], "length": steps, **data, **place, **span}
        )
        tables.append(table(rows(episode, start)))
        levels += [brightness(episode, t) for t in range(steps)]
        start += steps
    (root / "meta/episodes/chunk-000").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(meta), root / "meta/episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.concat_tables(tables), root / "data/chunk-000/file-000.parquet")
    write_video(root / f"videos/{TOP}/chunk-000/file-000.mp4", levels)
    return root


MAKERS = {"v2.0": lambda p: write_v2(p, "v2.0"), "v2.1": write_v2, "v3.0": write_v3}


@pytest.fixture(params=MAKERS)
def dataset(request, tmp_path):
    return MAKERS[request.param](tmp_path / request.param)


def test_read(dataset):
    assert find_format(dataset).name == "lerobot"
    source = open_source(dataset)
    assert source.spec.obs == {
        "state": ((2,), "float32"),
        "grip": ((1,), "float32"),
        "image_top": ((*SIZE, 3), "uint8"),
    }
    assert (source.spec.action_dim, source.spec.bounded, source.fps, source.count) == (3, False, 10.0, 2)
    assert source.metadata["names"]["observation.state"] == ["x", "y"]
    assert source.metadata["features_left_out"] == ["note"]
    first, second = source.episodes
    np.testing.assert_array_equal(second.obs["state"], [[t + 0.5, t + 100] for t in range(6)])
    np.testing.assert_array_equal(first.obs["grip"], [[0], [1], [2], [3]])
    np.testing.assert_array_equal(first.action[3], [-3, -6, -9])
    np.testing.assert_array_equal(second.reward, [0, 0, 0, 0, 0, 1])
    assert (first.instruction, second.instruction) == TASKS
    assert (first.terminated, first.truncated, first.has_final_obs) == (True, False, False)
    np.testing.assert_allclose(second.extras["timestamp"], np.arange(6) / FPS, atol=1e-6)
    assert second.extras["valid"].tolist() == [[1]] * 6
    for index, episode in enumerate((first, second)):
        # frame t of the right episode: neighbours differ by 25, codec noise by a few
        levels = episode.obs["image_top"].astype(float).mean(axis=(1, 2, 3))
        wanted = np.minimum([brightness(index, t) for t in range(len(episode))], 255)
        np.testing.assert_allclose(levels, wanted, atol=4)


def test_verify_finds_nothing_but_constants(dataset):
    found = verify(dataset)
    assert [p for p in found if p.severity == "error"] == []
    assert all("constant" in p.what for p in found)


def test_choices(dataset):
    source = LeRobot.read(dataset, cameras="none", keys="state", episodes="1", action_limit=9)
    assert source.spec.obs == {"state": ((2,), "float32")}
    assert source.spec.action_low == (-9.0,) * 3
    (episode,) = source.episodes
    assert episode.metadata["episode_index"] == 1
    resized = LeRobot.read(dataset, cameras="top", resize="8x10", episodes="0:1")
    assert next(iter(resized.episodes)).obs["image_top"].shape == (4, 8, 10, 3)


def test_import_into_a_store(dataset, tmp_path):
    with import_source(open_source(dataset), tmp_path / "store") as store:
        assert (len(store), store.num_steps, store.fps) == (2, 10, 10.0)
        assert [info["instruction"] for info in store.episode_info] == list(TASKS)


def video_file(root):
    return next(iter(sorted(root.rglob("*.mp4"))))


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_missing_video(tmp_path, version):
    root = MAKERS[version](tmp_path / "set")
    video_file(root).unlink()
    (problem,) = [p for p in verify(root) if p.severity == "error"]
    assert problem.where == "episode 0, key 'image_top'"
    assert "missing video videos/" in problem.what
    assert "missing_video=skip" in problem.fix
    with pytest.raises(
        DataError, match=r"image_top of 1 of 2 episodes \(0\).*missing_video=skip.*cameras=none"
    ):
        LeRobot.read(root)
    assert [e.metadata["episode_index"] for e in LeRobot.read(root, missing_video="skip").episodes] == [1]
    assert len(list(LeRobot.read(root, cameras="none").episodes)) == 2


def no_video_at_all(root):
    for path in list(root.rglob("*.mp4")):
        path.unlink()


def video_cut_short(root):
    path = video_file(root)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_frame_less(root):
    path = video_file(root)
    levels = [brightness(0, t) for t in range(3)] if "episode" in path.name else [9] * 9
    write_video(path, levels)


def video_at_another_rate(root):
    path = video_file(root)
    write_video(path, [1] * (4 if "episode" in path.name else 10), fps=25)


def one_row_less(root):
    path = next(iter(sorted((root / "data").rglob("*.parquet"))))
    whole = pq.read_table(path)
    pq.write_table(whole.slice(1), path)


def table_cut_short(root):
    path = next(iter(sorted((root / "data").rglob("*.parquet"))))
    path.write_bytes(path.read_bytes()[:-20])


def table_missing(root):
    next(iter(sorted((root / "data").rglob("*.parquet")))).unlink()


def change_column(name, change):
    def apply(root):
        path = next(iter(sorted((root / "data").rglob("*.parquet"))))
        whole = pq.read_table(path)
        values = change(whole.column(name).to_pylist())
        at = whole.column_names.index(name)
        pq.write_table(whole.set_column(at, name, pa.array(values)), path)

    return apply


def nan_in_row_2(values):
    values[2] = [float("nan"), 0.0]
    return values


def misnumbered(values):
    values[1] = 7
    return values


@pytest.mark.parametrize("version", MAKERS)
@pytest.mark.parametrize(
    ("damage", "where", "what"),
    [
        (no_video_at_all, "key 'image_top'", "none of the 2 episodes has one"),
        (video_cut_short, "key 'image_top'", "does not open as video"),
        (one_frame_less, "key 'image_top'", "frames, the table has"),
        (video_at_another_rate, "episode 0, key 'image_top'", "wrong rate: the video runs at 25"),
        (one_row_less, "episode 0", "3 rows, meta/episodes says 4"),
        (table_cut_short, "", "does not open as parquet"),
        (table_missing, "", "is missing"),
        (
            change_column("observation.state", nan_in_row_2),
            "episode 0, row 2, key 'state'",
            "NaN in 1 row(s)",
        ),
        (
            change_column("action", lambda v: [row[:2] for row in v]),
            "episode 0",
            "column 'action' has shape (2,)",
        ),
        (
            change_column("timestamp", lambda v: [t * 2 for t in v]),
            "episode 0, row 1, key 'timestamp'",
            "wrong rate",
        ),
        (
            change_column("frame_index", misnumbered),
            "episode 0, row 1, key 'frame_index'",
            "7 is not its number",
        ),
        (
            change_column("task_index", misnumbered),
            "episode 0, row 1, key 'task_index'",
            "task 7 is not in meta/tasks",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verify_says_where(tmp_path, version, damage, where, what):
    root = MAKERS[version](tmp_path / "set")
    damage(root)
    errors = [p for p in verify(root) if p.severity == "error"]
    assert any(where in p.where and what in f"{p.where} {p.what}" for p in errors), [str(p) for p in errors]


def test_verify_goes_on_after_a_bad_episode(tmp_path):
    root = write_v2(tmp_path / "set")
    paths = sorted((root / "data").rglob("*.parquet"))
    paths[0].write_bytes(b"PAR1")
    whole = pq.read_table(paths[1])
    action = pa.array([[float("inf")] * 3, *whole.column("action").to_pylist()[1:]])
    pq.write_table(whole.set_column(whole.column_names.index("action"), "action", action), paths[1])
    errors = [str(p) for p in LeRobot.verify(root, cameras="none") if p.severity == "error"]
    assert any("episode_000000.parquet" in text for text in errors)
    assert any("episode 1, row 0, key 'action'" in text for text in errors)


def test_false_totals_are_a_warning(tmp_path):
    root = write_v2(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    put_json(root / "meta/info.json", info | {"total_frames": 99})
    assert any(p.severity == "warning" and "total_frames is 99" in p.what for p in verify(root))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cameras": "tob"}, "Did you mean 'image_top'"),
        ({"keys": "stat"}, "Did you mean 'state'"),
        ({"resize": "96"}, "resize='96' must be HEIGHTxWIDTH"),
        ({"episodes": "7"}, "no such episode, there are 0 to 1"),
        ({"episodes": "a"}, "must be numbers and ranges"),
        ({"missing_video": "skp"}, "Did you mean 'skip'"),
        ({"camera": "top"}, "Did you mean 'cameras'"),
    ],
)
def test_bad_options(tmp_path, options, text):
    with pytest.raises(DataError, match=text):
        open_source(write_v2(tmp_path / "set"), "auto", options)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"codebase_version": "v1.6"}, "is LeRobotDataset 'v1.6'.*convert it"),
        ({"codebase_version": "v4.0"}, "is LeRobotDataset 'v4.0'.*upgrade robopost"),
        ({"fps": 0}, "lacks 'fps'"),
        ({"features": {"observation.state": {"dtype": "float32", "shape": [2]}}}, "declares no 'action'"),
    ],
)
def test_bad_info(tmp_path, change, text):
    root = write_v2(tmp_path / "set")
    info = json.loads((root / "meta/info.json").read_text())
    put_json(root / "meta/info.json", info | change)
    with pytest.raises(DataError, match=text):
        open_source(root)


def test_torn_jsonl_names_the_line(tmp_path):
    root = write_v2(tmp_path / "set")
    with (root / "meta/episodes.jsonl").open("a") as file:
        file.write('{"episode_index": 2, "tas')
    with pytest.raises(DataError, match=r"episodes.jsonl, line 3 is torn"):
        open_source(root)
