# SPDX-License-Identifier: Apache-2.0
"""A tiny token VLA and observations for it."""

import torch

from robopost.data.batch import Spec
from robopost.nets.vla.language import LanguageConfig
from robopost.nets.vla.prompts import to_bytes
from robopost.nets.vla.towers import TowerConfig
from robopost.policies.token_vla import TokenVLA
from robopost.policies.token_vla_config import TokenVLAConfig

SPEC = Spec(
    {"image": ((16, 16, 3), "uint8"), "state": ((5,), "float32"), "instruction": ((64,), "uint8")},
    2,
    (-1.0, -1.0),
    (1.0, 1.0),
)
TEXTS = ("touch the red cube", "lift the blue cube", "put the red cube in the cyan zone")


def tower(**changes):
    return TowerConfig(**{"width": 16, "layers": 1, "heads": 2, "mlp": 16, "patch": 8} | changes)


def make(seed=0, spec=SPEC, **changes):
    torch.manual_seed(seed)
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp": 24}
    settings = {"horizon": 2, "siglip": tower(), "language": LanguageConfig(**sizes), "prompt_length": 9}
    policy = TokenVLA(TokenVLAConfig(**settings | changes), spec)
    with torch.no_grad():  # larger than usual, so that every input shows in every output
        for parameter in policy.language.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return policy


def observe(rows=3, seed=0, texts=TEXTS):
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (rows, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "state": torch.randn(rows, 5, generator=draw),
        "instruction": torch.stack([to_bytes(texts[i % len(texts)]) for i in range(rows)]),
    }


def some_tokens(policy, rows=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, policy.bins, (rows, policy.horizon, policy.spec.action_dim), generator=draw)
