# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are whole or absent, name what is wrong with them, and never cost the previous one."""

import errno
import json

import numpy as np
import pytest
import torch

from robopost.artefacts import checkpoint
from robopost.artefacts.checkpoint import (
    find_policy,
    latest,
    load_policy,
    load_tensors,
    policy_files,
    save_checkpoint,
    save_folder,
)
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, RobopostError
from robopost.policies.deterministic import Deterministic, DeterministicConfig

SPEC = Spec({"state": ((3,), "float32")}, 2, (-1.0, -2.0), (1.0, 2.0), 50)


@pytest.fixture
def policy():
    torch.manual_seed(0)
    made = Deterministic(DeterministicConfig(hidden=[8]), SPEC)
    stats = {
        key: {"mean": np.full(3, 2.0), "std": np.full(3, 4.0), "count": 9} for key in ("state", "action")
    }
    made.normaliser.fit(stats, source="toy")
    return made


def files(value):
    return {"model.safetensors": {"w": torch.full((4,), float(value))}, "state.json": {"value": value}}


def test_round_trip_keeps_weights_normaliser_and_provenance(policy, tmp_path):
    save_checkpoint(tmp_path, 7, files(1), policy=policy)
    for place in (tmp_path, latest(tmp_path)):
        again = load_policy(place)
        obs = {"state": torch.randn(5, 3)}
        assert torch.equal(policy.act(obs).chunk, again.act(obs).chunk)
        assert again.normaliser.provenance == {
            "obs": "meanstd",
            "action": "bounds",
            "source": "toy",
            "count": 9,
        }


def test_only_the_newest_are_kept(policy, tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, files(step), policy=policy, keep=2)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_000000003", "step_000000004"]
    assert latest(tmp_path).name == "step_000000004"


@pytest.mark.parametrize("target", ["save_file", "_sync"])
def test_full_disk_leaves_the_previous_checkpoint(policy, tmp_path, monkeypatch, target):
    save_checkpoint(tmp_path, 1, files(1), policy=policy)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, target, full)
    with pytest.raises(RobopostError, match="the disk is full"):
        save_checkpoint(tmp_path, 2, files(2), policy=policy)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "step_000000001"]
    assert load_tensors(latest(tmp_path) / "model.safetensors")["w"].tolist() == [1.0] * 4


def test_leftovers_of_a_killed_writer_are_removed(policy, tmp_path):
    torn = tmp_path / "checkpoints" / ".step_000000001.partial-1"
    torn.mkdir(parents=True)
    save_checkpoint(tmp_path, 2, files(2), policy=policy)
    assert not torn.exists()


def test_numpy_arrays_keep_their_dtype(tmp_path):
    from safetensors.numpy import load_file

    arrays = {"rng": np.array([2**63 + 1], np.uint64), "state": np.arange(3.0)}
    save_folder(tmp_path / "x", {"env.safetensors": arrays})
    loaded = load_file(tmp_path / "x" / "env.safetensors")
    assert all(
        np.array_equal(loaded[key], arrays[key]) and loaded[key].dtype == arrays[key].dtype for key in arrays
    )


def test_what_is_wrong_is_named(policy, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        find_policy(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected a run folder"):
        find_policy(tmp_path)
    folder = tmp_path / "p"
    save_folder(folder, policy_files(policy))
    meta = json.loads((folder / "policy.json").read_text())
    (folder / "policy.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        load_policy(folder)
    (folder / "policy.json").write_text(json.dumps(meta | {"config": meta["config"] | {"hidden": [16]}}))
    with pytest.raises(CheckpointError, match="has shape"):
        load_policy(folder)
    (folder / "policy.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_policy(folder)
