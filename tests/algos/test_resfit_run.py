# SPDX-License-Identifier: Apache-2.0
"""ResFiT through the loop: recorded data, the order of warm-ups, the start, what is refused before the first step."""

import json

import pytest

from robopost.artefacts.checkpoint import latest, load_json, load_policy, policy_files, save_folder
from robopost.collect import collect
from robopost.compose import compose
from robopost.config import CollectConfig
from robopost.errors import ConfigError, DataError
from robopost.evaluate.rollout import evaluate
from robopost.loops import train
from robopost.policies.base import build_policy
from robopost.policies.flow import FlowConfig
from robopost.vector import make_vec

SMALL = ["algo.hidden=[16]", "policy.hidden=[16]", "algo.num_critics=3", "algo.batch_size=16", "device=cpu"]
SMALL += ["loop.log_every=20", "loop.eval_episodes=2", "track.console=false", "track.tensorboard=false"]


def save_base(folder, env, **options):
    vec = make_vec(compose(["algo=td3", f"env={env}"]).env, 1)
    config = FlowConfig(**{"horizon": 4, "steps": 2, "width": 16, "depth": 1} | options)
    save_folder(folder, policy_files(build_policy(config, vec.spec)))
    vec.close()
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An untrained base policy for the pushing arm, one for another task, and two demonstrations."""
    folder = tmp_path_factory.mktemp("resfit")
    save_base(folder / "base", "arm_push")
    save_base(folder / "other", "arm_reach")
    words = ["env=arm_push", "episodes=2", "quality=1", f"out={folder / 'demos.zarr'}"]
    config = compose(words, "collect")
    assert isinstance(config, CollectConfig)
    collect(config)
    return folder


def words(place, *more):
    data = [f"policy.base={place / 'base'}", f"data.path={place / 'demos.zarr'}"]
    return ["recipe=arm_push/resfit", *data, *SMALL, *more]


def test_warm_up_then_critics_then_both_and_half_of_each_batch_recorded(place, tmp_path):
    schedule = [
        "algo.warmup_steps=40",
        "algo.critic_warmup=11",
        "algo.updates_per_step=2",
        "algo.policy_delay=2",
    ]
    out = tmp_path / "run"
    train(compose(words(place, *schedule, "loop.steps=60", "loop.checkpoint_every=60", f"out={out}")))
    state = load_json(latest(out) / "state.json")
    assert state["algorithm"]["updates"] == 11 + 2 * 20
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line for line in lines if "data/online_fraction" in line}
    assert "loss/critic" not in losses[40]
    assert {"loss/critic", "loss/actor", "policy/correction"} <= losses[60].keys()
    assert losses[60]["data/online_fraction"] == 0.5
    assert 0 < losses[60]["policy/correction"] < 0.5
    assert load_policy(out).base.execute == 4


def test_the_first_evaluation_is_that_of_the_base(place, tmp_path):
    out = tmp_path / "run"
    config = compose(words(place, "algo.warmup_steps=40", "loop.steps=20", f"out={out}"))
    train(config)
    results = [
        evaluate(load_policy(path), config.env, episodes=3, seed=7).to_json()["return"]["value"]
        for path in (out, place / "base")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            "policy.base={place}/other",
            ConfigError,
            r"the base policy observes 'state' of shape \(15,\)",
        ),
        ("env.max_steps=3", ConfigError, "chunks of 4 steps, episodes here end after 3"),
        ("data.path=", ConfigError, r"algo.demo_fraction=0.5 mixes in recorded data and data.path is empty"),
        ("env.control=position", DataError, "the environment has 'state'"),
        ("policy=gaussian", ConfigError, "algo=resfit corrects a frozen policy, policy=gaussian has none"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_first_step(place, tmp_path, change, error, message):
    out = tmp_path / "run"
    change = change.format(place=place)
    base = words(place, "loop.steps=20", f"out={out}")
    if change == "policy=gaussian":
        base = [w for w in base if not w.startswith("policy.base")]
    with pytest.raises(error, match=message) as caught:
        train(compose([*base, change]))
    assert "\n" not in str(caught.value)
    assert not out.exists()
