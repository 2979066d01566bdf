# SPDX-License-Identifier: Apache-2.0
"""Suites: every set is sound, recording a set in small, continuation, refusals, the recipes behind the runs."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from robopost.cli import main
from robopost.compose import compose
from robopost.config_files import config_dir, file_options, search_dirs
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError, DataError
from robopost.suite import Source, SuiteSet, collect_set, load_set, set_names

SETS = set_names("mujoco_v5")
KINDS = ("random", "medium", "medium-replay", "medium-expert", "expert")
DATA = Path(os.environ.get("ROBOPOST_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
TRAIN = [
    "loop.steps=600",
    "loop.checkpoint_every=200",
    "loop.eval_every=0",
    "loop.eval_episodes=1",
    "loop.log_every=200",
]


def test_the_suite_is_complete():
    wanted = {f"mujoco_v5/{task}-{kind}" for task in ("hopper", "halfcheetah", "walker2d") for kind in KINDS}
    assert wanted | {"mujoco_v5/arm_push-mixed"} == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_every_set(name):
    wanted = load_set(name)
    assert 100_000 <= wanted.steps <= 400_000
    seeded = [source.seed for source in wanted.sources if source.kind != "replay"]
    assert len(set(seeded)) == len(seeded), "two sources share start states"
    assert all(seed >= 1_000_000 for seed in seeded), "training and evaluation use small seeds"
    env = compose([f"env={wanted.env}", "out=-"], "collect").env
    for source in wanted.sources:
        if source.kind in ("run", "replay"):
            _, run, step = source.origin.split("/")
            recipe = recipe_of(run)
            assert recipe.env == env
            assert recipe.out == f"data/mujoco_v5/runs/{run}"
            assert int(step) % recipe.loop.checkpoint_every == 0
            assert recipe.loop.steps // recipe.loop.checkpoint_every <= recipe.loop.keep_checkpoints
        if source.kind == "actor" and DATA.is_dir():
            assert (DATA / "policies_mujoco" / f"{source.origin.split('/')[1]}.npz").is_file()


@cache
def recipe_of(run):
    return compose([f"recipe=suite/{run}"])


@pytest.mark.parametrize("task", ["hopper", "halfcheetah", "walker2d"])
def test_medium_expert_is_medium_and_expert(task):
    half = lambda kind: load_set(f"mujoco_v5/{task}-{kind}").sources  # noqa: E731
    assert half("medium-expert") == half("medium") + half("expert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of stores with one short TD3 run in it, of the recipe that a stranger would use."""
    place = tmp_path_factory.mktemp("suite")
    small = ["algo.warmup_steps=300", "algo.hidden=[16,16]", "policy.hidden=[16,16]", "algo.batch_size=16"]
    words = ["recipe=suite/td3_hopper", *TRAIN, *small, f"out={place / 'runs' / 'td3_hopper'}"]
    assert main(["train", *words, "track.tensorboard=false", "track.console=false"]) == 0
    return place


MIX = SuiteSet(
    "toy",
    "hopper-mix",
    1,
    "hopper",
    (
        Source("random", steps=200, seed=7),
        Source("run/td3_hopper/400", steps=150, seed=1_000, noise=0.3),
        Source("replay/td3_hopper/400"),
    ),
)


def origins(path):
    with EpisodeStore.open(path) as store:
        return [(item["metadata"]["source"], item["length"]) for item in store.episode_info], store.dataset_id


def test_sources_fill_one_store(folder, tmp_path):
    (tmp_path / "runs").symlink_to(folder / "runs")
    seen = []
    result = collect_set(MIX, tmp_path, num_envs=3, progress=seen.append)
    rows, _ = origins(result.path)
    totals = [sum(length for index, length in rows if index == source) for source in range(3)]
    longest = max(length for _, length in rows)
    assert 200 <= totals[0] < 200 + longest
    assert 150 <= totals[1] < 150 + longest
    assert totals[2] == 400  # the whole buffer at that checkpoint, warm-up included
    assert [index for index, _ in rows] == sorted(index for index, _ in rows)
    assert seen[-1] == result.steps == sum(totals)
    assert len(result.returns) == result.recorded == len(rows)
    with EpisodeStore.open(result.path) as store:
        assert store.metadata["suite"]["sources"][1]["origin"] == "run/td3_hopper/400"
        first = store.episode(0)
        np.testing.assert_array_equal(first.obs["state"].shape, (len(first) + 1, 11))


def test_an_interrupted_set_goes_on(folder, tmp_path):
    for place in ("whole", "parts"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "runs").symlink_to(folder / "runs")
    # Random actions and replay buffers don't depend on how many environments run side by side.
    wanted = replace(MIX, sources=(MIX.sources[0], MIX.sources[2]))
    whole = collect_set(wanted, tmp_path / "whole", num_envs=4)

    class Stop(Exception):
        pass

    def stop_after(limit):
        def append(self, episode, own=EpisodeStore.append):
            if len(self) + self.pending >= limit:
                raise Stop
            own(self, episode)
            self.flush()

        return append

    for limit in (3, len(origins(whole.path)[0]) - 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EpisodeStore, "append", stop_after(limit))
            with pytest.raises(Stop):
                collect_set(wanted, tmp_path / "parts", num_envs=3)
    later = collect_set(wanted, tmp_path / "parts", num_envs=1)
    assert later.recorded == 2
    assert origins(later.path) == origins(whole.path)
    assert collect_set(wanted, tmp_path / "parts").recorded == 0


def test_another_version_or_scale_is_refused(folder, tmp_path):
    wanted = replace(MIX, sources=MIX.sources[:1])
    collect_set(wanted, tmp_path, scale=0.2)
    for changes, scale in (
        ({"version": 2}, 0.2),
        ({}, 0.4),
        ({"sources": (Source("random", steps=9),)}, 0.2),
    ):
        with pytest.raises(ConfigError, match="another version, scale or definition"):
            collect_set(replace(wanted, **changes), tmp_path, scale=scale)


def test_what_is_absent_is_named(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"no checkpoint of step 400\. Fix: robopost train recipe=suite/td3_hopper"
    ):
        collect_set(replace(MIX, sources=MIX.sources[1:2]), tmp_path)
    monkeypatch.setenv("ROBOPOST_TEST_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no actor at .*hopper_trpo\.npz\. Fix: set ROBOPOST_TEST_DATA"):
        collect_set(load_set("mujoco_v5/hopper-expert"), tmp_path)
    assert not (tmp_path / "hopper-expert.zarr").exists()


def test_the_command(tmp_path, capsys):
    words = ["suite=mujoco_v5/arm_push-*", "scale=0.005", f"out={tmp_path}", "num_envs=2"]
    assert main(["collect", *words]) == 0
    assert "arm_push-mixed.zarr: 10 episodes, 700 steps, 10 recorded" in capsys.readouterr().out
    assert main(["collect", *words]) == 0
    assert "complete already" in capsys.readouterr().out
    rows, _ = origins(tmp_path / "arm_push-mixed.zarr")
    assert [index for index, _ in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["suite=mujoco_v5/hoper-medium"],
            "unknown suite 'mujoco_v5/hoper-medium'. Did you mean 'mujoco_v5/hopper-",
        ),
        (["suite=mujoco_v5/hopper-medium", "noise=0.1"], "noise=0.1: a set of a suite has its own"),
        (["suite=mujoco_v5/hopper-medium", "scale=0"], "scale=0.0 must lie above 0"),
    ],
)
def test_wrong_words(words, text, capsys):
    assert main(["collect", *words]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"sources": [{"from": "actor"}]}, "from: actor must read actor/<name>"),
        ({"sources": [{"from": "run/td3/last", "steps": 9}]}, r"must read run/<run>/<step>"),
        ({"sources": [{"from": "randm", "steps": 9}]}, "unknown source 'randm'. Did you mean 'random'"),
        ({"sources": [{"from": "random"}]}, "steps=0 must be at least 1"),
        (
            {"sources": [{"from": "random", "step": 9}]},
            "unknown key of a source 'step'. Did you mean 'steps'",
        ),
        ({"sources": []}, "has no sources"),
        ({"include": ["hopper-random"]}, "includes hopper-random, which is recorded in hopper"),
        ({"source": []}, "unknown key 'source'. Did you mean 'sources'"),
        ({"include": ["bad"]}, "includes itself"),
        ({"sources": ["random"]}, "source 'random' must read"),
        (
            {"sources": [{"from": "random", "steps": "many"}]},
            "steps: 'many' of a source is of the wrong type",
        ),
        ({"sources": [{"from": "random", "steps": 9, "noise": True}]}, "noise: True of a source"),
        ({"sources": {"from": "random"}}, "must be of type list"),
        ({"version": "one"}, "version: one must be of type int"),
        ("", "has no version"),
        ("version: 1\n", "has no env"),
        ("version: [1\nenv: hopper\n", r"line \d+: not valid YAML"),
    ],
)
def test_wrong_sets(tmp_path, body, text):
    place = tmp_path / "suite" / "toy"
    place.mkdir(parents=True)
    whole = body if isinstance(body, str) else yaml.safe_dump({"version": 1, "env": "walker2d", **body})
    (place / "bad.yaml").write_text(whole)
    shipped = (config_dir() / "suite" / "mujoco_v5" / "hopper-random.yaml").read_text()
    (place / "hopper-random.yaml").write_text(shipped)
    with pytest.raises(ConfigError, match=text):
        load_set("toy/bad", [tmp_path])


def test_definitions_are_files_of_the_config_tree():
    assert set(SETS) <= set(file_options("suite", search_dirs()))


def test_a_suite_of_ones_own(tmp_path, capsys):
    (tmp_path / "suite" / "mine").mkdir(parents=True)
    (tmp_path / "suite" / "mine" / "few.yaml").write_text(
        "version: 3\nenv: arm_reach\nsources:\n  - {from: random, steps: 50, seed: 5}\n"
    )
    words = ["suite=mine", f"out={tmp_path}", "num_envs=2", "--config-dir", str(tmp_path)]
    assert main(["collect", *words]) == 0
    assert "few.zarr: 2 episodes, 80 steps, 2 recorded" in capsys.readouterr().out
