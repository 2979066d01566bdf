# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from robopost.bench import Bench
from robopost.cli import main
from robopost.errors import ConfigError
from robopost.tables import check_docs, render_docs, render_text

ROOT = Path(__file__).resolve().parents[1]
OPEN, CLOSE = "<!-- results:{} -->", "<!-- /results -->"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    b = Bench("ppo", "small", tmp_path / "results")
    for seed in (0, 1):
        b.cell(
            f"hopper/seed{seed}", lambda seed=seed: {"ours": 1000.0 + seed, "sb3": 990, "all": [1]}, seed=seed
        )
    b.table("returns", [{"task": "Hopper|v5", "ours": 1000.5, "paper": None}], caption="Final return")
    b.figure("ppo_return_vs_sb3", 1.0106, interval=(0.98, 1.04), unit="x", target=0.9)
    b.figure("wall", None, unit="s", target=360, better="lower", note="demo")
    b.finish()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def block(spec, inside=""):
    return f"Before\n\n{OPEN.format(spec)}\n{inside}{CLOSE}\n\nAfter\n"


def test_everything_of_a_result_is_rendered(checkout):
    text = render_text(block("ppo", "stale row\n"), checkout / "results")
    assert text.startswith(
        "Before\n\n<!-- results:ppo -->\n\n**Final return**\n\n| task | ours | paper |\n|---|---:|"
    )
    assert "| Hopper\\|v5 | 1,000 |  |" in text
    assert "| `ppo_return_vs_sb3` | 1.011 x | 0.98 to 1.04 | ≥ 0.9 | holds |" in text
    assert "| `wall` (demo) |  |  | ≤ 360 | not measured yet |" in text
    assert "`robopost bench ppo --tier small`" in text
    assert "seeds 0, 1" in text
    assert "stale row" not in text
    assert text.endswith(f"\n\n{CLOSE}\n\nAfter\n")
    assert render_text(text, checkout / "results") == text  # a fixed point


def test_parts(checkout):
    results = checkout / "results"
    figures = render_text(block("ppo/figures"), results)
    assert "ppo_return_vs_sb3" in figures
    assert "Hopper" not in figures
    cells = render_text(block("ppo/cells"), results)
    assert "| hopper/seed1 | 1,001 | 990 |" in cells
    table = render_text(block("ppo/returns"), results)
    assert "Hopper" in table
    assert "ppo_return_vs_sb3" not in table
    assert "ppo_return_vs_sb3" in render_text(block("*"), results)
    with pytest.raises(ConfigError, match=r"unknown table of ppo\.json 'return'\. Did you mean 'returns'\?"):
        render_text(block("ppo/return"), results)


def test_what_is_not_measured_says_so(checkout):
    text = render_text(block("sac"), checkout / "results")
    assert "*Not measured yet: `robopost bench sac --tier small`.*" in text


def test_failed_cells_are_named(checkout):
    b = Bench("ppo", "small", checkout / "results")
    b.cell("ant", lambda: {}["x"])
    assert "**failed: ant**" in render_text(block("ppo/figures"), checkout / "results")


def test_markers_in_code_are_examples_and_open_ones_are_errors(checkout):
    results = checkout / "results"
    fenced = f"```\n{OPEN.format('ppo')}\n{CLOSE}\n```\n"
    assert render_text(fenced, results) == fenced
    inline = f"Write `{OPEN.format('NAME')}` there.\n"
    assert render_text(inline, results) == inline
    with pytest.raises(ConfigError, match="results:ppo is not closed"):
        render_text(f"{OPEN.format('ppo')}\ntext\n", results)
    with pytest.raises(ConfigError, match="not closed"):
        render_text(f"{OPEN.format('ppo')}\n{OPEN.format('sac')}\n{CLOSE}\n", results)
    with pytest.raises(ConfigError, match="closes nothing"):
        render_text(f"{CLOSE}\n", results)


def test_render_and_check(checkout, capsys):
    (checkout / "README.md").write_text(block("ppo"))
    (checkout / "docs" / "deep").mkdir()
    (checkout / "docs" / "deep" / "x.md").write_text(block("ppo/figures"))
    (checkout / "docs" / "plain.md").write_text("nothing here\n")
    assert main(["bench", "--check"]) == 2
    assert (
        "stale tables in README.md, docs/deep/x.md. Fix: robopost bench --render" in capsys.readouterr().err
    )
    assert [str(p.relative_to(checkout)) for p in render_docs(checkout)] == ["README.md", "docs/deep/x.md"]
    assert check_docs(checkout) == []
    assert main(["bench", "--check"]) == 0
    b = Bench("ppo", "small", checkout / "results")
    b.figure("ppo_return_vs_sb3", 0.5, target=0.9)
    assert len(check_docs(checkout)) == 2
    assert main(["bench", "--render"]) == 0
    assert "misses" in (checkout / "README.md").read_text()


def test_documents_of_this_repository_match_its_results():
    assert [str(path.relative_to(ROOT)) for path in check_docs(ROOT)] == []
