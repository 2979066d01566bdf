# SPDX-License-Identifier: Apache-2.0
"""Help of every command, explanation of every piece, completion in a real shell."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robopost.cli import COMMANDS, main
from robopost.cli.completion import SCRIPTS, candidates
from robopost.config_files import file_options, search_dirs

BIN = Path(sys.executable).parent
DIRS = search_dirs()


@pytest.mark.parametrize("words", [["--help"], [], ["-h"], ["help"]])
def test_help_lists_every_command(words, capsys):
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert f"  {name} " in out
        assert text in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_description_example_and_options(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: robopost {command}")
    assert "examples:" in out
    assert f"  robopost {command}" in out
    assert "--help" in out


def test_train_help_lists_what_can_be_chosen(capsys):
    main(["train", "--help"])
    out = capsys.readouterr().out
    for group in ("algo", "policy", "env", "recipe"):
        for name in file_options(group, DIRS):
            assert name in out


@pytest.mark.parametrize("command", ["eval", "collect"])
def test_settings_are_in_the_help(command, capsys):
    main([command, "--help"])
    out = capsys.readouterr().out
    assert "episodes=" in out
    assert "episode i is reset with seed + i" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("robopost 0.")


@pytest.mark.parametrize("words", [["algo=sac", "--help"], ["--explain", "algo=sac"]])
def test_settings_of_an_algorithm(words, capsys):
    assert main(["train", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "algo.batch_size int 256" in out
    assert "algo.hidden list[int] [256, 256] of the critics" in out


def test_every_piece_explains_itself(capsys):
    words = [f"{group}={name}" for group in ("algo", "policy", "env") for name in file_options(group, DIRS)]
    assert main(["train", "--explain", *words]) == 0
    out = capsys.readouterr().out
    for word in words:
        assert word in out


def test_explain_without_a_piece_shows_the_schema(capsys):
    assert main(["train", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "loop.steps" in out
    assert "transitions, off-policy" in out


def test_explain_shows_defaults_of_the_file(tmp_path, capsys):
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "mine.yaml").write_text("# My own.\nname: bc\nbatch_size: 17\n")
    assert main(["train", "--explain", "algo=mine", "--config-dir", str(tmp_path)]) == 0
    assert "algo.batch_size int 17" in " ".join(capsys.readouterr().out.split())


def test_show_prints_the_resolved_config(capsys):
    import yaml

    assert main(["train", "--show", "recipe=debug_offline", "seed=5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["algo"]["name"], shown["seed"], shown["data"]["collect"]) == ("bc", 5, 8)


def test_help_is_fast():
    subprocess.run([BIN / "robopost", "--help"], check=True, capture_output=True)
    best = min(timed([BIN / "robopost", "--help"]) for _ in range(5))
    assert best < 0.3, f"robopost --help takes {best:.2f} s"


def timed(words):
    start = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - start


@pytest.mark.parametrize(
    ("line", "some", "never"),
    [
        ("robopost ", {"train", "eval", "doctor"}, set()),
        ("robopost tr", {"train"}, {"eval"}),
        ("robopost train ", {"algo=", "env=", "recipe=", "seed="}, {"--help"}),
        ("robopost train al", {"algo="}, {"env="}),
        ("robopost train --", {"--explain", "--help"}, {"algo="}),
        ("robopost train algo=", {"algo=sac", "algo=bc"}, {"env=hopper"}),
        ("robopost train algo=td3", {"algo=td3", "algo=td3_bc"}, {"algo=sac"}),
        ("robopost train algo=sac env=arm_", {"env=arm_push"}, {"env=hopper"}),
        ("robopost train recipe=hop", {"recipe=hopper/sac"}, {"recipe=pusht/flow"}),
        ("robopost eval env=hop", {"env=hopper"}, set()),
        ("robopost eval pol", {"policy="}, set()),
        ("robopost data ver", {"verify"}, {"info"}),
        ("robopost eval policy=", set(), {"policy=flow"}),  # a path: left to the shell
    ],
)
def test_candidates(line, some, never):
    found = set(candidates(line))
    assert some <= found
    assert not never & found


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_scripts_are_printed(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "robopost completion --words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("robopost tra", ["train"]),
        ("robopost train recipe=debug_of", ["debug_offline", "debug_offline_to_online", "debug_offpolicy"]),
        ("robopost train algo=sa", ["sac"]),
        ("robopost train al", ["algo="]),
    ],
)
def test_completion_in_bash(line, wanted):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    # What readline does: split the line at its word breaks and call the registered function.
    script = f"""
export PATH="{BIN}:$PATH"
eval "$(robopost completion bash)"
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}
COMP_WORDS=(robopost x); COMP_CWORD=1
_robopost 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, timeout=30)
    assert done.stdout.split() == wanted, done.stderr


def test_bash_script_is_valid():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    subprocess.run([bash, "-n"], input=SCRIPTS["bash"], text=True, check=True)


def test_doctor_json(capsys, monkeypatch):
    monkeypatch.setattr(
        "robopost.cli.doctor.render_check", lambda backend: {"works": backend == "egl", "why": "x"}
    )
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"]
    assert facts["rendering"] == {"egl": {"works": True, "why": "x"}, "osmesa": {"works": False, "why": "x"}}
    assert set(facts["extras"]["minari"]) == {"installed", "version", "enables", "install"}


def test_doctor_table(capsys, monkeypatch):
    monkeypatch.setattr(
        "robopost.cli.doctor.render_check", lambda backend: {"works": False, "why": "no libEGL"}
    )
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no libEGL" in out
    assert "no GL backend renders" in out
    assert "apt-get install" in out


def test_doctor_really_renders():
    from robopost.cli.doctor import render_check

    state = {backend: render_check(backend) for backend in ("egl", "osmesa")}
    assert any(item["works"] for item in state.values()), state
    broken = render_check("nonsense")
    assert not broken["works"]
    assert "nonsense" in broken["why"]


def test_doctor_knows_every_extra():
    import tomllib

    from robopost.cli.doctor import EXTRAS

    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    extras = tomllib.loads(path.read_text())["project"]["optional-dependencies"]
    assert extras.keys() - {"dev"} <= EXTRAS.keys()
