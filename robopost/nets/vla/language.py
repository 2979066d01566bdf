# SPDX-License-Identifier: Apache-2.0
"""The language model of a VLA: transformers' Llama, run by a forward pass of our own with any attention mask.

Stock transformers would make an action block causal, which costs OpenVLA-OFT 38 points of success (98.1 to 60.2). The
pass here takes the mask it is given, leaves out what nobody reads (positions of the last layer, rows of the
vocabulary) and uses fused kernels; its results are those of `LlamaForCausalLM`, which a test checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from robopost.errors import ConfigError, require

PAD_MULTIPLE = 64  # rows of the embedding are a multiple of it


@dataclass
class LanguageConfig:
    """The language model."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 0  # 0 = as many as heads
    mlp: int = 256  # hidden units
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def check(self) -> None:
        """Raise ConfigError where the numbers don't go together."""
        kv = self.kv_heads or self.heads
        if min(self.width, self.layers, self.heads, self.mlp) < 1:
            raise ConfigError("policy.language: width, layers, heads and mlp must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2 or self.heads % kv:
            raise ConfigError(
                f"policy.language.width={self.width} must be an even multiple of heads={self.heads}, which must be a "
                f"multiple of kv_heads={kv}"
            )


def embedding_rows(vocab: int) -> int:
    """Rows of the embedding matrix for `vocab` ids: room for a padding token, up to a multiple of 64.

    32000 gives 32064, as in OpenVLA: action ids end at `vocab`, not at the end of the matrix.
    """
    return (vocab // PAD_MULTIPLE + 1) * PAD_MULTIPLE


def build_llama(config: LanguageConfig, vocab: int, positions: int, dtype: torch.dtype) -> Any:
    """A `LlamaForCausalLM` for `vocab` ids and sequences of `positions` tokens."""
    config.check()
    transformers: Any = require("transformers", "vla")
    settings = transformers.LlamaConfig(
        vocab_size=embedding_rows(vocab),
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=positions,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        pad_token_id=vocab,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM._from_config(settings, dtype=dtype, attn_implementation="sdpa")


class Cache:
    """Keys and values of positions that have been computed, per layer; `room` positions fit."""

    def __init__(self, layers: int, room: int) -> None:
        self.room, self.length = room, 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, heads, S, head) behind what is there; returns all of it."""
        keys, values = self.keys[layer], self.values[layer]
        if keys is None or values is None:
            shape = (*key.shape[:2], self.room, key.shape[3])
            keys, values = (tensor.new_zeros(shape) for tensor in (key, value))
            self.keys[layer], self.values[layer] = keys, values
        end = self.length + key.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key, value
        return keys[:, :, :end], values[:, :, :end]


class Decoder(nn.Module):
    """`LlamaForCausalLM` with a mask of the caller's.

    Args:
        model: as from `build_llama`.
        positions: length of the longest sequence.
    """

    def __init__(self, model: Any, positions: int) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        self.settings = model.config
        self.remember = True  # False: compute layers again on the way back
        for layer in self.model.layers:
            layer.run = MethodType(run_layer, layer)  # a method of the layer, where sharding hooks in
        with torch.no_grad():
            cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
        self.register_buffer("cos", cos[0].float(), persistent=False)
        sign = torch.ones(sin.shape[-1])
        sign[: len(sign) // 2] = -1
        self.register_buffer("sin", sin[0].float() * sign, persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.embed_tokens.weight.dtype

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings (..., W) of token ids."""
        return self.model.embed_tokens(ids)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor | None, *, keep: int = 0, cache: Cache | None = None
    ) -> Tensor:
        """Hidden states behind the last norm.

        Args:
            x: (B, S, W) embeddings.
            positions: (B, S) int64 of the tokens, which need not be their places in `x`.
            mask: (B or 1, 1, S or 1, K) bool, True where a query may look at a key; None = everywhere.
            keep: how many of the last positions to return, 0 = all; others are left out of the last layer.
            cache: of earlier positions, which are then keys too (K = S + what it holds); extended in place.
        """
        cos, sin = (table[positions].to(x.dtype).unsqueeze(1) for table in (self.cos, self.sin))
        keep = keep or x.shape[1]
        last = len(self.model.layers) - 1
        for index, layer in enumerate(self.model.layers):
            count = keep if index == last else x.shape[1]
            x = layer.run(self.remember, index, x, cos, sin, mask, count, cache)
        if cache is not None:
            cache.length += cos.shape[2]
        return rms_norm(x, self.model.norm)


def run_layer(layer: Any, remember: bool, *args: Any) -> Tensor:
    """`apply_layer`, computed again on the way back unless `remember`."""
    if remember or not torch.is_grad_enabled():
        return apply_layer(layer, *args)
    return checkpoint(apply_layer, layer, *args, use_reentrant=False)


def apply_layer(
    layer: Any,
    index: int,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
    count: int,
    cache: Cache | None,
) -> Tensor:
    """A layer of Llama: as `Decoder.forward`, for the last `count` positions of `x` (B, S, W)."""
    attention, start = layer.self_attn, x.shape[1] - count
    size = attention.head_dim
    h = rms_norm(x, layer.input_layernorm)
    heads = lambda tensor: tensor.unflatten(-1, (-1, size)).transpose(1, 2)  # noqa: E731
    key, value = heads(attention.k_proj(h)), heads(attention.v_proj(h))
    key = rotate(key, cos, sin)
    if start:
        h, x, cos, sin = h[:, start:], x[:, start:], cos[:, :, start:], sin[:, :, start:]
        mask = mask[:, :, start:] if mask is not None and mask.shape[2] > 1 else mask
    query = rotate(heads(attention.q_proj(h)), cos, sin)
    if cache is not None:
        key, value = cache.extend(index, key, value)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=key.shape[1] != query.shape[1]
    )
    x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
    h, mlp = rms_norm(x, layer.post_attention_layernorm), layer.mlp
    return x + mlp.down_proj(nn.functional.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, eq. 34) of (B, heads, S, head), halves in Llama's order.

    `sin` has a minus in its first half, so that swapping halves is all that is left of Llama's `rotate_half`.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """`LlamaRMSNorm` (Zhang and Sennrich 2019, eq. 4): the mean square of (x, -x) is its variance, a fused kernel."""
    width = x.shape[-1]
    wide = x.float()
    out = layer_norm(torch.cat([wide, -wide], dim=-1), (2 * width,), eps=norm.variance_epsilon)[..., :width]
    return out.to(x.dtype) * norm.weight
