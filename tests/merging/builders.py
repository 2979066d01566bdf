# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints that the tests of merging share."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from robopost.artefacts.checkpoint import policy_files, save_folder
from robopost.data.batch import Spec
from robopost.policies.flow import Flow, FlowConfig

SPEC = Spec(
    {"state": ((5,), "float32"), "image": ((32, 32, 3), "uint8"), "instruction": ((64,), "uint8")},
    3,
    (-1.0,) * 3,
    (1.0,) * 3,
    50,
)
EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def make_policy(folder, seed, **options):
    torch.manual_seed(seed)
    policy = Flow(FlowConfig(horizon=4, width=16, depth=1, steps=2, **options), SPEC)
    save_folder(folder, policy_files(policy))
    return str(folder)


def vla(seed, dtype=torch.float32):
    """A small state dict with the names of OpenVLA-OFT."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "vision_backbone.featurizer.patch_embed.weight": (8, 3, 4, 4),
        "projector.fc1.weight": (16, 8),
        "projector.fc1.bias": (16,),
        EMBED: (40, 16),
        "language_model.model.layers.0.mlp.weight": (16, 16),
        HEAD: (40, 16),
        "action_head.fc.weight": (7, 16),
        "action_head.scale": (),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_hf(folder, tensors, shards=1, **extra):
    """A folder as transformers writes it."""
    folder.mkdir()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            part = {name: tensors[name] for name in names[i::shards]}
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "torch_dtype": "float32"}))
    for name, text in extra.items():
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


def read_hf(folder):
    """All tensors, through the safetensors library."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
