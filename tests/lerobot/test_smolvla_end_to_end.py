# SPDX-License-Identifier: Apache-2.0
"""A tiny SmolVLA on arm_language: recorded, exported, read back, cloned, distilled, merged, evaluated."""

import json

import numpy as np
import pytest
import robopost_envs  # noqa: F401 - registers environments: nothing is installed here
import tiny
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

from robopost.artefacts.checkpoint import load_policy, load_tensors
from robopost.cli import main
from robopost.data.store import EpisodeStore

ENV = ["env=arm_language", "env.obs=state+pixels96", "env.max_steps=24"]
QUIET = ["track.tensorboard=false", "track.console=false"]
OWN = 10  # columns of the state that are the arm's own


def run(*words):
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Recorded episodes in a store, as a LeRobot dataset, and read back from that."""
    root = tmp_path_factory.mktemp("work")
    run("collect", *ENV, "episodes=6", "num_envs=3", f"out={root / 'demos.zarr'}")
    run(
        "data",
        "export",
        root / "demos.zarr",
        "--out",
        root / "lerobot",
        "--format",
        "lerobot",
        "-o",
        "video=false",
    )
    run("data", "import", root / "lerobot", "--out", root / "back.zarr")
    return root


def test_demonstrations_survive_lerobot_v3(work):
    dataset = LeRobotDataset("local/lerobot", root=work / "lerobot")
    with EpisodeStore.open(work / "demos.zarr") as ours, EpisodeStore.open(work / "back.zarr") as back:
        assert back.spec.obs == ours.spec.obs
        assert (back.spec.action_low, back.spec.action_high) == (ours.spec.action_low, ours.spec.action_high)
        row = 0
        texts = set()
        for wanted, found in zip(ours, back, strict=True):
            steps = len(wanted)
            text = bytes(wanted.obs["instruction"][0]).rstrip(b"\0").decode()
            texts.add(text)
            assert found.instruction == wanted.instruction == text == dataset[row]["task"]
            for key in ("image", "state", "instruction"):
                np.testing.assert_array_equal(found.obs[key][:steps], wanted.obs[key][:steps])
            np.testing.assert_array_equal(found.action, wanted.action)
            np.testing.assert_array_equal(dataset[row + 1]["observation.state"], wanted.obs["state"][1])
            row += steps
    assert row == dataset.num_frames
    assert len(texts) > 1


def clone(work, name, steps, seed=0):
    """Cloning of a new SmolVLA on what was read back."""
    folder = work / f"{name}-new"
    tiny.smolvla(folder, OWN, 4, stats={}, seed=seed, max_state_dim=12)
    run(
        *("train", "algo=bc", "algo.batch_size=8", "algo.warmup=1", "algo.lr=2e-3", "algo.ema=0.5"),
        *("policy=lerobot", f"policy.path={folder}", "policy.statistics=data", f"policy.proprio=[0,{OWN}]"),
        *ENV,
        *(f"data.path={work / 'back.zarr'}", f"loop.steps={steps}", f"loop.log_every={steps // 4}"),
        *("loop.eval_episodes=2", f"out={work / name}", *QUIET),
    )
    return work / name


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def teacher(work):
    return clone(work, "teacher", 40)


def test_cloning_from_the_round_trip_learns(teacher, work):
    losses = [line["loss/bc"] for line in metrics(teacher) if "loss/bc" in line]
    assert losses[-1] < 0.8 * losses[0]
    policy = load_policy(teacher)
    with EpisodeStore.open(work / "back.zarr") as store:
        wanted = torch.as_tensor(store.stats()["action"]["mean"], dtype=torch.float32)
    torch.testing.assert_close(policy.normaliser.action_shift, wanted, rtol=1e-4, atol=1e-5)
    assert policy.obs_keys == ["image", "instruction", "state"]


def test_distilled_merged_evaluated_and_given_back(work, teacher):
    student = clone(work, "student", 4)
    run(
        *("train", "algo=vla_opd", f"algo.teacher={teacher}", "algo.check_teacher=0", "algo.batch_size=16"),
        *("policy=pretrained", f"policy.path={student}", *ENV, "env.num_envs=2", "algo.lr=1e-3"),
        *("loop.steps=384", "loop.log_every=48", "loop.eval_episodes=2", f"out={work / 'opd'}", *QUIET),
    )
    gaps = [line["loss/opd"] for line in metrics(work / "opd") if "loss/opd" in line]
    assert gaps[-1] < 0.8 * gaps[0]  # the student's steps come closer to the teacher's
    words = ["modules=vision:0.25,language:0.5,action:1", f"out={work / 'merged'}"]
    run("merge", f"base={student}", f"finetuned={work / 'opd'}", *words)
    first, second, merged = (
        load_policy(path).state_dict() for path in (student, work / "opd", work / "merged")
    )
    shares = {"vision_model": 0.25, "text_model": 0.5, "lm_expert": 1.0, "action_out_proj": 1.0}
    for part, share in shares.items():
        names = [name for name in merged if part in name and not torch.equal(first[name], second[name])]
        assert names, part
        for name in names:
            torch.testing.assert_close(merged[name], torch.lerp(first[name], second[name], share))
    run("eval", f"policy={work / 'merged'}", *ENV, "episodes=2", f"out={work / 'eval'}")
    assert (work / "eval" / "eval.json").exists()
    load_policy(work / "merged").export(work / "given-back")
    theirs = SmolVLAPolicy.from_pretrained(work / "given-back")
    tensors = load_tensors(work / "merged" / "policy.safetensors")
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, tensors[f"encoder.policy.{name}"]), name
