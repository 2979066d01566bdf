# SPDX-License-Identifier: Apache-2.0
import errno
import json
import os
import signal
import subprocess
import sys
import types

import pytest
from rich.console import Console

from robopost.config import TrackConfig
from robopost.errors import ConfigError, DataError, MissingExtraError, RobopostError
from robopost.registry import TRACKERS
from robopost.track import MultiTracker, TrackContext, Tracker, make_tracker, read_metrics
from robopost.track.console import ConsoleTracker
from robopost.track.jsonl import JsonlTracker, series


def jsonl(run_dir, resume_step=0):
    return JsonlTracker(TrackContext(run_dir, resume_step=resume_step))


def test_lines_are_on_disk_at_once_and_read_back(tmp_path):
    tracker = jsonl(tmp_path)
    tracker.log(10, {"loss/critic": 0.5, "value/q_mean": float("nan")})
    lines = read_metrics(tmp_path)  # before close
    assert lines[0]["step"] == 10
    assert lines[0]["loss/critic"] == 0.5
    assert lines[0]["value/q_mean"] is None
    tracker.log(20, {"loss/critic": 0.25})
    tracker.close()
    assert series(read_metrics(tmp_path), "loss/critic") == ([10, 20], [0.5, 0.25])
    assert series(read_metrics(tmp_path), "value/q_mean") == ([], [])
    times = [line["time"] for line in read_metrics(tmp_path)]
    assert 0 <= times[0] <= times[1]


def test_a_torn_last_line_is_ignored_and_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0.1, "a": 1}\n{"step": 2, "time": 0.2, "a')
    assert [line["step"] for line in read_metrics(path)] == [1]
    # A number cut in half still parses: without its newline the line is torn all the same.
    path.write_text('{"step": 1, "time": 0.1}\n{"step": 12')
    assert [line["step"] for line in read_metrics(path)] == [1]
    tracker = jsonl(tmp_path, resume_step=5)
    tracker.log(6, {"a": 2.0})
    tracker.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 6]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
    with pytest.raises(DataError, match="can't be read"):
        read_metrics(tmp_path / "absent")


def test_resume_drops_what_was_logged_past_the_checkpoint(tmp_path):
    tracker = jsonl(tmp_path)
    for step in (10, 20, 30, 40):
        tracker.log(step, {"a": float(step)})
    tracker.close()
    resumed = jsonl(tmp_path, resume_step=20)
    resumed.log(30, {"a": -1.0})
    resumed.close()
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["a"]) for line in lines] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert lines[2]["time"] >= lines[1]["time"]
    fresh = jsonl(tmp_path)  # killed before its first checkpoint: nothing is kept
    fresh.close()
    assert read_metrics(tmp_path) == []


def test_kill_loses_no_line(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from robopost.track.jsonl import JsonlTracker; from robopost.track import TrackContext\n"
        "t = JsonlTracker(TrackContext(Path(sys.argv[1])))\n"
        "for i in range(1, 51): t.log(i, {'a': 1.0})\n"
        "print('logged', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "logged\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(read_metrics(tmp_path)) == 50


def test_full_disk_is_one_clear_error(tmp_path):
    tracker = jsonl(tmp_path)

    class Full:
        closed = False

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    tracker._file.close()
    tracker._file = Full()
    with pytest.raises(RobopostError, match="the disk is full"):
        MultiTracker(tracker.context, [tracker]).log(1, {"a": 1.0})


def test_tensorboard_holds_the_same_numbers(tmp_path):
    tracker = make_tracker(tmp_path, TrackConfig(), {"seed": 1}, 0, total=20)
    tracker.log(10, {"loss/actor": 0.5})
    tracker.log(20, {"loss/actor": 0.25})
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/actor")] == [(10, 0.5), (20, 0.25)]
    assert series(read_metrics(tmp_path), "loss/actor") == ([10, 20], [0.5, 0.25])


def test_tensorboard_hides_a_lost_tail_after_resume(tmp_path):
    config = TrackConfig()
    for resume, steps in ((0, (10, 20, 30)), (10, (20,))):
        tracker = make_tracker(tmp_path, config, {}, resume)
        for step in steps:
            tracker.log(step, {"a": float(step + resume)})
        tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(10, 10.0), (20, 30.0)]


class Recorded:
    """A fake tracking package that writes down its calls."""

    def __init__(self):
        self.calls = []

    def module(self, name):
        module = types.ModuleType(name)
        module.init = lambda **kwargs: self.calls.append(("init", kwargs)) or self
        module.Video = lambda path, format=None: ("video", path, format)
        return module

    def log(self, row, **kwargs):
        self.calls.append(("log", row, kwargs))

    def define_metric(self, *args, **kwargs):
        self.calls.append(("define_metric", args, kwargs))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_call_contract(tmp_path, monkeypatch):
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", fake.module("wandb"))
    config = TrackConfig(tensorboard=False, also=["wandb"], project="arms")
    run = tmp_path / "td3-0"
    for resume in (0, 10):
        tracker = make_tracker(run, config, {"algo": {"name": "td3"}}, resume)
        tracker.log(resume + 10, {"loss/critic": 1.0})
        tracker.video(resume + 10, "eval", run / "v.mp4")
        tracker.close()
    inits = [call[1] for call in fake.calls if call[0] == "init"]
    assert inits[0] | {"id": ""} == {
        "project": "arms", "name": "td3-0", "dir": str(run), "config": {"algo": {"name": "td3"}}, "id": "",
        "resume": "allow",
    }  # fmt: skip
    assert inits[0]["id"] == inits[1]["id"]  # a resumed run goes on in the same W&B run
    assert len(inits[0]["id"]) == 8
    # Own x axis: W&B's counter only rises and would swallow what a resumed run logs again.
    assert ("define_metric", ("*",), {"step_metric": "step"}) in fake.calls
    logs = [call for call in fake.calls if call[0] == "log"]
    assert logs[0] == ("log", {"step": 10, "loss/critic": 1.0}, {})
    assert logs[1] == ("log", {"step": 10, "video/eval": ("video", str(run / "v.mp4"), "mp4")}, {})
    assert [call[0] for call in fake.calls].count("finish") == 2


def test_trackio_call_contract(tmp_path, monkeypatch):
    fake = Recorded()
    monkeypatch.setitem(sys.modules, "trackio", fake.module("trackio"))
    config = TrackConfig(tensorboard=False, also=["trackio"])
    for resume, mode in ((0, "never"), (10, "allow")):
        fake.calls.clear()
        tracker = make_tracker(tmp_path / "sac-0", config, {"seed": 0}, resume)
        tracker.log(20, {"eval/return": 3.0})
        tracker.close()
        assert fake.calls == [
            ("init", {"project": "robopost", "name": "sac-0", "config": {"seed": 0}, "resume": mode}),
            ("log", {"eval/return": 3.0}, {"step": 20}),
            ("finish",),
        ]


def test_console_and_tensorboard_can_be_turned_off(tmp_path, capsys):
    tracker = make_tracker(tmp_path, TrackConfig(tensorboard=False, console=False), {})
    tracker.log(1, {"a": 1.0})
    tracker.close()
    assert capsys.readouterr().out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_seeds_of_a_run_keep_apart(tmp_path):
    assert TrackContext(tmp_path / "td3" / "seed_1").run_name == "td3-seed_1"
    assert TrackContext(tmp_path / "td3").run_name == "td3"


def test_missing_extra_and_unknown_tracker_open_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"wandb"):
        make_tracker(tmp_path / "a", TrackConfig(also=["wandb"]), {})
    with pytest.raises(ConfigError, match=r"unknown tracker 'wandbb'.*'wandb'"):
        make_tracker(tmp_path / "b", TrackConfig(also=["wandbb"]), {})
    assert not (tmp_path / "b").exists()
    assert {"jsonl", "tensorboard", "wandb", "trackio", "console"} <= set(TRACKERS.names())


class Flaky(Tracker):
    def log(self, step, metrics):
        raise ConnectionError("the network is down")


def test_a_failing_network_tracker_does_not_end_the_run(tmp_path, caplog):
    good = jsonl(tmp_path)
    tracker = MultiTracker(good.context, [Flaky(good.context), good])
    tracker.log(1, {"a": 1.0})
    tracker.log(2, {"a": 2.0})
    tracker.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert [r.message for r in caplog.records] == ["tracker Flaky dropped: the network is down"]


def console(terminal):
    return Console(record=True, force_terminal=terminal, width=100, file=open(os.devnull, "w"))


METRICS = {
    "loss/critic": 0.123456,
    "eval/success": 0.5,
    "eval/success_low": 0.4,
    "eval/success_high": 0.6,
    "time/steps_per_s": 12345.0,
}


def test_console_prints_a_grouped_table_on_a_terminal(tmp_path):
    out = console(True)
    tracker = ConsoleTracker(TrackContext(tmp_path / "td3", total=2000), out)
    tracker.log(1000, METRICS)
    tracker.close()
    text = out.export_text()
    assert "step 1,000" in text
    assert "0.5 [0.4, 0.6]" in text
    assert "success_low" not in text
    assert "12,345" in text


def test_console_prints_one_line_without_a_terminal(tmp_path):
    out = console(False)
    tracker = ConsoleTracker(TrackContext(tmp_path, total=2000), out)
    tracker.log(1000, METRICS)
    tracker.close()
    expected = "step 1,000/2,000  loss/critic 0.1235  eval/success 0.5 [0.4, 0.6]  time/steps_per_s 12,345"
    assert out.export_text().splitlines() == [expected]


def test_log_lines_are_plain_json_numbers(tmp_path):
    import numpy as np

    tracker = make_tracker(tmp_path, TrackConfig(tensorboard=False), {})
    tracker.log(np.int64(3), {"a": np.float32(0.5), "b": float("inf")})
    tracker.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (line["step"], line["a"], line["b"]) == (3, 0.5, None)
