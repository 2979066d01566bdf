# SPDX-License-Identifier: Apache-2.0
import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from robopost.cli import main
from robopost.errors import DataError, RobopostError
from robopost.evaluate.rollout import EvalResult
from robopost.evaluate.statistics import Interval, paired_difference, t_interval, wilson
from robopost.evaluate.video import Clip, write_grid
from robopost.report import Comparison, load_run, load_runs, write_report
from robopost.report import page as page_module
from robopost.report.charts import POINTS, _range, _thin_out, seed_curve, short, shown, ticks
from robopost.report.sections import seeds_success

VOID = {"meta", "br", "img"}
EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Checks nesting while it parses, and keeps tags, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(html)
        self.close()
        assert self.stack == [], f"never closed: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not {"style"} & set(self.stack):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def result(successes, returns=None, seed=100, env="arm_push"):
    n = len(successes)
    returns = np.arange(n, dtype=float) if returns is None else np.asarray(returns, float)
    return EvalResult(returns, np.asarray(successes, bool), np.full(n, 30), returns / 10, 1.0, env, seed)


def make_run(path, algo="td3", seed=0, env="arm_push", rates=(0.2, 0.5, 0.8), lr=1e-3, steps=300, **more):
    (path / "eval").mkdir(parents=True)
    (path / "videos").mkdir()
    config = {
        "algo": {"name": algo, "lr": lr}, "policy": {"name": "gaussian"}, "env": {"name": env, "id": ""},
        "loop": {"steps": steps}, "seed": seed, "out": str(path),
    } | more  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    (path / "provenance.json").write_text(
        json.dumps(
            {
                "command": f"robopost train algo={algo}",
                "revision": "abcdef0123456",
                "packages": {"torch": "2.9"},
            }
        )
    )
    lines = [{"step": s, "time": s / 10, "loss/critic": 1 / s + seed} for s in range(10, 301, 10)]
    for i, rate in enumerate(rates):
        step = 100 * (i + 1)
        evaluation = result(np.arange(20) < 20 * rate, np.full(20, 10 * rate + seed) + np.arange(20) % 2)
        (path / "eval" / f"step_{step:09d}.json").write_text(
            json.dumps(evaluation.to_json() | {"step": step})
        )
        lines.append({"step": step, "time": 1.0} | evaluation.metrics())
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path):
    return path.read_text(encoding="utf-8")


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    write_grid([Clip([np.full((32, 32, 3), 9 * i, np.uint8) for i in range(5)], length=5)], path)
    return path


def test_page_is_well_formed_and_loads_and_runs_nothing(tmp_path, film):
    run = make_run(tmp_path / "a")
    (run / "videos" / "step_000000300.mp4").write_bytes(film.read_bytes())
    before, after = result([True] * 20 + [False] * 80), result([True] * 70 + [False] * 30)
    out = write_report([run], tmp_path / "r.html", "demo", [Comparison("gain", before, after, film)])
    html = read(out)
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert {"html", "head", "title", "style", "main", "svg", "table", "video"} <= set(page.tags)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    sources = [
        value for _, name, value in page.attributes if name in ("src", "href", "poster", "data", "action")
    ]
    assert sources
    assert all(value.startswith("data:video/mp4;base64,") for value in sources)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\(", html)
    policy = next(v for t, n, v in page.attributes if t == "meta" and n == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none';")
    assert not list(tmp_path.glob(".*partial*"))


def test_text_from_files_can_not_become_markup(tmp_path):
    run = make_run(tmp_path / "evil<b>&run", algo=EVIL, env=EVIL, note=EVIL, **{"key<i>": EVIL})
    provenance = {"command": EVIL, "revision": EVIL, "packages": {EVIL: EVIL}}
    (run / "provenance.json").write_text(json.dumps(provenance))
    with (run / "metrics.jsonl").open("a") as file:
        for step in (310, 320):
            file.write(json.dumps({"step": step, f"loss/{EVIL}": 1.0, f"x/{EVIL}": None}) + "\n")
    (run / "eval" / "x<u>.json").write_text("{}")
    labels = (EVIL, EVIL)
    comparison = Comparison(EVIL, result([True, False]), result([True, True]), run / "<s>.mp4", labels)
    html = read(write_report([run], tmp_path / "r.html", EVIL, [comparison], notes=[EVIL]))
    page = Page(html)
    assert not {
        "script",
        "img",
        "b" if "<b>&run" in html else "script",
        "i" if "key<i>" in html else "script",
    } & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.words.count("<script>alert(1)</script>") >= 8  # shown as text
    assert "evil<b>&run" in page.words


def test_evaluation_table_has_the_numbers_of_the_last_evaluation(tmp_path):
    run = make_run(tmp_path / "a", rates=(0.2, 0.9, 0.8))
    page = Page(read(write_report([run], tmp_path / "r.html")))
    interval = wilson(16, 20)
    assert f"80.0 % {interval.low * 100:.1f} – {interval.high * 100:.1f}" in page.words
    assert "90.0 % (200)" in page.words  # the best, next to the last
    assert "300" in page.words
    assert "td3 · gaussian" in page.words


def test_both_phases_of_an_offline_to_online_run_show(tmp_path):
    run = make_run(
        tmp_path / "a", algo="iql", rates=(0.2, 0.4, 0.8), loop={"steps": 100, "online_steps": 200}
    )
    html = read(write_report([run], tmp_path / "r.html"))
    page = Page(html)
    assert "offline success (step)" in page.words
    assert "20.0 % (100)" in page.words  # at the switch, next to the last and the best
    assert "80.0 % (300)" in page.words
    lines = re.findall(r'<line class="switch" x1="([\d.]+)"[^>]*><title>online from step 100</title>', html)
    assert lines
    # eval/success is drawn over 100..300, where the switch is the left end; loss/critic over 0..300.
    assert float(lines[0]) == pytest.approx(54 + 100 / 300 * (520 - 54 - 14), abs=4)
    assert "behind it" in page.words
    assert "not finished" not in page.words
    other = make_run(tmp_path / "b", algo="iql", loop={"steps": 300, "online_steps": 200})
    assert load_run(other).problems == ["not finished: 300 of 500 steps are logged"]
    plain = Page(read(write_report([make_run(tmp_path / "c")], tmp_path / "c.html")))
    assert "offline success" not in plain.words
    assert "behind it" not in plain.words


def test_seeds_are_averaged_with_students_t(tmp_path):
    finals = (0.5, 0.7, 0.9)
    runs = [make_run(tmp_path / "td3" / f"seed_{i}", seed=i, rates=(0.1, f)) for i, f in enumerate(finals)]
    assert [run.name for run in load_runs([tmp_path / "td3"])] == ["td3/seed_0", "td3/seed_1", "td3/seed_2"]
    page = Page(read(write_report([tmp_path / "td3"], tmp_path / "r.html")))
    interval = t_interval(finals)
    assert f"70.0 % {interval.low * 100:.1f} – {min(100, interval.high * 100):.1f}" in page.words
    assert "3 seeds" in page.words
    assert all(f"seed {i}" in page.words for i in range(3))
    assert page.attributes.count(("polyline", "class", "thin")) >= 3
    # The same runs named one by one make the same groups.
    other = Page(read(write_report(runs, tmp_path / "s.html")))
    assert "3 seeds" in other.words


def test_a_rate_never_shows_more_than_one_hundred_percent(tmp_path):
    for i, rate in enumerate((0.7, 1.0, 1.0)):
        make_run(tmp_path / "td3" / f"seed_{i}", seed=i, rates=(rate,))
    words = Page(read(write_report([tmp_path / "td3"], tmp_path / "r.html"))).words
    assert t_interval([0.7, 1.0, 1.0]).high > 1
    assert "– 100.0" in words
    assert seeds_success([np.array([True])] * 3).high == 1.0
    assert not re.search(r"– 1[1-9]\d\.\d", words)


def test_seeds_without_spread_are_not_certain():
    none = seeds_success([np.zeros(10, bool)] * 3)
    assert (none.value, none.low, none.high) == (0.0, 0.0, wilson(0, 30).high)
    apart = seeds_success([np.zeros(10, bool), np.ones(10, bool)])
    assert (apart.low, apart.high) == (0.0, 1.0)


def test_bands_of_two_seeds_do_not_flatten_the_curve():
    x = np.arange(5.0)
    curve = seed_curve("a", 0, [(x, x), (x, x + 1)], None)
    assert curve.high.max() > 10
    assert _range([curve]) == pytest.approx((-2.5 - 0.6, 7.5 + 0.6))


def test_mean_curve_by_hand_and_a_dead_seed_does_not_bend_it():
    x = np.array([0.0, 10.0, 20.0, 30.0])
    full = [(x, np.array([0.0, 1.0, 2.0, 3.0])), (x, np.array([0.0, 3.0, 4.0, 5.0]))]
    curve = seed_curve("a", 0, full, None)
    assert curve.y.tolist() == [0.0, 2.0, 3.0, 4.0]
    half = 12.706205 * np.sqrt(2) / np.sqrt(2)  # t(0.975, 1), sample std sqrt(2), two seeds
    assert curve.high[1] == pytest.approx(2 + half, abs=1e-5)
    dead = seed_curve("a", 0, [*full, (x[:2], np.array([0.0, 100.0]))], None)
    assert dead.x.tolist() == [0.0, 10.0]
    assert len(dead.thin) == 3
    apart = seed_curve("a", 0, [(np.array([0.0, 1.0]), np.ones(2)), (np.array([5.0, 6.0]), np.ones(2))], None)
    assert len(apart.x) == 0


def test_one_evaluated_seed_keeps_the_interval_of_its_episodes():
    x = np.array([1.0, 2.0])
    curve = seed_curve(
        "a", 0, [(x, np.array([0.4, 0.6]))], ((x, np.array([0.3, 0.5])), (x, np.array([0.5, 0.7])))
    )
    assert curve.low.tolist() == [0.3, 0.5]
    assert curve.high.tolist() == [0.5, 0.7]


def test_comparison_shows_gain_interval_and_verdict(tmp_path):
    run = make_run(tmp_path / "a")
    before, after = result([True] * 40 + [False] * 60), result([True] * 75 + [False] * 25)
    page = Page(read(write_report([run], tmp_path / "r.html", comparisons=[Comparison("c", before, after)])))
    gain = paired_difference(after.successes, before.successes)
    assert "40 % 30.9 – 49.8 %" in page.words
    assert "75 % 65.7 – 82.5 %" in page.words
    assert f"+35 points {gain.low * 100:+.0f} to {gain.high * 100:+.0f}" in page.words
    assert "intervals do not overlap" in page.words
    assert "from the same starts" in page.words
    close = result([True] * 45 + [False] * 55, seed=7)
    page = Page(read(write_report([run], tmp_path / "r.html", comparisons=[Comparison("c", before, close)])))
    assert "intervals overlap" in page.words
    assert "from the same starts" not in page.words  # other seeds: not pairs


def test_comparison_of_returns_where_there_is_no_success(tmp_path):
    before, after = result([0] * 30), result([0] * 30, returns=np.arange(30) + 50.0)
    before.successes = after.successes = None
    comparison = Comparison("c", before, after)
    page = Page(read(write_report([make_run(tmp_path / "a")], tmp_path / "r.html", comparisons=[comparison])))
    assert "Mean return over 30 episodes each" in page.words
    assert "+50" in page.words


def test_damage_is_shown_and_not_fatal(tmp_path):
    run = make_run(tmp_path / "a", steps=1000)
    (run / "provenance.json").unlink()
    (run / "eval" / "step_000000100.json").write_text('{"returns": ')
    (run / "eval" / "step_000000200.json").write_text('{"raw": {}}')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "loss/actor": null}\n{"step": 320, "lo')
    data = load_run(run)
    assert len(data.problems) == 5
    words = Page(read(write_report([run], tmp_path / "r.html"))).words
    for text in (
        "provenance.json is missing",
        "eval/step_000000100.json is not an evaluation",
        "eval/step_000000200.json is not an evaluation",
        "not finished: 310 of 1,000 steps are logged",
        "not a number at least once: loss/actor",
    ):
        assert text in words
    assert "80.0 %" in words
    (run / "metrics.jsonl").write_text("rubbish\n{}\n")
    assert "line 1 is not a log line" in Page(read(write_report([run], tmp_path / "r.html"))).words


def test_an_empty_run_has_a_page(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    words = Page(read(write_report([tmp_path / "a"], tmp_path / "r.html"))).words
    assert "These runs hold no evaluation." in words


def test_wrong_folders_and_full_disks_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty is not a run folder: no config\.json"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    with pytest.raises(DataError, match="does not exist"):
        write_report([tmp_path / "absent"], tmp_path / "r.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(RobopostError, match="can't write"):
        write_report([make_run(tmp_path / "a")], tmp_path / "file" / "r.html")


def test_videos_are_embedded_whole_first_and_last(tmp_path, film):
    run = make_run(tmp_path / "a")
    for step in (100, 200, 300):
        (run / "videos" / f"step_{step:09d}.mp4").write_bytes(film.read_bytes() + bytes([step % 251]))
    page = Page(read(write_report([run], tmp_path / "r.html")))
    found = [
        base64.b64decode(v.partition(",")[2]) for t, n, v in page.attributes if t == "video" and n == "src"
    ]
    assert found == [film.read_bytes() + bytes([100]), film.read_bytes() + bytes([300 % 251])]
    assert "a · step 100" in page.words
    assert "a · step 200" not in page.words


def test_embedding_is_bounded_and_says_what_it_left_out(tmp_path, film, monkeypatch):
    run = make_run(tmp_path / "a")
    for step in (100, 300):
        (run / "videos" / f"step_{step:09d}.mp4").write_bytes(film.read_bytes())
    monkeypatch.setattr(page_module, "MAX_PAGE", film.stat().st_size)
    page = Page(read(write_report([run], tmp_path / "r.html")))
    assert page.tags.count("video") == 1
    assert "Too large to embed: a/step_000000300.mp4." in page.words
    monkeypatch.setattr(page_module, "MAX_VIDEO", 10)
    assert "video" not in Page(read(write_report([run], tmp_path / "r.html"))).tags


def test_runs_are_grouped_by_environment_and_by_config(tmp_path):
    runs = [
        make_run(tmp_path / "td3", "td3"),
        make_run(tmp_path / "sac", "sac"),
        make_run(tmp_path / "cheetah", "sac", env="HalfCheetah-v5"),
        make_run(tmp_path / "sac_fast", "sac", lr=9e-3),
    ]
    page = Page(read(write_report(runs, tmp_path / "r.html")))
    assert page.words.index("arm_push") < page.words.index("HalfCheetah-v5 run step")
    # Two SAC runs that differ in more than their seed are not seeds of one another.
    assert "sac · gaussian · sac_fast" in page.words
    assert "2 seeds" not in page.words


def test_config_differences_come_first(tmp_path):
    runs = [make_run(tmp_path / "a", lr=0.001), make_run(tmp_path / "b", lr=0.007)]
    html = read(write_report(runs, tmp_path / "r.html"))
    page = Page(html)
    first = page.words[page.words.index("What differs") :]
    first = first[: first.index("All of it")]
    assert "algo.lr 0.001 0.007" in first
    assert "algo.name" not in first
    assert "out" not in first.split()
    assert 'class="differs"' in html


def test_robopost_eval_results_are_found(tmp_path):
    run = make_run(tmp_path / "a", rates=())
    folder = run / "eval" / "20260101-000000"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(result([True] * 9 + [False]).to_json() | {"policy": "x"}))
    assert "90.0 %" in Page(read(write_report([run], tmp_path / "r.html"))).words


def test_command_line(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert main(["report", str(run), f"out={tmp_path / 'x.html'}", "title=My runs"]) == 0
    assert "My runs" in Page(read(tmp_path / "x.html")).words
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_ticks_labels_and_thinning():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(0, 20_000, 6) == [0, 5000, 10000, 15000, 20000]
    assert ticks(-3.2, 4.1) == [-2, 0, 2, 4]
    assert ticks(1.0, 1.0) == [1.0]
    assert [short(v) for v in (0, 1500, 2e6, 0.25, -3000)] == ["0", "1.5k", "2M", "0.25", "-3k"]
    assert shown(Interval(12.3456, 1.2, 123.4, 5)) == ("12", "1", "123")
    assert shown(Interval(0.5, 0.25, 0.75, 5)) == ("0.500", "0.250", "0.750")
    assert shown(Interval(0.5, 0.25, 0.75, 5), percent=True) == ("50.0", "25.0", "75.0")
    assert shown(Interval(0.0, 0.0, 0.0, 5)) == ("0", "0", "0")
    y = np.zeros(10_000)
    y[1234], y[7777] = 5.0, -3.0
    x, kept = _thin_out(np.arange(10_000.0), y)
    assert len(x) <= POINTS + 2
    assert kept.max() == 5.0
    assert kept.min() == -3.0
    assert (x[0], x[-1]) == (0, 9999)
