# SPDX-License-Identifier: Apache-2.0
"""Image towers of vision-language-action models: SigLIP, optionally with DINOv2 beside it, and the projector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.errors import ConfigError, require

SIGLIP_RANGE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_RANGE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class TowerConfig:
    """One image tower."""

    width: int = 128
    layers: int = 3  # that run; 0 = no such tower
    heads: int = 4
    mlp: int = 256  # hidden units
    patch: int = 16  # pixels
    activation: str = "gelu_pytorch_tanh"  # or gelu, any of transformers
    registers: int = 0  # register tokens (DINOv2 only)
    norm: bool = True  # a LayerNorm behind the last layer; OpenVLA has none

    def check(self, name: str, size: int) -> None:
        """Raise ConfigError where a tower of these numbers can't look at images of `size` pixels."""
        if min(self.width, self.heads, self.mlp, self.patch) < 1 or self.layers < 0 or self.registers < 0:
            raise ConfigError(f"{name}: width, heads, mlp and patch must be at least 1, the rest 0 or more")
        if self.width % self.heads:
            raise ConfigError(f"{name}.width={self.width} must be a multiple of {name}.heads={self.heads}")
        if size < self.patch or size % self.patch:
            raise ConfigError(
                f"images are {size} pixels wide, which {name}.patch={self.patch} doesn't divide. "
                "Fix: policy.image_size=<a multiple of the patch>"
            )

    def patches(self, size: int) -> int:
        """Tokens per image."""
        return (size // self.patch) ** 2


@dataclass
class DinoConfig(TowerConfig):
    """The DINOv2 tower beside SigLIP's: none by default."""

    layers: int = 0  # that run; 0 = no such tower
    activation: str = "gelu"


class Tower(nn.Module):
    """A vision transformer of transformers over images (N, H, W, 3) uint8: (N, patches, width).

    Images are resized (bicubic, antialiased) to the tower's size where they differ, and standardised.

    Args:
        kind: `siglip` or `dino` (DINOv2, with register tokens where the config has some).
        config: sizes.
        size: pixels of the square images it works on.
        dtype: of its weights.
    """

    def __init__(self, kind: str, config: TowerConfig, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        config.check(f"policy.{kind}", size)
        self.size = size
        self.skip = 0  # leading tokens that are no patches
        common = {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "image_size": size,
            "patch_size": config.patch,
            "hidden_act": config.activation,
        }
        build = {"dtype": dtype, "attn_implementation": "sdpa"}
        transformers: Any = require("transformers", "vla")
        if kind == "siglip":
            settings = transformers.SiglipVisionConfig(
                **common, intermediate_size=config.mlp, vision_use_head=False
            )
            self.model = transformers.SiglipVisionModel._from_config(settings, **build)
            if not config.norm:
                self.model.post_layernorm = nn.Identity()
        else:
            if config.mlp % config.width:
                raise ConfigError(
                    f"policy.dino.mlp={config.mlp} must be a multiple of policy.dino.width={config.width}"
                )
            common |= {"mlp_ratio": config.mlp // config.width}
            self.skip = 1 + config.registers
            if config.registers:
                settings = transformers.Dinov2WithRegistersConfig(
                    **common, num_register_tokens=config.registers
                )
                self.model = transformers.Dinov2WithRegistersModel._from_config(settings, **build)
                self.model.embeddings.mask_token = None  # of pre-training
            else:
                settings = transformers.Dinov2Config(**common, use_mask_token=False)
                self.model = transformers.Dinov2Model._from_config(settings, **build)
            if not config.norm:
                self.model.layernorm = nn.Identity()
        mean, std = (torch.tensor(v) for v in (SIGLIP_RANGE if kind == "siglip" else IMAGENET_RANGE))
        self.register_buffer("gain", 1 / (255 * std), persistent=False)
        self.register_buffer("offset", -mean / std, persistent=False)
        self.gain: Tensor
        self.offset: Tensor

    def stack(self) -> list[nn.Module]:
        """Its transformer layers."""
        return list(next(module for module in self.model.modules() if isinstance(module, nn.ModuleList)))

    def pixels(self, images: Tensor) -> Tensor:
        """Images (N, H, W, 3) uint8 as the tower's input (N, 3, size, size) float32."""
        out = torch.addcmul(self.offset, images.float(), self.gain).movedim(-1, 1)
        if out.shape[-2:] != (self.size, self.size):
            out = nn.functional.interpolate(out, (self.size, self.size), mode="bicubic", antialias=True)
            # Bicubic weights overshoot at edges; 8-bit images end at black and white.
            low, high = self.offset.view(3, 1, 1), (self.offset + 255 * self.gain).view(3, 1, 1)
            out = out.clamp(low, high)
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Features of the patches."""
        model: Any = self.model
        out = model(pixel_values=self.pixels(images).to(model.dtype)).last_hidden_state
        return out[:, self.skip :] if self.skip else out


class Vision(nn.Module):
    """One tower, or two whose features lie side by side (DINOv2 first, as in OpenVLA).

    Raises:
        ConfigError: no tower, or towers that cut an image into different numbers of patches.
    """

    def __init__(self, siglip: TowerConfig, dino: TowerConfig, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        chosen = {"dino": dino, "siglip": siglip}
        chosen = {kind: config for kind, config in chosen.items() if config.layers}
        if not chosen:
            raise ConfigError(
                "policy.siglip.layers and policy.dino.layers are both 0: nothing sees the images"
            )
        counts = {kind: config.patches(size) for kind, config in chosen.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(f"both image towers need the same number of patches, they have {counts}")
        self.towers = nn.ModuleDict({k: Tower(k, config, size, dtype) for k, config in chosen.items()})
        self.patches = next(iter(counts.values()))
        self.width = sum(config.width for config in chosen.values())

    def forward(self, images: Sequence[Tensor]) -> Tensor:
        """Features (B, n patches, width) of n images (B, H, W, 3) uint8 per sample."""
        parts = [
            torch.cat([tower(image) for tower in self.towers.values()], dim=-1)
            if len(self.towers) > 1
            else next(iter(self.towers.values()))(image)
            for image in images
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def checkpoint(self) -> None:
        """Keep only the inputs of layers in training and compute the rest again on the way back."""
        for tower in self.towers.values():
            model: Any = tower.model
            # Renamed in transformers 5.2x.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})


class Projector(nn.Module):
    """Image features to the language model's width: OpenVLA's MLP for one tower (2 layers) or two (3 layers)."""

    def __init__(self, features: int, width: int, *, fused: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features if fused else width)
        self.fc2 = nn.Linear(4 * features if fused else width, width)
        self.fc3 = nn.Linear(width, width) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        """(..., features) to (..., width)."""
        x = self.fc2(nn.functional.gelu(self.fc1(features.to(self.fc1.weight.dtype))))
        return x if self.fc3 is None else self.fc3(nn.functional.gelu(x))
