# SPDX-License-Identifier: Apache-2.0
"""The flow VLA under algorithms that know nothing of it: cloning that resumes bitwise, and fine-tuning of flows."""

import json

import pytest
import torch

from robopost.artefacts.checkpoint import latest, load_policy, load_tensors
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError
from robopost.loops import train

pytest.importorskip("transformers")
TEXTS = ("lift the red cube", "touch the blue cube")
VLA = [
    *(
        "policy=flow_vla",
        "policy.horizon=3",
        "policy.image_size=16",
        "policy.vision_width=16",
        "policy.layers=2",
    ),
    *(
        "policy.vision_layers=1",
        "policy.width=32",
        "policy.heads=2",
        "policy.expert_width=24",
        "policy.steps=3",
    ),
    *("policy.text_tokens=300", "policy.proprio=[0,10]", "policy.normalise_action=bounds"),
]
QUIET = ["track.tensorboard=false", "track.console=false"]


@pytest.fixture
def store(tmp_path):
    shapes = {"image": ((24, 24, 3), "uint8"), "state": ((12,), "float32"), "instruction": ((64,), "uint8")}
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "store.zarr"
    with EpisodeStore.create(
        path, spec=Spec(shapes, 2, (-1.0,) * 2, (1.0,) * 2), fps=10, source="test"
    ) as made:
        for text in TEXTS * 3:
            image = torch.randint(0, 256, (7, 24, 24, 3), generator=g).to(torch.uint8).numpy()
            words = (
                torch.tensor(list(text.encode().ljust(64, b"\0")), dtype=torch.uint8).expand(7, 64).numpy()
            )
            state = torch.randn(7, 12, generator=g).numpy()
            action = torch.rand(6, 2, generator=g).mul(2).sub(1).numpy()
            obs = {"image": image, "state": state, "instruction": words}
            made.append(Episode(obs, action, torch.zeros(6).numpy(), False, True, instruction=text))
    return path


def test_cloning_resumes_bitwise(store, tmp_path):
    words = ["algo=bc", "algo.batch_size=4", *VLA, f"data.path={store}", "env=null", *QUIET]
    whole = train(compose([*words, "loop.steps=4", f"out={tmp_path / 'whole'}"]))
    half = train(compose([*words, "loop.steps=2", f"out={tmp_path / 'half'}"]))
    train(compose([*words, "loop.steps=4", f"resume={half}"]))
    a, b = (load_tensors(latest(run) / "model.safetensors") for run in (whole, half))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "words",
    [
        ["algo=reinflow", "algo.noise_hidden=[8]"],
        ["algo=reinflow", "algo.finetune_steps=2", "algo.noise_hidden=[8]"],
        ["algo=fpo", "algo.pairs=2"],
        ["algo=policyflow"],
    ],
    ids=["reinflow", "reinflow-frozen", "fpo", "policyflow"],
)
def test_fine_tuning_of_flows_works_unchanged(words, tmp_path):
    run = train(
        compose(
            [
                *(
                    *words,
                    *VLA,
                    "env=arm_language",
                    "env.obs=state+pixels96",
                    "env.num_envs=2",
                    "env.max_steps=6",
                ),
                *("algo.rollout_steps=2", "algo.batch_size=4", "algo.epochs=1", "algo.hidden=[16]"),
                *(
                    "loop.steps=12",
                    "loop.log_every=12",
                    "loop.eval_episodes=1",
                    f"out={tmp_path / 'run'}",
                    *QUIET,
                ),
            ]
        )
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("loss/") and value == value for line in lines for key, value in line.items())
    policy = load_policy(run)
    assert policy.registry_name == "flow_vla"
    assert policy.frozen_steps == (1 if "algo.finetune_steps=2" in words else 0)


def test_policies_that_work_on_the_host_are_not_captured(monkeypatch, store, tmp_path):
    from robopost.policies.flow_vla import FlowVLA

    words = ["algo=bc", "algo.batch_size=4", *VLA, f"data.path={store}", "env=null", "loop.steps=1", *QUIET]
    monkeypatch.setattr(FlowVLA, "capturable", False)
    with pytest.raises(ConfigError, match=r"accel.mode=compile: policy=flow_vla works on the host"):
        train(compose([*words, "accel.mode=compile", f"out={tmp_path / 'run'}"]))
