# SPDX-License-Identifier: Apache-2.0
"""LeRobot's SmolVLA as a flow policy: its prefix is encoded once, Euler steps read the cached keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, require
from robopost.nets.vla.pi0 import PAD_SEED
from robopost.nets.vla.prefix import PrefixLayout
from robopost.policies.flow import TimeGrid
from robopost.policies.flow_vla import PrefixFlow
from robopost.policies.lerobot import LeRobotConfig, LeRobotNormaliser, open_parts
from robopost.policies.lerobot_files import EXTRA
from robopost.policies.lerobot_parts import LeRobotParts

WORDS, WORDS_MASK = "observation.language.tokens", "observation.language.attention_mask"


class SmolPrefix(nn.Module):
    """Raw observations to the packed prefix: [cameras | words | state], a token for the state at the end.

    Images and words see each other, the state sees them and itself. Holds all weights of the policy.
    """

    def __init__(self, parts: LeRobotParts, spec: Spec) -> None:
        super().__init__()
        self.policy: Any = parts.policy
        self.parts = parts
        text = self.policy.model.vlm_with_expert.config.text_config
        probe = {key: torch.zeros(1, *spec.obs[key][0], dtype=_dtype(spec, key)) for key in spec.obs}
        with torch.no_grad():
            length = self.tokens(probe)[1].shape[1]
        self.layout = PrefixLayout(
            layers=self.policy.model.vlm_with_expert.num_vlm_layers,
            heads=text.num_key_value_heads,
            length=length,
            head=text.head_dim,
            state=0,
            summary=text.hidden_size,
            tokens_first=True,
        )

    @property
    def out_dim(self) -> int:
        """Size of a packed prefix."""
        return self.layout.size

    def tokens(self, obs: Obs) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings (B, P, D), which are no padding (B, P) bool, and where a new block begins (B, P)."""
        batch = self.parts.batch(obs)
        images, present = self.policy.prepare_images(batch)
        words, mask = batch[WORDS], batch[WORDS_MASK]
        state = self.policy.prepare_state(batch)
        return self.policy.model.embed_prefix(images, present, words, mask, state=state)

    def forward(self, obs: Obs, augment: torch.Generator | None = None) -> Tensor:
        """Encode raw observations; `augment` is not used, lerobot augments in its data loader."""
        embedded, valid, blocks = self.tokens(obs)
        valid = valid.bool()
        (hidden, _), cache = self.policy.model.vlm_with_expert.forward(
            attention_mask=block_mask(valid, blocks),
            position_ids=valid.long().cumsum(1) - 1,
            past_key_values=None,
            inputs_embeds=[embedded, None],
            use_cache=True,
            fill_kv_cache=True,
        )
        pairs = [(cache[i]["key_states"], cache[i]["value_states"]) for i in sorted(cache)]
        return self.layout.pack(pairs, valid, hidden.new_zeros(len(hidden), 0), hidden)


class SmolExpert(nn.Module):
    """Velocity of a noisy chunk by lerobot's `denoise_step`; action tokens are causal among themselves.

    Time runs from noise (0) to actions (1), the reverse of SmolVLA's. Padded action dimensions hold (1 - t) times a
    constant draw of noise, which is what the model was trained with. It reads the weights that `SmolPrefix` holds.
    """

    padding: Tensor

    def __init__(self, model: Any, layout: PrefixLayout, action_dim: int) -> None:
        super().__init__()
        object.__setattr__(self, "model", model)  # not a second time in the state dict
        self.model: Any
        self.layout, self.action_dim = layout, action_dim
        generator = torch.Generator().manual_seed(PAD_SEED)
        shape = model.config.chunk_size, model.config.max_action_dim - action_dim
        self.register_buffer("padding", torch.randn(shape, generator=generator), persistent=False)

    def forward(self, x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, H, A) in float32 at `x` (B, H, A) and time `t` (B,), given the packed prefix `cond` (B, D)."""
        pairs, valid, _, _ = self.layout.unpack(cond)
        cache = {
            index: {"key_states": keys, "value_states": values} for index, (keys, values) in enumerate(pairs)
        }
        late = 1 - t
        chunk = torch.cat([x, late[:, None, None] * self.padding], dim=-1)
        velocity = self.model.denoise_step(
            prefix_pad_masks=valid,
            past_key_values=cache,
            x_t=chunk.to(self.model.action_in_proj.weight.dtype),
            timestep=late,
        )
        return -velocity.float()[..., : self.action_dim]

    def time(self, t: Tensor) -> Tensor:
        """Embedding (B, T) of times `t` (B,)."""
        made = require("lerobot.policies.smolvla.modeling_smolvla", EXTRA)
        config = self.model.config
        size = self.model.vlm_with_expert.expert_hidden_size
        rows = made.create_sinusoidal_pos_embedding(
            1 - t, size, config.min_period, config.max_period, device=t.device
        )
        return rows.float()


class SmolVLA(PrefixFlow):
    """SmolVLA (Shukor et al. 2025) with the weights and processors of a LeRobot checkpoint.

    Normalised actions are its own units, by its statistics; observations stay raw, its preprocessor reads them.
    """

    registry_name = "lerobot"
    capturable = False
    config: LeRobotConfig
    encoder: SmolPrefix
    net: SmolExpert

    def __init__(self, config: LeRobotConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.grid = TimeGrid(config.steps)
        parts = self.encoder.parts
        used = {*parts.keys, *(("instruction",) if parts.speaks else ())}
        self.obs_keys = [key for key in self.obs_keys if key in used]
        self.normaliser = LeRobotNormaliser(spec, parts, config, mirror=True)
        self.normaliser_fixed = config.statistics == "keep"

    def build(self, config: LeRobotConfig) -> tuple[nn.Module, nn.Module]:
        """See `ChainPolicy.build`.

        Raises:
            ConfigError: a policy that does more to actions than an affine map, or several observations at once.
        """
        parts = open_parts(config, self.spec)
        for name in ("adapt_to_pi_aloha", "compile_model"):
            if getattr(parts.settings, name):
                raise ConfigError(
                    f"{config.source}: {name} is not supported. Fix: {name}=false in its config.json"
                )
        if self.history != 1:
            raise ConfigError(f"{config.source} sees {self.history} observations, SmolVLA knows one")
        encoder = SmolPrefix(parts, self.spec)
        return encoder, SmolExpert(parts.policy.model, encoder.layout, self.spec.action_dim)

    def export(self, folder: str | Path) -> None:
        """Write a folder that lerobot's `from_pretrained` reads."""
        self.encoder.parts.export(Path(folder))


def block_mask(valid: Tensor, begins: Tensor) -> Tensor:
    """Who sees whom (B, P, P): tokens up to one's own block, none that is padding.

    Args:
        valid: (B, P) bool, False on padding.
        begins: (B, P), True where a block begins.
    """
    block = begins.long().cumsum(1)
    return (block[:, None, :] <= block[:, :, None]) & valid[:, None, :] & valid[:, :, None]


def _dtype(spec: Spec, key: str) -> torch.dtype:
    return torch.uint8 if spec.obs[key][1] == "uint8" else torch.float32
