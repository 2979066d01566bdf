# SPDX-License-Identifier: Apache-2.0
"""What the tests of the flow VLA share: a tiny model, observations, transformers' inputs for the same."""

import torch
from torch.nn import functional as F

from robopost.data.batch import Spec
from robopost.nets.vla.pixels import square_pixels
from robopost.nets.vla.prompts import to_bytes
from robopost.policies.flow_vla import FlowVLA, FlowVLAConfig

BOX = ((-1.0,) * 3, (1.0,) * 3)
SPEC = Spec(
    {"image": ((24, 32, 3), "uint8"), "state": ((5,), "float32"), "instruction": ((64,), "uint8")}, 3, *BOX
)
TEXTS = ("lift the red cube", "put the green cube in the yellow zone", "touch the blue cube", "open the box")
TINY = {
    "horizon": 4,
    "image_size": 16,
    "vision_width": 16,
    "vision_layers": 1,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "expert_width": 24,
    "text_tokens": 300,
    "prompt_length": 40,
    "image_shift": 0,
}


def make(spec=SPEC, seed=0, **options) -> FlowVLA:
    torch.manual_seed(seed)
    return FlowVLA(FlowVLAConfig(**(TINY | options)), spec)


def observe(batch=4, seed=3):
    g = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (batch, 24, 32, 3), generator=g).to(torch.uint8),
        "state": torch.randn(batch, 5, generator=g),
        "instruction": torch.stack([to_bytes(TEXTS[i % 4]) for i in range(batch)]),
    }


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def released_inputs(policy, obs):
    """The same observations as pi0 of transformers takes them: image tokens, then the prompt padded on the RIGHT."""
    encoder = policy.encoder
    vlm = policy.encoder.vlm.config
    prompts = [
        encoder.prompts.encode(bytes(row.tolist()).rstrip(b"\0").decode()) for row in obs["instruction"]
    ]
    images = (encoder.size // vlm.vision_config.patch_size) ** 2
    ids = torch.zeros(len(prompts), images + max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    ids[:, :images], mask[:, :images] = vlm.image_token_id, 1
    for row, prompt in enumerate(prompts):
        ids[row, images : images + len(prompt)] = torch.tensor(prompt)
        mask[row, images : images + len(prompt)] = 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": square_pixels(obs["image"], encoder.size)[:, None],
        "pixel_attention_mask": torch.ones(len(ids), 1, dtype=torch.bool),
        "state": F.pad(obs["state"], (0, policy.net.layout.state - 5)),
    }
