# SPDX-License-Identifier: Apache-2.0
"""Token VLA: image towers, a projector and Llama that write an action chunk, in OpenVLA's or OpenVLA-OFT's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError
from robopost.nets.encoder import INSTRUCTION, random_shift
from robopost.nets.vla import prompts as text
from robopost.nets.vla.language import Cache, Decoder, build_llama
from robopost.nets.vla.linear import use_fused
from robopost.nets.vla.lora import add_lora, merge_lora, weight_rows
from robopost.nets.vla.openvla import Shards, action_statistics, load_weights
from robopost.nets.vla.towers import DTYPES, Projector, Tower, Vision
from robopost.policies.token_vla_config import (
    TokenVLAConfig,
    from_checkpoint,
    make_tokenizer,
    vocabulary,
)
from robopost.policies.tokens import TokenPolicy, choose, taken
from robopost.registry import POLICIES

if TYPE_CHECKING:
    from robopost.data.dataset import Dataset

STATE = "state"


@POLICIES.register("token_vla", config=TokenVLAConfig)
class TokenVLA(TokenPolicy):
    """A vision-language-action model over action tokens (Kim et al. 2024, section 3; Kim et al. 2025, section 4).

    One sequence: `BEGIN`, image patches of all cameras, the arm's own state (one token), padding, the prompt, and
    the action slots. Slot k is read where the token before it stands. Layout `openvla` is causal and sees the tokens of
    earlier slots; `oft` has placeholders in all slots and a closing `END`, and sees in both directions.

    The action with bin b has the id `vocab - 1 - b`: 31999 for -1 down to 31744 for 1 in Llama-2's vocabulary.

    Raises:
        ConfigError: no image, sizes that don't fit together, or a `proprio` outside the state.
    """

    registry_name = "token_vla"
    config: TokenVLAConfig
    # Prefixes of parameter names by what they are part of, for merging by module.
    module_groups: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("vision", "projector"),
        "language": ("language.model",),
        "action": ("language.lm_head", "proprio_projector", "slots"),
    }

    def __init__(self, config: TokenVLAConfig, spec: Spec) -> None:
        unnorm_key = config.unnorm_key
        shards = Shards(Path(config.checkpoint)) if config.checkpoint else None
        if shards is not None:
            config = from_checkpoint(config, shards)
        tokenizer = make_tokenizer(config)
        # What is saved with the policy needs no other file.
        config = replace(config, tokenizer_json=text.pack(tokenizer), checkpoint="", unnorm_key="")
        super().__init__(config, spec)
        self.tokenizer_hash = text.tokenizer_hash(tokenizer)
        self._choose_keys(config, spec)
        self.image_size = config.image_size or square([spec.obs[key][0] for key in self.image_keys])
        dtype = DTYPES[config.dtype]
        self.vision = Vision(config.siglip, config.dino, self.image_size, dtype)
        width, self.patches = config.language.width, self.vision.patches * len(self.image_keys)
        self.projector = Projector(self.vision.width, width, fused=len(self.vision.towers) > 1)
        self.length = self.horizon * spec.action_dim
        lead = 1 + self.patches + bool(self.columns) + config.prompt_length
        positions = lead + self.length + (config.layout == "oft")
        self.prompts = text.Prompts(
            tokenizer, config.prompt_length, config.template, empty=True, known=config.texts
        )
        self.vocab = vocabulary(config, self.prompts.tokenizer.get_vocab_size())
        self.language = Decoder(build_llama(config.language, self.vocab, positions, dtype), positions)
        self.proprio_projector = None
        if self.columns:
            first = nn.Linear(self.columns[1] - self.columns[0], width)
            self.proprio_projector = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
        self.slots = None
        if config.layout == "oft" and config.slots == "learned":
            self.slots = nn.Parameter(torch.randn(self.length, width) * 0.02)
        if not config.lora_rank:
            self._one_dtype()  # beside adapters these stay float32, like them
        if shards is not None:
            self._begin_from(shards, unnorm_key)
        use_fused(self)
        if config.freeze_vision:
            self.vision.requires_grad_(False)
        if config.lora_rank:
            self.vision.requires_grad_(False)
            add_lora(self.language, config.lora_rank, config.lora_alpha, config.lora_targets)
        if config.gradient_checkpointing:
            self.language.remember = False
            self.vision.checkpoint()
        self._register_mask(lead)

    def _one_dtype(self) -> None:
        """Give everything that is trained the dtype of the language model, as `Flat` needs it."""
        for part in (self.projector, self.proprio_projector):
            if part is not None:
                part.to(self.language.dtype)
        if self.slots is not None:
            self.slots.data = self.slots.data.to(self.language.dtype)

    def _begin_from(self, shards: Shards, unnorm_key: str) -> None:
        """Weights and action statistics of a checkpoint; the normaliser is then not refitted."""
        load_weights(self, shards)
        key, stats = action_statistics(shards.folder, unnorm_key, self.spec.action_dim)
        source = f"{shards.folder.name}:{key}"
        self.normaliser.fit({"action": stats["action"]}, obs="identity", action="quantile", source=source)
        if self.columns and "proprio" in stats:
            self.normaliser.fit_columns(STATE, slice(*self.columns), stats["proprio"], "quantile")
        self.normaliser_fixed = True

    def _choose_keys(self, config: TokenVLAConfig, spec: Spec) -> None:
        keys = self.obs_keys
        self.image_keys = [key for key in keys if spec.obs[key][1] == "uint8" and len(spec.obs[key][0]) == 3]
        if not self.image_keys:
            raise ConfigError(
                f"policy=token_vla needs an image, here are {', '.join(keys)}. Fix: env.obs=state+pixels96"
            )
        self.instructed = INSTRUCTION in keys
        self.columns: tuple[int, int] | None = None
        if STATE in keys and config.proprio:
            first, count = config.proprio
            size = spec.obs[STATE][0][0]
            last = first + count if count else size
            if not first < last <= size:
                raise ConfigError(
                    f"policy.proprio={config.proprio} must choose columns 0..{size - 1} of `state`"
                )
            self.columns = (first, last)
        used = {
            *self.image_keys,
            *([INSTRUCTION] if self.instructed else []),
            *([STATE] if self.columns else []),
        }
        strangers = [
            key for key in config.obs_keys if key not in used and not (key == STATE and not config.proprio)
        ]
        if strangers:
            raise ConfigError(
                f"policy.obs_keys names {strangers[0]!r}: token_vla reads images, `{INSTRUCTION}` and `{STATE}`"
            )
        self.obs_keys = [key for key in keys if key in used]

    def _register_mask(self, lead: int) -> None:
        """What each position may look at where nothing is padding: (S, S), rows are queries."""
        size = lead + self.length + (self.config.layout == "oft")
        causal = torch.ones(size, size, dtype=torch.bool).tril()
        if self.config.layout == "oft":
            if self.config.attention == "full":
                causal[:] = True
            else:
                causal[lead - 1 :, lead - 1 :] = True  # slot 0 is read at the prompt's last token
        self.register_buffer("allowed", causal[None, None], persistent=False)
        self.allowed: Tensor

    @property
    def autoregressive(self) -> bool:
        """True in the layout `openvla`."""
        return self.config.layout == "openvla"

    def blocks(self) -> list[nn.Module]:
        """The layers of the language model and of the image towers."""
        towers = [tower for tower in self.vision.towers.values() if isinstance(tower, Tower)]
        return [*(layer for tower in towers for layer in tower.stack()), *self.language.model.layers]

    # -- the pieces ---------------------------------------------------------------------------------------------

    def vision_features(self, obs: Obs) -> Tensor:
        """Features (B, patches, F) of all images, before the projector: shared by policies with the same towers."""
        images = [obs[key] for key in self.image_keys]
        if self.config.freeze_vision or self.config.lora_rank:
            with torch.no_grad():
                return self.vision(images)
        return self.vision(images)

    def prefix(self, features: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:
        """Embeddings (B, S, W) of everything before the actions, and which of them are no padding (B, S) bool."""
        rows = len(features)
        begin = torch.full((rows, 1), self.prompts.begin, device=features.device)
        parts = [self.language.embed(begin), self.projector(features)]
        if self.proprio_projector is not None and self.columns:
            state = obs[STATE][:, self.columns[0] : self.columns[1]]
            weight: Tensor = next(self.proprio_projector.parameters())
            parts.append(self.proprio_projector(state.to(weight.dtype)).unsqueeze(1))
        if self.instructed:
            ids, valid = self.prompts(obs[INSTRUCTION])
        else:
            ids, valid = (table[:1].expand(rows, -1) for table in (self.prompts.ids, self.prompts.valid))
        parts.append(self.language.embed(ids))
        embedded = torch.cat([part.to(self.language.dtype) for part in parts], dim=1)
        lead = valid.new_ones(rows, embedded.shape[1] - valid.shape[1])
        return embedded, torch.cat([lead, valid], dim=1)

    def action_ids(self, tokens: Tensor) -> Tensor:
        """Token ids of bins."""
        return self.vocab - 1 - tokens

    def bins_of(self, ids: Tensor) -> Tensor:
        """Bins of token ids; ids that are no action give the nearest bin, as OpenVLA's decoder does."""
        return (self.vocab - 1 - ids).clamp(0, self.bins - 1)

    def action_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., bins) in float32 of the action ids alone, in the order of bins."""
        weight = weight_rows(self.language.lm_head, slice(self.vocab - self.bins, self.vocab))
        return hidden.float() @ weight.flip(0).T

    # -- TokenPolicy ----------------------------------------------------------------------------------------------

    def logits(self, obs: Obs, tokens: Tensor | None = None) -> Tensor:
        """See `TokenPolicy.logits`; an autoregressive one is teacher forced and needs `tokens`."""
        return self.logits_from(self.vision_features(obs), obs, tokens)

    def logits_from(self, features: Tensor, obs: Obs, tokens: Tensor | None = None) -> Tensor:
        """`logits` with the image features at hand.

        Raises:
            ConfigError: `tokens` is missing where slots see the tokens before them.
        """
        embedded, valid = self.prefix(features, obs)
        rows = len(valid)
        if self.autoregressive:
            if tokens is None:
                raise ConfigError("policy.layout=openvla has no logits without the tokens before a slot")
            earlier = self.language.embed(self.action_ids(tokens.flatten(1)[:, :-1]))
            extra, keep = earlier, self.length
        else:
            end = self.language.embed(torch.full((rows, 1), self.prompts.end, device=features.device))
            shape = (rows, self.length, embedded.shape[-1])
            slots = (
                embedded.new_zeros(shape) if self.slots is None else self.slots.to(end.dtype).expand(shape)
            )
            extra, keep = torch.cat([slots, end], dim=1), self.length + 2
        valid = torch.cat([valid, valid.new_ones(rows, extra.shape[1])], dim=1)
        size = valid.shape[1]
        mask = self.allowed[:, :, :size, :size] & valid[:, None, None, :]
        hidden = self.language(torch.cat([embedded, extra], dim=1), positions_of(valid), mask, keep=keep)
        return self.action_logits(hidden[:, : self.length]).unflatten(1, (self.horizon, -1))

    @torch.no_grad()
    def draw(
        self, features: Tensor, obs: Obs, generator: torch.Generator | None, deterministic: bool
    ) -> tuple[Tensor, Tensor]:
        """Slot after slot with cached keys and values: tokens (B, H, A) and their log-probability (B,)."""
        embedded, valid = self.prefix(features, obs)
        rows, lead = valid.shape
        valid = torch.cat([valid, valid.new_ones(rows, self.length)], dim=1)
        positions = positions_of(valid)
        cache = Cache(len(self.language.model.layers), lead + self.length)
        mask = self.allowed[:, :, :lead, :lead] & valid[:, None, None, :lead]
        hidden = self.language(embedded, positions[:, :lead], mask, keep=1, cache=cache)
        tokens, total = [], torch.zeros(rows, device=features.device)
        for slot in range(self.length):
            log_probs = (self.action_logits(hidden[:, 0]) / self.temperature).log_softmax(-1)
            token = choose(log_probs, generator, deterministic)
            tokens.append(token)
            total = total + taken(log_probs, token)
            if slot < self.length - 1:
                at = lead + slot
                step = self.language.embed(self.action_ids(token)).unsqueeze(1)
                mask = valid[:, None, None, : at + 1]
                hidden = self.language(step, positions[:, at : at + 1], mask, cache=cache)
        return torch.stack(tokens, dim=1).unflatten(1, (self.horizon, -1)), total

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One chunk per observation: the likeliest tokens when `deterministic`, slot by slot where that matters."""
        if not self.autoregressive:
            return super().sample(obs, generator=generator, deterministic=deterministic)
        tokens, log_prob = self.draw(self.vision_features(obs), obs, generator, deterministic)
        return self.decode(tokens), log_prob, tokens.unsqueeze(1)

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `TokenPolicy.bc_loss`; images are shifted at random by up to `image_shift` pixels."""
        if self.config.image_shift and generator is not None:
            shifted = {
                key: random_shift(obs[key].unsqueeze(1), self.config.image_shift, generator).squeeze(1)
                for key in self.image_keys
            }
            obs = obs | shifted
        return super().bc_loss(obs, chunk, mask, generator)

    def label_demos(self, demos: Dataset) -> Dataset:
        """Tokenise the instructions of `demos` now: a captured update can't."""
        if self.instructed:
            self.prompts.add(demos.obs[INSTRUCTION])
        return demos

    def merge_lora(self) -> None:
        """Add the adapters to the weights (float32 sum) and go on without them, to export or to merge policies."""
        if self.config.lora_rank:
            merge_lora(self.language)
            self.config = replace(self.config, lora_rank=0)
            self._one_dtype()
            self.requires_grad_(True)
            self.vision.requires_grad_(not self.config.freeze_vision)


def positions_of(valid: Tensor) -> Tensor:
    """Positions (B, S) int64 that padding doesn't take part in."""
    return (valid.long().cumsum(1) - 1).clamp_min(0)


def square(shapes: list[tuple[int, ...]]) -> int:
    """The common size of square images (H, W, C).

    Raises:
        ConfigError: they differ in size or aren't square.
    """
    sizes = {size for shape in shapes for size in shape[:2]}
    if len(sizes) > 1:
        raise ConfigError(
            f"images have the sizes {shapes}. Fix: policy.image_size=<pixels they are resized to>"
        )
    return sizes.pop()
