# SPDX-License-Identifier: Apache-2.0
"""Composition: every shipped file, conveniences, replacement, user folders, round trips."""

import json
import re
import shlex
from dataclasses import dataclass, is_dataclass
from pathlib import Path

import pytest

from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.cli import collect as record
from robopost.cli import eval as evaluate
from robopost.cli import train
from robopost.compose import REGISTRIES, compose, from_dict, options, override, to_dict
from robopost.config import EnvConfig, TrainConfig
from robopost.config_files import config_dir, file_options, search_dirs, summary
from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.policies.flow import Flow, FlowConfig
from robopost.registry import ALGOS, ENVS, POLICIES

DIRS = search_dirs()
NEEDS_VALUES = {"pretrained"}  # can't stand without a path


@pytest.mark.parametrize("env", file_options("env", DIRS))
def test_every_environment_file(env):
    config = compose([f"env={env}"]).env
    assert is_dataclass(config)
    assert config.name in REGISTRIES["env"]


@pytest.mark.parametrize("policy", file_options("policy", DIRS))
@pytest.mark.parametrize("algo", file_options("algo", DIRS))
def test_every_algorithm_with_every_policy(algo, policy):
    config = compose([f"algo={algo}", f"policy={policy}", "env=arm_reach"])
    assert isinstance(config, TrainConfig)
    assert isinstance(config.algo, ALGOS.get(config.algo.name).config)
    assert isinstance(config.policy, POLICIES.get(config.policy.name).config)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("algo", file_options("algo", DIRS))
def test_every_algorithm_names_its_usual_policy(algo):
    assert compose([f"algo={algo}"]).policy is not None


@pytest.mark.parametrize("group", ["data", "track"])
def test_other_groups(group):
    for name in file_options(group, DIRS):
        compose([f"{group}={name}"])


@pytest.mark.parametrize("recipe", file_options("recipe", DIRS))
def test_every_recipe(recipe):
    config = compose([f"recipe={recipe}", "seed=3"])
    assert None not in (config.algo, config.policy)
    # D4RL's mazes are not among Gymnasium's environments: those recipes train without one.
    assert config.env is not None or recipe.startswith("antmaze/")
    assert config.seed == 3
    assert from_dict(to_dict(config)) == config


def test_every_shipped_file_says_what_it_is():
    for path in (config_dir() / "recipe").rglob("*.yaml"):
        assert summary(path), f"{path} needs a comment line"


def test_every_loop_has_a_debug_recipe():
    debug = {"debug_offline", "debug_offline_to_online", "debug_offpolicy", "debug_onpolicy"}
    assert debug <= set(options("recipe"))


def test_defaults_are_the_schema():
    config = compose()
    assert config == TrainConfig()


def test_values_reach_the_dataclasses():
    config = compose(["algo=sac", "env=hopper", "algo.hidden=[8,4]", "loop.steps=1e6", "algo.actor_lr=1e-4"])
    assert config.algo.hidden == [8, 4]
    assert isinstance(config.algo.hidden, list)
    assert config.loop.steps == 1_000_000
    assert isinstance(config.loop.steps, int)
    assert config.algo.actor_lr == 1e-4


def test_the_last_word_wins():
    assert compose(["seed=1", "seed=2", "env=hopper", "env=arm_push"]).env.name == "arm_push"
    assert compose(["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("last", ["null", "arm_push", "Walker2d-v5"])
def test_the_last_choice_wins_over_an_id(last):
    """`env=Hopper-v5` sets env.id as well, which must not outlive it."""
    env = compose(["env=Hopper-v5", f"env={last}"]).env
    expected = {"null": None, "arm_push": "arm_push", "Walker2d-v5": "gymnasium"}[last]
    assert (env and env.name) == expected
    assert getattr(env, "id", "Walker2d-v5") == "Walker2d-v5"


def test_the_last_choice_wins_over_a_path():
    assert compose(["policy=runs/x/actor.npz", "policy=gaussian"]).policy.name == "gaussian"
    assert compose(["data=demos.hdf5", "data=none"]).data.path == ""
    assert compose(["data=demos.hdf5", "data=none", "data=other.zarr"]).data.path == "other.zarr"


def test_interpolation():
    assert compose(["algo=bc", "loop.steps=77", "algo.batch_size=${loop.steps}"]).algo.batch_size == 77


@pytest.mark.parametrize(
    ("word", "group", "field", "value"),
    [
        ("env=Hopper-v5", "env", "id", "Hopper-v5"),
        ("env=my_package/Task-v0", "env", "id", "my_package/Task-v0"),
        ("data=data/push.zarr", "data", "path", "data/push.zarr"),
        ("data=demos.hdf5", "data", "path", "demos.hdf5"),
        ("data=some folder/x (1).zarr", "data", "path", "some folder/x (1).zarr"),
        ("steps=12", "loop", "steps", 12),
    ],
)
def test_conveniences(word, group, field, value):
    assert getattr(getattr(compose([word]), group), field) == value


def test_a_path_as_policy(tmp_path):
    config = compose([f"policy={tmp_path}/actor.npz"])
    assert (config.policy.name, config.policy.path) == ("pretrained", f"{tmp_path}/actor.npz")


def test_alternatives_replace_and_do_not_merge(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /algo: sac\n  - override /env: gymnasium\n  - override /data: scripted\n"
        "env: {id: Hopper-v5, num_envs: 3}\nalgo: {batch_size: 7}\ndata: {collect: 5, episodes: 4}\nseed: 9\n"
    )
    plain = compose(["recipe=mine"], config_dirs=[tmp_path])
    assert (plain.env.id, plain.env.num_envs, plain.algo.batch_size, plain.seed) == ("Hopper-v5", 3, 7, 9)
    assert plain.data.collect == 5
    other = compose(["recipe=mine", "env=arm_push"], config_dirs=[tmp_path])
    assert (other.env.name, other.env.num_envs, other.algo.batch_size, other.seed) == ("arm_push", 1, 7, 9)
    same = compose(["recipe=mine", "env=gymnasium", "env.id=Ant-v5"], config_dirs=[tmp_path])
    assert (same.env.id, same.env.num_envs) == ("Ant-v5", 3)
    algo = compose(["recipe=mine", "algo=td3"], config_dirs=[tmp_path])
    assert (algo.algo.name, algo.algo.batch_size, algo.env.id) == ("td3", 256, "Hopper-v5")
    data = compose(["recipe=mine", "data=x.zarr"], config_dirs=[tmp_path])
    assert (data.data.path, data.data.collect, data.data.episodes) == ("x.zarr", 0, 0)
    none = compose(["recipe=mine", "env=null"], config_dirs=[tmp_path])
    assert none.env is None


def test_recipe_beats_defaults_and_words_beat_the_recipe():
    config = compose(["recipe=debug_offline"])
    assert (config.algo.name, config.policy.name) == ("bc", "deterministic")
    assert compose(["recipe=debug_offline", "algo.batch_size=5"]).algo.batch_size == 5
    assert compose(["recipe=debug_offline", "policy=flow"]).policy.name == "flow"


def test_user_folder_comes_first(tmp_path):
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "sac.yaml").write_text("defaults: [sac_schema, _self_]\nname: sac\nbatch_size: 11\n")
    (tmp_path / "algo" / "gentle.yaml").write_text("name: sac\nactor_lr: 0.00001\n")
    assert compose(["algo=sac"], config_dirs=[tmp_path]).algo.batch_size == 11
    assert compose(["algo=sac"]).algo.batch_size == 256
    gentle = compose(["algo=gentle", "env=hopper"], config_dirs=[tmp_path])  # without naming the schema
    assert (type(gentle.algo), gentle.algo.actor_lr) == (ALGOS.get("sac").config, 1e-5)
    assert "gentle" in options("algo", search_dirs([tmp_path]))


def test_two_user_folders(tmp_path):
    for name, size in (("a", 1), ("b", 2)):
        (tmp_path / name / "algo").mkdir(parents=True)
        (tmp_path / name / "algo" / "bc.yaml").write_text(f"name: bc\nbatch_size: {size}\n")
    (tmp_path / "b" / "algo" / "only_b.yaml").write_text("name: bc\nbatch_size: 3\n")
    folders = [tmp_path / "a", tmp_path / "b"]
    assert compose(["algo=bc"], config_dirs=folders).algo.batch_size == 1
    assert compose(["algo=only_b"], config_dirs=folders).algo.batch_size == 3


def test_given_stands_in_where_nothing_is_chosen():
    given = {"env": compose(["env=Hopper-v5"]).env}
    assert compose(["policy=x"], "eval", given=given).env.id == "Hopper-v5"
    assert compose(["policy=x", "env.max_steps=7"], "eval", given=given).env.max_steps == 7
    assert compose(["policy=x", "env=arm_push"], "eval", given=given).env.name == "arm_push"


def test_override_changes_only_what_is_allowed():
    config = compose(["recipe=debug_offline"])
    changed = override(config, ["loop.steps=5", "steps=7"], allowed=["loop."])
    assert changed.loop.steps == 7
    assert config.loop.steps == 60
    with pytest.raises(ConfigError, match=r"seed=1: can't change here\. Allowed: loop\."):
        override(config, ["seed=1"], allowed=["loop."])


def test_from_dict_ignores_import_paths():
    data = to_dict(compose(["algo=bc"]))
    data["algo"]["_target_"] = "os.system"
    with pytest.raises(ConfigError, match="_target_ is not allowed"):
        from_dict(data)


def test_a_stored_config_is_not_interpolated():
    data = to_dict(compose(["algo=bc"])) | {"out": "${oc.env:HOME}"}
    with pytest.raises(ConfigError, match="holds an interpolation"):
        from_dict(data)


def test_a_registered_name_needs_no_file():
    @dataclass
    class PluginConfig(EnvConfig):
        name: str = "plugin_robot"
        speed: float = 1.0

    ENVS.register("plugin_robot", config=PluginConfig)(lambda config, num_envs, render=None: None)
    try:
        config = compose(["recipe=debug_offline", "env=plugin_robot", "env.speed=0.5"])
        assert (type(config.env), config.env.speed) == (PluginConfig, 0.5)
        assert from_dict(to_dict(config)) == config
        with pytest.raises(ConfigError, match=r"unknown key 'env\.sped'.*Did you mean 'env\.speed'"):
            compose(["env=plugin_robot", "env.sped=1"])
    finally:
        del ENVS._entries["plugin_robot"]


def commands():
    """`robopost train|eval|collect` lines of the documentation and of the help texts."""
    root = Path(__file__).resolve().parents[2]
    texts = [path.read_text() for path in (root / "docs").glob("*.md")] + [(root / "README.md").read_text()]
    lines = re.findall(r"^(?:\$ )?robopost (train|eval|collect) (.*)$", "\n".join(texts), re.MULTILINE)
    for module in (train, evaluate, record):
        lines += [line.removeprefix("robopost ").split(" ", 1) for line in module.EXAMPLES]
    return sorted({(name, rest.split("#")[0].strip()) for name, rest in lines})


@pytest.mark.parametrize(("name", "rest"), commands())
def test_documented_commands_compose(name, rest, tmp_path, monkeypatch):
    words = [word for word in shlex.split(rest) if not word.startswith("-")]
    if "<" in rest or "my_configs" in rest:
        pytest.skip("names something of the reader's")
    for word in words:
        if word.startswith("out="):
            assert not Path(word[4:]).is_absolute(), "examples write below the working folder"
    if name == "collect" and any(word.startswith("suite=") for word in words):
        words.append("out=")  # a suite knows its folder; see `robopost.cli.collect`
    monkeypatch.chdir(tmp_path)
    for word in words:
        if word.startswith("policy.path="):  # composing reads what kind of policy it is
            spec = Spec({"state": ((3,), "float32")}, 2, (-1.0, -1.0), (1.0, 1.0))
            policy = Flow(FlowConfig(horizon=4, width=16, depth=1), spec)
            save_folder(tmp_path / word.removeprefix("policy.path="), policy_files(policy))
    compose(words, name)
