# SPDX-License-Identifier: Apache-2.0
"""pi0 out of the parts of transformers: a PaliGemma that reads images and instruction, and a Gemma that acts.

The parts come from `PI0ForConditionalGeneration` and keep its names: `vlm.*` in `PrefixEncoder`, `dit.*`,
`embed_action_time.*` and `action_out_proj.*` in `ActionExpert`. Masks and the passes through the layers are ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs
from robopost.errors import CheckpointError, ConfigError, require
from robopost.nets.encoder import INSTRUCTION, random_shift
from robopost.nets.vla.pixels import square_pixels
from robopost.nets.vla.prefix import PrefixLayout, run_layers
from robopost.nets.vla.prompts import Prompts

NEEDED = "5.4"  # the first transformers that has pi0
PAD_SEED = 20241031  # of the constant noise in padded action dimensions


def transformers_pi0() -> Any:
    """The transformers package.

    Raises:
        MissingExtraError: it isn't there.
        ConfigError: it has no pi0.
    """
    transformers = require("transformers", "vla")
    if not hasattr(transformers, "PI0ForConditionalGeneration"):
        raise ConfigError(
            f"policy=flow_vla needs transformers >= {NEEDED}, here is {transformers.__version__}. "
            "Fix: pip install 'robopost[vla]', or policy=lerobot for a SmolVLA"
        )
    return transformers


def tiny_arch(
    *,
    image_size: int,
    patch: int,
    vision_width: int,
    vision_layers: int,
    width: int,
    layers: int,
    expert_width: int,
    heads: int,
    vocab: int,
    state_dim: int,
    action_dim: int,
    horizon: int,
) -> str:
    """JSON of a `PI0Config` with these sizes; MLPs are four times as wide, a head has width / heads numbers."""
    decoder = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1}
    decoder |= {"head_dim": width // heads, "vocab_size": vocab, "max_position_embeddings": 4096}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": vision_width,
        "intermediate_size": 4 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch,
        "vision_use_head": False,
    }
    text = {"model_type": "gemma", "hidden_size": width, "intermediate_size": 4 * width, **decoder}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    expert = {
        "model_type": "gemma",
        "hidden_size": expert_width,
        "intermediate_size": 4 * expert_width,
        **decoder,
    }
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": width}
    arch = {
        "vlm_config": vlm | {"image_token_id": vocab},
        "dit_config": expert | {"pad_token_id": 0},
        "chunk_size": horizon,
        "max_state_dim": state_dim,
        "max_action_dim": action_dim,
    }
    return json.dumps(arch, sort_keys=True)


def build_pi0(arch: str, dtype: torch.dtype) -> Any:
    """A `PI0ForConditionalGeneration` of the config `arch` (JSON), with random weights from torch's generator.

    Raises:
        ConfigError: transformers rejects the config.
    """
    transformers = transformers_pi0()
    try:
        config = transformers.PI0Config.from_dict(json.loads(arch))
        model = transformers.PI0ForConditionalGeneration(config)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"policy.arch is no config of pi0: {_first_line(error)}") from error
    for (
        parameter
    ) in model.parameters():  # not the buffers: frequencies of times and positions stay in float32
        parameter.data = parameter.data.to(dtype)
    return model


def load_pi0(path: str, dtype: torch.dtype) -> tuple[Any, str]:
    """The model in a local folder or on the hub, and its config as JSON.

    Raises:
        CheckpointError: nothing there, weights missing, or of another shape.
    """
    transformers = transformers_pi0()
    try:
        model, info = transformers.PI0ForConditionalGeneration.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"no pi0 at policy.path={path}: {_first_line(error)}. "
            "Fix: a folder with config.json and model.safetensors, or a hub id (and a network)"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if "dit.embed_tokens" not in key)
    if missing:
        raise CheckpointError(f"policy.path={path} lacks {missing[0]!r} and {len(missing) - 1} more weights")
    return model, json.dumps(model.config.to_dict(), sort_keys=True, default=str)


class PrefixEncoder(nn.Module):
    """Images and instruction to the packed prefix (B, out_dim); the state goes along untouched.

    Tokens: the patches of each camera in order of the keys, then the beginning token and the prompt. All of them see
    each other, padding is seen by none.

    Args:
        vlm: the model's `PaliGemmaModel`.
        prompts: from instructions to ids; None where none are observed.
        images: keys of cameras.
        floats: keys of vectors with the columns that are read; together they are the state.
        state_dim: size of the state the expert takes, zero-padded.
        shift: pixels of random shift when training, 0 = none.
        recompute: see `run_layers`.
    """

    def __init__(
        self,
        vlm: Any,
        prompts: Prompts | None,
        images: Sequence[str],
        floats: dict[str, slice],
        state_dim: int,
        *,
        shift: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.prompts = prompts
        self.images, self.floats = list(images), dict(floats)
        self.shift, self.recompute = shift, recompute
        vision, text = vlm.config.vision_config, vlm.config.text_config
        self.size = int(vision.image_size)
        words = prompts.length + 1 if prompts is not None else 0
        self.layout = PrefixLayout(
            layers=text.num_hidden_layers,
            heads=text.num_key_value_heads,
            length=len(self.images) * (self.size // vision.patch_size) ** 2 + words,
            head=text.head_dim,
            state=state_dim,
            summary=text.hidden_size,
        )

    @property
    def out_dim(self) -> int:
        """Size of a packed prefix."""
        return self.layout.size

    def tokens(self, obs: Obs, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (B, P, D) of the prefix and which are no padding (B, P) bool."""
        dtype = self.vlm.dtype
        parts, valid = [], []
        for key in self.images:
            image = obs[key]
            if augment is not None and self.shift > 0:
                image = random_shift(image.unsqueeze(1), self.shift, augment).squeeze(1)
            pixels = square_pixels(image, self.size).to(dtype)
            parts.append(self.vlm.get_image_features(pixels).pooler_output)
            valid.append(torch.ones(parts[-1].shape[:2], dtype=torch.bool, device=image.device))
        if self.prompts is not None:
            ids, words = self.prompts(obs[INSTRUCTION])
            ids = torch.nn.functional.pad(ids, (1, 0), value=self.prompts.begin)
            parts.append(self.vlm.get_input_embeddings()(ids))
            valid.append(torch.nn.functional.pad(words, (1, 0), value=True))
        return torch.cat(parts, dim=1).to(dtype), torch.cat(valid, dim=1)

    def forward(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Encode normalised observations; images are shifted at random with `augment`."""
        x, valid = self.tokens(obs, augment)
        hidden, pairs = run_layers(
            self.vlm.language_model,
            x,
            valid[:, None, None],
            token_positions(valid),
            recompute=self.recompute and self.training,
        )
        state = [obs[key].flatten(1)[:, columns] for key, columns in self.floats.items()]
        rows = torch.cat(state, dim=1) if state else x.new_zeros(len(x), 0)
        rows = torch.nn.functional.pad(rows, (0, self.layout.state - rows.shape[1]))
        return self.layout.pack(pairs, valid, rows, hidden)


class ActionExpert(nn.Module):
    """Velocity of a noisy chunk: tokens [state | action 1 .. H], the prefix before them.

    The state sees the prefix and itself; actions see everything, each other in both directions. Time runs as in our
    flows, from noise (0) to actions (1): pi0's is 1 - t, and its velocity the negative of ours.

    Args:
        model: `PI0ForConditionalGeneration`, whose parts it takes.
        layout: of the packed prefix.
        horizon: H.
        action_dim: A, the first of the model's action dimensions; the others carry no gradient.
        pad_noise: whether the others hold, at time t, (1 - t) times a constant draw of noise: what a model that was
            trained with noise in all dimensions knows. False: zeros.
        recompute: see `run_layers`.
    """

    padding: Tensor

    def __init__(
        self,
        model: Any,
        layout: PrefixLayout,
        horizon: int,
        action_dim: int,
        *,
        pad_noise: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.dit = model.model.dit
        self.dit.embed_tokens = None  # never used: actions are no words
        self.embed_action_time = model.embed_action_time
        self.action_out_proj = model.action_out_proj
        self.layout, self.action_dim, self.recompute = layout, action_dim, recompute
        generator = torch.Generator().manual_seed(PAD_SEED)
        shape = horizon, int(model.config.max_action_dim) - action_dim
        draw = torch.randn(shape, generator=generator) if pad_noise else torch.zeros(shape)
        self.register_buffer("padding", draw, persistent=False)

    def time(self, t: Tensor) -> Tensor:
        """Embedding (B, T) of times `t` (B,)."""
        return self.embed_action_time.sinusoid_embeds(1 - t)

    def forward(self, x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, H, A) in float32 at `x` (B, H, A) and time `t` (B,), given the packed prefix `cond` (B, D)."""
        dtype, head = self.dit.dtype, self.action_out_proj.weight.dtype
        pairs, valid, state, _ = self.layout.unpack(cond.to(dtype))
        late = 1 - t
        rest = late[:, None, None] * self.padding
        chunk = torch.cat([x, rest], dim=-1).to(head)
        embedded = self.embed_action_time(state.to(head), chunk, late).to(dtype)
        count = embedded.shape[1]
        positions = valid.sum(1, keepdim=True) + torch.arange(count, device=x.device)
        hidden, _ = run_layers(
            self.dit,
            embedded,
            expert_mask(valid, count),
            positions,
            pairs,
            recompute=self.recompute and self.training,
        )
        return -self.action_out_proj(hidden[:, 1:].to(head)).float()[..., : self.action_dim]


def token_positions(valid: Tensor) -> Tensor:
    """Positions (B, P) of tokens that count only those which are no padding; a leading padding gets 0."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def expert_mask(valid: Tensor, count: int) -> Tensor:
    """Who sees whom (B, 1, count, P + count) bool among [state | actions], with the prefix `valid` (B, P) before.

    Block ids: the prefix and the state 0, actions 1; a token sees blocks up to its own (card of pi0, section 2.3).
    """
    own = torch.ones(count, count, dtype=torch.bool, device=valid.device)
    own[0, 1:] = False
    before = valid[:, None, None].expand(-1, 1, count, -1)
    return torch.cat([before, own.expand(len(valid), 1, -1, -1)], dim=-1)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
