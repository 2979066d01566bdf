# SPDX-License-Identifier: Apache-2.0
"""What the tests of policy=lerobot share: observations, a tiny policy here and as lerobot loads it."""

import tiny
import torch
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedConfig

from robopost.data.batch import Spec
from robopost.nets.vla.prompts import to_bytes
from robopost.policies.lerobot import LeRobotConfig, LeRobotPolicy, lerobot

SPEC = Spec(
    {"image": ((32, 32, 3), "uint8"), "state": ((6,), "float32"), "instruction": ((64,), "uint8")},
    4,
    (-5.0,) * 4,
    (5.0,) * 4,
)
TEXTS = (*tiny.TEXTS, "open it")


def observe(batch=4, history=0, seed=3):
    g = torch.Generator().manual_seed(seed)
    lead = (batch, history) if history else (batch,)
    return {
        "image": torch.randint(0, 256, (*lead, 32, 32, 3), generator=g).to(torch.uint8),
        "state": torch.randn(*lead, 6, generator=g),
        "instruction": torch.stack([to_bytes(TEXTS[i % 4]) for i in range(batch)]),
    }


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, tmp_path, config=None, **options):
    folder = tmp_path / kind
    if not folder.exists():
        getattr(tiny, kind)(folder, **options)
    return lerobot(LeRobotConfig(path=str(folder), **(config or {})), SPEC)


def theirs(folder):
    """The policy and its processors as lerobot loads them."""
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, str(folder))


def frames(obs):
    """One observation per call as lerobot's datasets give it."""
    return {
        "observation.image": obs["image"].permute(0, 3, 1, 2).float() / 255,
        "observation.state": obs["state"],
        "task": [bytes(row.tolist()).rstrip(b"\0").decode() for row in obs["instruction"]],
    }


def parts(policy):
    return policy.parts if isinstance(policy, LeRobotPolicy) else policy.encoder.parts
