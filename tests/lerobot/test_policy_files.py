# SPDX-License-Identifier: Apache-2.0
"""policy=lerobot: checkpoints both ways, statistics, names of observations, bad input."""

import json

import pytest
import tiny
import torch
from lerobot.configs.types import NormalizationMode
from policy_lab import SPEC, draw, frames, make, observe, parts, theirs

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError
from robopost.policies.lerobot import LeRobotConfig, lerobot
from robopost.policies.lerobot_files import collect

# --- checkpoints


@pytest.mark.parametrize("kind", ["act", "diffusion", "smolvla"])
def test_checkpoints_of_ours_and_folders_of_lerobot(kind, tmp_path):
    policy = make(kind, tmp_path)
    history = 2 if kind == "diffusion" else 0
    obs, seed = observe(history=history), lambda: torch.Generator().manual_seed(0)
    chunk = policy.act(obs, generator=seed()).chunk
    save_folder(tmp_path / "p", policy_files(policy))
    for path in [tmp_path / kind, tmp_path / f"{kind}-vlm"]:
        if path.exists():
            path.rename(tmp_path / f"gone-{path.name}")  # a checkpoint needs nothing else
    loaded = load_policy(tmp_path / "p")
    assert type(loaded) is type(policy)
    assert torch.equal(loaded.act(obs, generator=seed()).chunk, chunk)
    assert loaded.normaliser.provenance == policy.normaliser.provenance
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.01)
    moved = loaded.act(obs, generator=seed()).chunk
    loaded.export(tmp_path / "back")
    model, pre, post = theirs(tmp_path / "back")
    again = lerobot(LeRobotConfig(path=str(tmp_path / "back")), SPEC)
    torch.testing.assert_close(again.act(obs, generator=seed()).chunk, moved)
    if kind == "act":
        torch.testing.assert_close(post(model.predict_action_chunk(pre(frames(obs)))).clamp(-5, 5), moved)
    else:
        for (name, a), b in zip(
            model.state_dict().items(), parts(loaded).policy.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


# --- statistics


@pytest.mark.parametrize("mode", [m.value for m in NormalizationMode])
@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_processors_there_and_back(kind, mode, tmp_path):
    mapping = {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode(mode),
        "ACTION": NormalizationMode(mode),
    }
    policy = make(kind, tmp_path, normalization_mapping=mapping)
    action = draw(4, 6, 4).clamp(-4.9, 4.9)
    inside = parts(policy).normalise(action)
    assert torch.equal(inside, action) is (mode == "IDENTITY")
    torch.testing.assert_close(parts(policy).unnormalise(inside), action, rtol=1e-5, atol=1e-5)
    norm = policy.normaliser
    torch.testing.assert_close(norm.unnormalise_action(norm.action(action)), action, rtol=1e-5, atol=1e-5)
    if kind == "smolvla":  # our units are its units
        torch.testing.assert_close(norm.action(action), inside, rtol=1e-4, atol=1e-5)
        assert norm.provenance["action"] == f"lerobot {mode}"
    else:
        assert torch.equal(norm.action(action), action)
        assert norm.provenance["action"] == "identity"
    assert norm.provenance["obs"] == "identity"


@pytest.mark.parametrize("gone", ["observation.state", "action"])
def test_missing_statistics_raise(gone, tmp_path):
    stats = tiny.statistics(6, 4)
    del stats[gone]
    with pytest.raises(
        CheckpointError, match=rf"normalises '{gone}' with MEAN_STD and its processors have no 'mean'"
    ):
        make("smolvla", tmp_path, stats=stats)


def test_statistics_of_the_data_replace_those_of_the_processors(tmp_path):
    policy = make("act", tmp_path, config={"statistics": "data"}, stats={})
    assert not policy.normaliser_fixed
    ours = {
        "state": {"mean": [1.0] * 6, "std": [2.0] * 6, "min": [0.0] * 6, "max": [1.0] * 6},
        "action": {"mean": [3.0] * 4, "std": [0.5] * 4, "min": [0.0] * 4, "max": [1.0] * 4, "count": 12},
        "image": {"mean": [51.0] * 3, "std": [25.5] * 3, "min": [0.0] * 3, "max": [255.0] * 3},
    }
    before = policy.normaliser.provenance["processors"]
    policy.normaliser.fit(ours, source="abc")
    assert policy.normaliser.provenance["processors"] != before
    assert policy.normaliser.provenance["source"] == "abc"
    batch = policy.parts.batch(observe())
    torch.testing.assert_close(batch["observation.state"], (observe()["state"] - 1) / 2, rtol=1e-5, atol=1e-5)
    image = (observe()["image"].permute(0, 3, 1, 2) / 255 - 0.2) / 0.1
    torch.testing.assert_close(batch["observation.image"], image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.parts.unnormalise(torch.ones(2, 4)), torch.full((2, 4), 3.5))
    save_folder(tmp_path / "p", policy_files(policy))
    loaded = load_policy(tmp_path / "p")
    torch.testing.assert_close(loaded.parts.unnormalise(torch.ones(2, 4)), torch.full((2, 4), 3.5))
    del ours["state"]["mean"]
    with pytest.raises(ConfigError, match=r"the data has no 'mean' of 'state'"):
        policy.normaliser.fit(ours)


def test_smolvla_takes_the_units_of_the_data(tmp_path):
    policy = make("smolvla", tmp_path, config={"statistics": "data"}, stats={})
    stats = {
        "state": {"mean": [1.0] * 6, "std": [2.0] * 6},
        "action": {"mean": [3.0] * 4, "std": [0.5] * 4, "count": 12},
    }
    policy.normaliser.fit(stats, source="abc")
    torch.testing.assert_close(policy.normaliser.action(torch.full((1, 4), 4.0)), torch.full((1, 4), 2.0))


# --- observations


def test_names_of_observations(tmp_path):
    folder = tiny.act(tmp_path / "act")
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.images.top"] = config["input_features"].pop("observation.image")
    (folder / "config.json").write_text(json.dumps(config))
    for key, given in (("image", {}), ("image_top", {}), ("image_a", {"image_a": "observation.images.top"})):
        spec = Spec(
            {key: SPEC.obs["image"], "state": SPEC.obs["state"]}, 4, SPEC.action_low, SPEC.action_high
        )
        policy = lerobot(LeRobotConfig(path=str(folder), keys=given), spec)
        assert policy.parts.keys == {key: "observation.images.top", "state": "observation.state"}
        assert policy.obs_keys == [key, "state"]


def test_images_are_scaled_to_the_declared_size(tmp_path):
    spec = Spec(
        {"image": ((64, 48, 3), "uint8"), "state": ((6,), "float32")}, 4, SPEC.action_low, SPEC.action_high
    )
    policy = lerobot(LeRobotConfig(path=str(tiny.act(tmp_path / "act", stats=tiny.statistics(6, 4)))), spec)
    obs = {"image": torch.full((2, 64, 48, 3), 255, dtype=torch.uint8), "state": torch.zeros(2, 6)}
    image = policy.parts.batch(obs)["observation.image"]
    assert image.shape == (2, 3, 32, 32)


# --- bad input


def test_bad_input_is_named(tmp_path):
    folder = tiny.smolvla(tmp_path / "smolvla")
    path = str(folder)

    def load(spec=SPEC, **options):
        return lerobot(LeRobotConfig(**({"path": path} | options)), spec)

    def without(*keys, **changed):
        return Spec(
            {k: v for k, v in (SPEC.obs | changed).items() if k not in keys},
            4,
            SPEC.action_low,
            SPEC.action_high,
        )

    with pytest.raises(ConfigError, match=r"policy.path is empty"):
        lerobot(LeRobotConfig(), SPEC)
    with pytest.raises(CheckpointError, match=r"is no LeRobot policy: config.json is missing"):
        load(path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such folder, and the hub says"):
        load(path="nobody/nothing")
    with pytest.raises(
        ConfigError, match=r"the policy observes 'observation.image', the observations are state"
    ):
        load(without("image"))
    with pytest.raises(ConfigError, match=r"'observation.state' has shape \(6,\), 'state' here has \(5,\)"):
        load(without(state=((5,), "float32")))
    with pytest.raises(ConfigError, match=r"follows instructions, the observations hold none"):
        load(without("instruction"))
    load(without("instruction"), task="lift it")
    with pytest.raises(ConfigError, match=r"has 4 actions, the task has 3"):
        load(Spec(SPEC.obs, 3, (-1.0,) * 3, (1.0,) * 3))
    with pytest.raises(
        ConfigError, match=r"policy.normalise_obs=meanstd: a LeRobot policy normalises itself"
    ):
        load(normalise_obs="meanstd")
    with pytest.raises(ConfigError, match=r"policy.statistics"):
        load(statistics="mine")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load()
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(CheckpointError, match=r"older than lerobot 0.4"):
        collect(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it names no type"):
        load()
