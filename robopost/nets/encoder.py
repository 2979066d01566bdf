# SPDX-License-Identifier: Apache-2.0
"""Observation encoders: float keys as they are, images through a small CNN, instructions as hashed words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robopost.config import PolicyConfig
from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError

INSTRUCTION = "instruction"
BUCKETS = 4096  # hashed vocabulary: 100 distinct words collide with probability about 0.7


@dataclass
class EncodedConfig(PolicyConfig):
    """Config of a policy that reads its observations through `ObsEncoder`."""

    image_features: int = 64  # features per image key
    image_shift: int = 4  # random shift in pixels when training on images, 0 = none
    instruction_features: int = 32


class ObsEncoder(nn.Module):
    """Observation dict to one vector (B, out_dim); the observation history is flattened into it.

    Float keys are concatenated as they are, so that a state-only policy has no encoder parameters at all.

    Args:
        spec: shapes of the keys.
        keys: the keys to use, in this order.
        history: number of stacked observations h; with h > 1 every key has shape (B, h, ...).
        config: sizes of the image and instruction features.

    Raises:
        ConfigError: a key that is neither float, image (H, W, C) nor instruction.
    """

    def __init__(self, spec: Spec, keys: Sequence[str], history: int, config: EncodedConfig) -> None:
        super().__init__()
        self.history = history
        self.shift = config.image_shift
        self.float_keys = [key for key in keys if spec.obs[key][1].startswith("float")]
        self.image_keys = [key for key in keys if spec.obs[key][1] == "uint8" and len(spec.obs[key][0]) == 3]
        self.instructed = INSTRUCTION in keys
        for key in keys:
            if key not in (*self.float_keys, *self.image_keys, INSTRUCTION):
                shape, dtype = spec.obs[key]
                raise ConfigError(
                    f"observation key {key!r} is {dtype} {shape}: "
                    "expected float, a uint8 image (H, W, C) or 'instruction'"
                )
        size = sum(torch.Size(spec.obs[key][0]).numel() for key in self.float_keys) * history
        self.images = nn.ModuleDict()
        for key in self.image_keys:
            self.images[key] = ImageEncoder(spec.obs[key][0], config.image_features)
            size += config.image_features * history
        if self.instructed:
            self.instruction = InstructionEncoder(config.instruction_features)
            size += config.instruction_features
        if size == 0:
            raise ConfigError("policy.obs_keys selects nothing to observe")
        self.out_dim = size

    def forward(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Encode normalised observations.

        Args:
            obs: key -> (B, ...) or (B, h, ...).
            augment: shift images at random with this generator; None = leave them.
        """
        parts = [obs[key].flatten(1) for key in self.float_keys]
        for key in self.image_keys:
            image = obs[key]
            frames = image.unsqueeze(1) if self.history == 1 else image
            if augment is not None and self.shift > 0:
                frames = random_shift(frames, self.shift, augment)
            parts.append(self.images[key](frames.flatten(0, 1)).view(len(frames), -1))
        if self.instructed:
            text = obs[INSTRUCTION]
            parts.append(self.instruction(text if text.dim() == 2 else text[:, -1]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class ImageEncoder(nn.Module):
    """Four strided convolutions, spatial softmax and a linear layer: (B, H, W, C) uint8 to (B, features)."""

    def __init__(self, shape: Sequence[int], features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = shape[-1]
        for width, stride in ((32, 2), (32, 2), (64, 2), (64, 1)):
            layers += [nn.Conv2d(size, width, 3, stride, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            size = width
        self.net = nn.Sequential(*layers)
        self.pool = SpatialSoftmax()
        self.out = nn.Sequential(nn.Linear(2 * size, features), nn.LayerNorm(features))

    def forward(self, image: Tensor) -> Tensor:
        """Encode images."""
        x = image.movedim(-1, 1).float() / 127.5 - 1
        return self.out(self.pool(self.net(x)))


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of each channel's softmax: (B, C, H, W) to (B, 2 C) in [-1, 1], x then y.

    Levine et al. 2016, End-to-End Training of Deep Visuomotor Policies, section 5.1.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the feature points."""
        height, width = x.shape[-2:]
        weight = x.flatten(2).softmax(-1).view_as(x)
        along_x = torch.linspace(-1, 1, width, device=x.device, dtype=x.dtype)
        along_y = torch.linspace(-1, 1, height, device=x.device, dtype=x.dtype)
        return torch.cat([(weight.sum(2) * along_x).sum(-1), (weight.sum(3) * along_y).sum(-1)], dim=-1)


def random_shift(frames: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each sample by up to `pixels` in x and y, repeating the border; all frames of a sample alike.

    Kostrikov et al. 2021, Image Augmentation Is All You Need (DrQ), section 3.1.

    Args:
        frames: (B, h, H, W, C).
        pixels: largest shift.
        generator: on the device of `frames`.
    """
    batch, _, height, width, _ = frames.shape
    offset = torch.randint(-pixels, pixels + 1, (2, batch, 1), generator=generator, device=frames.device)
    rows = (torch.arange(height, device=frames.device) + offset[0]).clamp(0, height - 1)
    cols = (torch.arange(width, device=frames.device) + offset[1]).clamp(0, width - 1)
    index = torch.arange(batch, device=frames.device)[:, None, None]
    return frames.movedim(1, 3)[index, rows[:, :, None], cols[:, None, :]].movedim(3, 1)


class InstructionEncoder(nn.Module):
    """UTF-8 bytes (B, 64), zero-padded, to (B, features): hashed word embeddings, position aware, averaged.

    Words are split at spaces and lower-cased (ASCII). Each hashes into one of 4096 learned vectors; the
    position enters before a nonlinearity, so that "red to blue" and "blue to red" differ.
    """

    def __init__(self, features: int, length: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(BUCKETS, features)
        self.position = nn.Embedding(length, features)
        self.net = nn.Sequential(
            nn.Linear(features, 2 * features), nn.ReLU(), nn.Linear(2 * features, features)
        )
        # Fixed odd multipliers, one per position in a word: part of the hash, so never random.
        factors = torch.tensor([pow(31, i, 2**31 - 1) for i in range(length)], dtype=torch.long)
        self.register_buffer("factors", factors, persistent=False)
        self.factors: Tensor

    def word_ids(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Bucket of each word (B, 64) and which of the 64 slots hold a word (B, 64) bool."""
        text = text.long()
        text = torch.where((text >= 65) & (text <= 90), text + 32, text)
        letter = (text != 0) & (text != 32)
        index = torch.arange(text.shape[1], device=text.device).expand_as(text)
        start = letter & ~torch.nn.functional.pad(letter, (1, 0))[:, :-1]
        word = (start.long().cumsum(1) - 1).clamp_min(0)
        begin = torch.where(start, index, torch.zeros_like(index)).cummax(1).values
        value = torch.where(letter, text * self.factors[index - begin], torch.zeros_like(text))
        total = torch.zeros_like(text).scatter_add_(1, word, value)
        present = index < start.sum(1, keepdim=True)
        return (total % (2**31 - 1)) % BUCKETS, present

    def forward(self, text: Tensor) -> Tensor:
        """Encode instructions; an empty one gives zeros."""
        ids, present = self.word_ids(text)
        out = self.net(self.words(ids) + self.position.weight) * present.unsqueeze(-1)
        return out.sum(1) / present.sum(1, keepdim=True).clamp_min(1)
