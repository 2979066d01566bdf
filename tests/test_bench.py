# SPDX-License-Identifier: Apache-2.0
import json
import math
import os
import signal
import subprocess
import sys

import pytest

from robopost import machine
from robopost.bench import Bench, Missing, available, find_checkout, run_benchmark
from robopost.cli import main
from robopost.errors import ConfigError
from robopost.interleave import interleave
from robopost.results import number, params_hash, plain, read_result, read_results, status

DESIGN_KEYS = {"seeds", "commit", "command", "versions", "hardware", "load", "wall_s", "rows", "figures"}


def bench(tmp_path, tier="small", **kwargs):
    return Bench("speed", tier, tmp_path, **kwargs)


def stored(tmp_path, suite="spine"):
    return json.loads((tmp_path / suite / "speed.json").read_text())


def test_results_file_holds_what_a_reader_needs(tmp_path):
    b = bench(tmp_path)
    b.packages("pytest")
    row = b.cell("a/seed0", lambda: {"rate": 2.0, "rounds": [1, 2]}, params={"steps": 10}, seed=0)
    b.cell("a/seed1", lambda: {"rate": 4.0}, params={"steps": 10}, seed=1)
    b.figure("rate_ratio", row["rate"], interval=(1.5, 2.5), unit="x", target=1.8)
    b.finish()
    data = stored(tmp_path)
    assert data.keys() >= DESIGN_KEYS
    assert data["seeds"] == [0, 1]
    assert data["command"] == "robopost bench speed --tier small"
    assert data["versions"].keys() >= {"python", "torch", "numpy", "pytest"}
    assert data["hardware"].keys() >= {"cpu", "cores", "memory_gib"}
    assert [r["result"] for r in data["rows"]] == [{"rate": 2.0, "rounds": [1, 2]}, {"rate": 4.0}]
    assert data["figures"][0] | {"note": "", "tier": "small"} == {
        "name": "rate_ratio",
        "value": 2.0,
        "interval": [1.5, 2.5],
        "unit": "x",
        "target": 1.8,
        "better": "higher",
        "note": "",
        "tier": "small",
    }
    text = json.dumps(data)
    assert f'"{os.uname().nodename}"' not in text
    assert str(tmp_path) not in text


def test_finished_cells_are_reused_and_a_changed_parameter_is_not(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"n": len(calls)}

    assert bench(tmp_path).cell("a", measure, params={"steps": 10, "lr": 0.1})["n"] == 1
    assert bench(tmp_path).cell("a", measure, params={"lr": 0.1, "steps": 10})["n"] == 1
    assert bench(tmp_path).cell("a", measure, params={"steps": 20, "lr": 0.1})["n"] == 2
    assert bench(tmp_path).cell("a", measure, params={"steps": 20, "lr": 0.1}, seed=1)["n"] == 3
    assert bench(tmp_path, rerun=True).cell("a", measure, params={"steps": 20, "lr": 0.1}, seed=1)["n"] == 4
    assert bench(tmp_path, tier="paper").cell("a", measure, params={"steps": 20, "lr": 0.1}, seed=1)["n"] == 5
    assert [(r["tier"], r["result"]["n"]) for r in stored(tmp_path)["rows"]] == [("small", 4), ("paper", 5)]


def test_every_cell_is_saved_before_the_next_begins(tmp_path):
    b = bench(tmp_path)
    b.cell("a", lambda: {"v": 1})

    def second():
        assert [r["cell"] for r in stored(tmp_path)["rows"]] == ["a"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        b.cell("b", second)
    assert [r["cell"] for r in stored(tmp_path)["rows"]] == ["a"]


def test_a_failed_cell_is_recorded_and_makes_its_figures_empty(tmp_path):
    def broken():
        raise ValueError("diverged in /home/someone/project/algos/sac.py")

    b = bench(tmp_path)
    good, bad = b.cell("good", lambda: {"v": 3.0}), b.cell("bad", broken)
    assert b.failed == ["bad"]
    assert not bad
    assert math.isnan(bad["v"])
    b.figure("mean", (good["v"] + bad["v"]) / 2, interval=(bad["low"], bad["high"]), target=1.0)
    row = next(r for r in stored(tmp_path)["rows"] if r["cell"] == "bad")
    assert row["status"] == "failed"
    assert row["error"] == "ValueError: diverged in algos/sac.py"
    assert "ValueError" in row["trace"]
    assert "/home/" not in json.dumps(row)
    figure = stored(tmp_path)["figures"][0]
    assert (figure["value"], figure["interval"]) == (None, None)
    assert status(figure) == "empty"
    # The next run tries it again and only it.
    again = bench(tmp_path)
    assert again.cell("good", broken)["v"] == 3.0
    assert again.cell("bad", lambda: {"v": 5.0})["v"] == 5.0
    assert not again.failed


def test_a_failed_repetition_keeps_the_older_measurement(tmp_path):
    bench(tmp_path).cell("a", lambda: {"v": 1.0})
    b = bench(tmp_path, rerun=True)
    assert not b.cell("a", lambda: {}["absent"])
    assert b.failed == ["a"]
    row = stored(tmp_path)["rows"][0]
    assert row["result"] == {"v": 1.0}
    assert row["last_error"] == "KeyError: 'absent'"


def test_a_cell_must_return_a_dict(tmp_path):
    b = bench(tmp_path)
    b.cell("a", lambda: 3.0)
    assert "must return a dict" in stored(tmp_path)["rows"][0]["error"]


def test_filter_measures_only_matching_cells_and_keeps_stored_ones(tmp_path):
    bench(tmp_path).cell("hopper/seed0", lambda: {"v": 1.0})
    b = bench(tmp_path, cells="hopper/*")
    assert b.cell("hopper/seed0", lambda: {"v": 2.0})["v"] == 1.0
    assert b.cell("hopper/seed1", lambda: {"v": 3.0})["v"] == 3.0
    left = b.cell("ant/seed0", lambda: {"v": 4.0})
    assert isinstance(left, Missing)
    assert b.left_out == ["ant/seed0"]
    b.finish()
    assert [r["cell"] for r in stored(tmp_path)["rows"]] == ["hopper/seed0", "hopper/seed1"]


def test_finish_drops_what_the_benchmark_no_longer_asks_for(tmp_path):
    old = bench(tmp_path)
    old.cell("gone", lambda: {"v": 1})
    old.figure("gone", 1.0)
    old.table("gone", [{"a": 1}])
    old.finish()
    new = bench(tmp_path)
    new.cell("here", lambda: {"v": 1})
    new.finish()
    data = stored(tmp_path)
    assert [r["cell"] for r in data["rows"]] == ["here"]
    assert data["figures"] == data["tables"] == []


def test_keys_are_unique(tmp_path):
    b = bench(tmp_path)
    b.cell("a", lambda: {})
    with pytest.raises(ConfigError, match=r"cell 'a' twice"):
        b.cell("a", lambda: {})


def test_smoke_results_live_apart_from_those_that_are_committed(tmp_path):
    for tier in ("smoke", "small"):
        b = bench(tmp_path, tier=tier)
        b.cell("a", lambda: {"v": 1.0})
        b.figure("f", 1.0)
    assert (tmp_path / "smoke" / "speed.json").exists()
    assert [d["tier"] for d in read_results(tmp_path)] == ["small"]
    assert [d["tier"] for d in read_results(tmp_path, smoke=True)] == ["smoke"]
    with pytest.raises(ConfigError, match=r"unknown tier 'smal'\. Did you mean 'small'\?"):
        bench(tmp_path, tier="smal")


@pytest.mark.parametrize(
    ("value", "target", "better", "expected"),
    [
        (2.0, 1.8, "higher", "holds"), (1.8, 1.8, "higher", "holds"), (1.7, 1.8, "higher", "misses"),
        (300, 360, "lower", "holds"), (361, 360, "lower", "misses"), (1.0, None, "higher", "-"),
        (None, 1.8, "higher", "empty"), (float("nan"), 1.8, "higher", "empty"),
    ],
)  # fmt: skip
def test_targets(tmp_path, value, target, better, expected):
    b = bench(tmp_path)
    b.figure("f", value, target=target, better=better)
    assert status(stored(tmp_path)["figures"][0]) == expected


def test_foreign_and_torn_result_files_are_named(tmp_path):
    (tmp_path / "spine").mkdir()
    path = tmp_path / "spine" / "speed.json"
    path.write_text('{"schema": 1, "rows": [')
    with pytest.raises(ConfigError, match="is not a results file"):
        bench(tmp_path)
    path.write_text('{"schema": 99, "rows": [], "figures": []}')
    with pytest.raises(ConfigError, match="schema 99"):
        read_result(path)


def test_interleaving_and_ratios_by_hand():
    order, now = [], [0.0]

    def side(name, seconds, units):
        def work():
            order.append(name)
            now[0] += seconds[len(order) % len(seconds)]
            return units

        return work

    ratio = interleave(side("A", [1.0], 10), side("B", [2.0], 5), rounds=3, warmup=1, clock=lambda: now[0])
    assert order == ["A", "B"] * 4
    assert ratio.ours == (10.0, 10.0, 10.0)
    assert ratio.theirs == (2.5, 2.5, 2.5)
    row = ratio.row()
    assert (row["median"], row["min"], row["max"]) == (4.0, 4.0, 4.0)


def test_interleaving_reports_the_median_of_round_ratios_not_the_ratio_of_medians():
    seconds = iter([1, 1, 1, 2, 4, 4])  # A1 B1 A2 B2 A3 B3
    now = [0.0]

    def work():
        now[0] += next(seconds)

    row = interleave(work, work, rounds=3, warmup=0, clock=lambda: now[0]).row()
    assert (row["median"], row["min"], row["max"]) == (1.0, 1.0, 2.0)
    synced = []
    interleave(lambda: 1, lambda: 1, rounds=2, warmup=0, sync=lambda: synced.append(1))
    assert len(synced) == 8
    with pytest.raises(ConfigError, match="rounds=0"):
        interleave(lambda: 1, lambda: 1, rounds=0)


BENCHMARK = '''"""Measures nothing, twice.

More words."""
def run(bench):
    n = bench.scale(smoke=1, small=10, paper=100)
    rows = [bench.cell(f"seed{s}", lambda: {"n": n}, params={"n": n}, seed=s) for s in range(2)]
    bench.figure("nothing", sum(row["n"] for row in rows) / 2, unit="x", target=5)
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "benchmarks" / "nothing.py").write_text(BENCHMARK)
    (tmp_path / "benchmarks" / "_common.py").write_text("")
    (tmp_path / "benchmarks" / "bare.py").write_text("def run(bench): pass")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_benchmarks_are_found_and_run(checkout, capsys):
    assert find_checkout(checkout / "benchmarks") == checkout
    assert list(available(checkout)) == ["bare", "nothing"]
    b = run_benchmark("nothing", "small", root=checkout)
    assert b.figures[0]["value"] == 10
    data = read_result(checkout / "results" / "spine" / "nothing.json")
    assert data["title"] == "Measures nothing, twice."
    with pytest.raises(ConfigError, match=r"unknown benchmark 'nothin'\. Did you mean 'nothing'\?"):
        run_benchmark("nothin", "small", root=checkout)
    with pytest.raises(ConfigError, match="needs a docstring"):
        run_benchmark("bare", "small", root=checkout)


def test_benchmarks_share_helpers(checkout):
    """A folder beside them is importable while one runs, and only then; also inside a cell."""
    (checkout / "benchmarks" / "helpers_of_this_test").mkdir()
    (checkout / "benchmarks" / "helpers_of_this_test" / "numbers.py").write_text("N = 7\n")
    (checkout / "benchmarks" / "uses.py").write_text(
        '"""Uses a helper."""\ndef run(b):\n    from helpers_of_this_test.numbers import N\n'
        '    b.figure("n", N)\n'
    )
    before = list(sys.path)
    assert run_benchmark("uses", "smoke", root=checkout).figures[0]["value"] == 7
    assert sys.path == before
    (checkout / "benchmarks" / "uses.py").write_text('"""Breaks."""\ndef run(b): raise KeyError("x")\n')
    with pytest.raises(KeyError):
        run_benchmark("uses", "smoke", root=checkout)
    assert sys.path == before


def test_command_line(checkout, capsys):
    assert main(["bench", "nothing", "--tier", "small", "--cells", "seed0"]) == 0
    out = capsys.readouterr().out
    assert "left out: seed1" in out
    assert "empty" in out
    assert main(["bench", "nothing", "--tier", "small"]) == 0
    assert "holds" in capsys.readouterr().out
    assert main(["bench", "--summary"]) == 0
    assert "nothing" in capsys.readouterr().out
    assert main(["bench", "--list"]) == 0
    assert "Measures nothing, twice." in capsys.readouterr().out
    (checkout / "benchmarks" / "broken.py").write_text(
        '"""Fails."""\ndef run(b): b.cell("x", lambda: {}[1])\n'
    )
    assert main(["bench", "broken", "--tier", "small"]) == 2
    assert "failed cells: x" in capsys.readouterr().err
    assert main(["bench"]) == 2


def test_kill_between_cells_loses_only_the_running_one(checkout):
    (checkout / "benchmarks" / "slow.py").write_text(
        '"""Slow."""\nimport time\ndef run(b):\n    b.cell("a", lambda: {"v": 1})\n'
        '    print("a done", flush=True)\n    b.cell("b", lambda: time.sleep(60) or {"v": 2})\n'
    )
    code = "import sys; from robopost.cli import main; sys.exit(main(['bench', 'slow', '--tier', 'small']))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=checkout, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "a done\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    data = read_result(checkout / "results" / "spine" / "slow.json")
    assert [r["cell"] for r in data["rows"]] == ["a"]
    assert list((checkout / "results" / "spine").iterdir()) == [checkout / "results" / "spine" / "slow.json"]


def test_machine_facts_are_public():
    text = json.dumps([machine.hardware(), machine.versions(), machine.revision()])
    assert "/" not in text.replace("Linux x86_64", "")
    assert machine.usable_cores() >= 1
    assert machine.scrub("File /a/b/c/site-packages/torch/nn.py, line 3; 1/2; https://x.org/a/b/c") == (
        "File torch/nn.py, line 3; 1/2; https://x.org/a/b/c"
    )


def test_plain_values_and_hashes():
    import numpy as np

    assert plain({"a": np.float32(0.5), 1: np.arange(2), "n": float("nan"), "t": (1, None)}) == {
        "a": 0.5, "1": [0, 1], "n": None, "t": [1, None],
    }  # fmt: skip
    assert params_hash({"a": 1, "b": 2}) == params_hash({"b": 2, "a": 1})
    assert params_hash({"a": 1}) != params_hash({"a": 1.5})
    assert [number(v) for v in (0.12345, 12345.6, 3.0, 1234567, 1e-7, 0)] == [
        "0.1235", "12,346", "3", "1,234,567", "1.00e-07", "0",
    ]  # fmt: skip


def test_two_processes_fill_one_table(tmp_path):
    first, second = Bench("shared", "smoke", tmp_path), Bench("shared", "smoke", tmp_path)
    first.cell("a", lambda: {"v": 1})
    assert second.cell("a", lambda: {"v": 2}) == {"v": 1}
    second.cell("b", lambda: {"v": 3})
    first.cell("c", lambda: {"v": 4})
    for bench in (first, second):
        for key in "abc":
            if key not in bench._asked:
                bench.cell(key, lambda: {"v": 9})
        bench.finish()
    stored = {row["cell"]: row["result"]["v"] for row in Bench("shared", "smoke", tmp_path).rows}
    assert stored == {"a": 1, "b": 3, "c": 4}
