# SPDX-License-Identifier: Apache-2.0
"""The small vision-language backbone of the VLA studies, made once and kept under data/vla.

Real VLAs begin with a backbone that has seen images and text before; none is at hand that runs on a CPU. Ours (1.3M
parameters) learns what such backbones bring along, from recorded frames with the simulator's poses:

- grounding: a linear head on the image tower says for every patch which cubes and zones lie in it, and where;
- pointing: given an instruction, the first slots name the positions of the cube and the zone it speaks of, in the
  robot's coordinates and relative to the fingertips.

No action is learnt here. Both heads' targets are positions, so that what a policy does with them is left to it.
"""

import json
import math
from pathlib import Path

import mujoco
import numpy as np
import torch
from robopost_envs.arms.env import ASSETS
from robopost_envs.arms.instructions import BYTES, INSTRUCTIONS, KIND, OBJECT, PUT, ZONE
from robopost_envs.arms.tasks import CENTRE, SCALE
from torch import nn
from torch.nn import functional as F

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.compose import compose
from robopost.config import DataConfig
from robopost.data.dataset import Dataset
from robopost.nets.flat import Flat, adam, set_lr
from robopost.policies.base import build_policy
from robopost.vector import make_vec

CUBES, ZONES, ARM = slice(10, 19), slice(34, 42), 10  # columns of the full state; the arm's own come first
HELD_BACK = 2000  # last frames, for the errors that are reported
SPREAD = 2.0  # bins, of a pointing target
REACH = 0.3  # m, what a pointing slot's [-1, 1] spans on each side
POLICY = {
    "policy": "token_vla",
    "policy.proprio": "[0,10]",
    "policy.horizon": 5,
    "policy.image_shift": 0,
    "policy.freeze_vision": "true",
    "policy.siglip.width": 128,
    "policy.siglip.layers": 2,
    "policy.siglip.mlp": 512,
    "policy.siglip.patch": 16,
    "policy.language.width": 128,
    "policy.language.layers": 4,
}


def make_backbone(frames: Path, env: list[str], folder: Path, *, ground_steps: int, point_steps: int) -> dict:
    """Train it on the recorded `frames` and write it to `folder` as a policy; returns errors on frames held back."""
    config = compose([*env, *(f"{key}={value}" for key, value in POLICY.items()), "algo=bc"])
    vec = make_vec(config.env, 1)
    spec = vec.spec
    vec.close()
    torch.manual_seed(0)
    policy = build_policy(config.policy, spec)
    data = Dataset.load(DataConfig(path=str(frames)), device=torch.device("cpu"))
    policy.normaliser.fit(data.stats, obs="meanstd", action="bounds", source=data.dataset_id)
    policy.train()
    errors = ground(policy, data, ground_steps) | point(policy, data, point_steps)
    save_folder(folder, policy_files(policy) | {"errors.json": errors})
    return errors


def backbone_errors(folder: Path) -> dict:
    """What `make_backbone` measured."""
    return json.loads((folder / "errors.json").read_text())


def positions(state: torch.Tensor) -> torch.Tensor:
    """(N, 7, 3) metres of three cubes and four zones."""
    cubes = state[:, CUBES].unflatten(1, (3, 3))
    zones = F.pad(state[:, ZONES].unflatten(1, (4, 2)), (0, 1), value=-float(CENTRE[2]) * SCALE)
    return torch.cat([cubes, zones], dim=1) / SCALE + torch.as_tensor(CENTRE, dtype=torch.float32)


def pixels(points: torch.Tensor, size: int) -> torch.Tensor:
    """(N, 7, 2) column and row of `points` (N, 7, 3) in the front camera's image."""
    model = mujoco.MjModel.from_xml_path(str(ASSETS / "language.xml"))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    camera = model.camera("front").id
    seen = (points.double().numpy() - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)
    focal = size / 2 / math.tan(math.radians(model.cam_fovy[camera]) / 2)
    image = size / 2 + focal * np.stack([seen[..., 0], -seen[..., 1]], -1) / -seen[..., 2:]
    return torch.from_numpy(image).float().clamp(0, size - 0.1)


def rate(step: int, steps: int, top: float) -> float:
    """Warm-up over 100 steps, then a cosine to 0."""
    return top * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def ground(policy, data, steps: int, batch: int = 64) -> dict[str, float]:
    """Train the tower to say where things are in the image; median error in pixels on frames held back."""
    images = data.obs["image"]
    size, patch = images.shape[1], policy.config.siglip.patch
    side = size // patch
    where = pixels(positions(data.obs["state"]), size)
    cell = (where // patch).long()
    index, offset = cell[..., 1] * side + cell[..., 0], where / patch - cell - 0.5
    policy.vision.requires_grad_(True)
    head = nn.Linear(policy.vision.width, 7 * 3)
    flat = Flat(policy.vision, head)
    optimizer = adam(flat, 2e-3, weight_decay=0.01, decoupled_weight_decay=True, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    known = len(images) - HELD_BACK

    def heads(rows):
        return head(policy.vision([images[rows]])).unflatten(-1, (7, 3)).transpose(1, 2)  # (B, 7, patches, 3)

    for step in range(steps):
        rows = torch.randint(0, known, (batch,), generator=generator)
        out = heads(rows)
        at = index[rows]
        found = out.gather(2, at[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)
        loss = F.cross_entropy(out[..., 0].flatten(0, 1), at.flatten())
        flat.backward(loss + 4 * (found[..., 1:] - offset[rows]).square().mean())
        flat.clip(1.0)
        set_lr(optimizer, rate(step, steps, 2e-3))
        optimizer.step()
    errors = []
    with torch.no_grad():
        for rows in torch.arange(known, len(images)).split(250):
            out = heads(rows)
            best = out[..., 0].argmax(-1)
            move = out.gather(2, best[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)[..., 1:]
            guess = (torch.stack([best % side, best // side], -1) + 0.5 + move) * patch
            errors.append((guess - where[rows]).norm(dim=-1))
    policy.vision.requires_grad_(False)
    error = torch.cat(errors)
    return {"cube_px": float(error[:, :3].median()), "zone_px": float(error[:, 3:].median())}


def point(policy, data, steps: int, batch: int = 64) -> dict[str, float]:
    """Train the language model to name positions; median error in cm on frames held back."""
    images, state = data.obs["image"], data.obs["state"]
    with torch.no_grad():
        features = torch.cat([policy.vision_features({"image": rows}).half() for rows in images.split(256)])
    places = positions(state)
    tips = state[:, :3] / SCALE + torch.as_tensor(CENTRE, dtype=torch.float32)
    texts, kinds = torch.from_numpy(BYTES), torch.from_numpy(KIND)
    cubes, zones = torch.from_numpy(OBJECT), torch.from_numpy(ZONE) + 3
    centre = torch.as_tensor(CENTRE, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    known = len(images) - HELD_BACK

    def asked(rows):
        """Logits of four slots of four, their targets and which of them count."""
        number = torch.randint(0, len(INSTRUCTIONS), (len(rows),), generator=generator)
        cube, zone = places[rows, cubes[number]], places[rows, zones[number]]
        target = torch.stack([cube - centre, zone - centre, cube - tips[rows], zone - tips[rows]], dim=1)
        counts = torch.ones_like(target, dtype=torch.bool)
        counts[:, [1, 3], 2] = False  # zones lie on the table
        counts[:, [1, 3]] &= (kinds[number] == PUT)[:, None, None]
        obs = policy.normaliser.obs(
            {"state": state[rows], "image": images[rows], "instruction": texts[number]}
        )
        logits = policy.logits_from(features[rows].float(), obs)[:, :4, :3]
        return logits, (target / REACH).clamp(-1, 1), counts

    flat = Flat(policy)
    optimizer = adam(flat, 2e-3, weight_decay=0.01, decoupled_weight_decay=True, betas=(0.9, 0.95))
    width = SPREAD * (policy.edges[1] - policy.edges[0])
    for step in range(steps):
        logits, target, counts = asked(torch.randint(0, known, (batch,), generator=generator))
        soft = (-0.5 * ((policy.centres - target.unsqueeze(-1)) / width).square()).softmax(-1)
        flat.backward(-(soft * logits.log_softmax(-1)).sum(-1)[counts].mean())
        flat.clip(1.0)
        set_lr(optimizer, rate(step, steps, 2e-3))
        optimizer.step()
    with torch.no_grad():
        parts = [asked(rows) for rows in torch.arange(known, len(images)).split(250)]
    logits, target, counts = (torch.cat(items) for items in zip(*parts, strict=True))
    error = ((logits.softmax(-1) * policy.centres).sum(-1) - target).abs() * REACH * 100
    return {
        f"{name}_cm": float(error[:, slot][counts[:, slot]].median())
        for slot, name in ((0, "cube"), (1, "zone"), (2, "cube_from_tips"), (3, "zone_from_tips"))
    }


def load_backbone(folder: Path):
    """The backbone as a policy."""
    return load_policy(folder)
