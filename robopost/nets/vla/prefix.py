# SPDX-License-Identifier: Apache-2.0
"""The prefix of a flow VLA, encoded once per observation: keys and values of every layer, packed into one vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Pair = tuple[Tensor, Tensor]  # keys and values (B, G, P, E) of one layer


@dataclass(frozen=True)
class PrefixLayout:
    """What a packed prefix (B, size) holds: keys and values, which tokens are no padding, the state, a summary.

    One tensor, so that whatever passes encoded observations on (noise networks, stored rollouts, copies of samples)
    needs to know nothing of attention. Slices of it are views: unpacking copies nothing.

    Attributes:
        layers: L, layers of the language model.
        heads: G, heads of keys and values.
        length: P, tokens of the prefix.
        head: E, size of a head.
        state: S, size of the state that the action expert gets, 0 where it is a token of the prefix.
        summary: F, size of the mean hidden state.
        tokens_first: keys and values are (B, P, G, E), as lerobot's SmolVLA has them, instead of (B, G, P, E).
    """

    layers: int
    heads: int
    length: int
    head: int
    state: int
    summary: int
    tokens_first: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of the four parts."""
        return 2 * self.layers * self.heads * self.length * self.head, self.length, self.state, self.summary

    @property
    def size(self) -> int:
        """Numbers per observation."""
        return sum(self.sizes)

    def pack(self, pairs: Sequence[Pair], valid: Tensor, state: Tensor, hidden: Tensor) -> Tensor:
        """One vector (B, size) from keys and values, `valid` (B, P) bool, `state` (B, S), last hidden (B, P, F)."""
        weight = valid.unsqueeze(-1).to(hidden.dtype)
        summary = (hidden * weight).sum(1) / weight.sum(1)
        parts = [part.flatten(1) for pair in pairs for part in pair]
        return torch.cat([*parts, valid.to(hidden.dtype), state.to(hidden.dtype), summary], dim=1)

    def unpack(self, packed: Tensor) -> tuple[list[Pair], Tensor, Tensor, Tensor]:
        """Keys and values, valid (B, P) bool, state (B, S) and summary (B, F)."""
        pairs, valid, state, summary = packed.split(self.sizes, dim=1)
        inner = (self.length, self.heads) if self.tokens_first else (self.heads, self.length)
        pairs = pairs.unflatten(1, (self.layers, 2, *inner, self.head))
        return [(pair[:, 0], pair[:, 1]) for pair in pairs.unbind(1)], valid > 0.5, state, summary


class LayerCache:
    """Keys and values for one attention layer of transformers, which asks for them by `update`.

    Attributes:
        pair: the layer's own keys and values, once it has run.
    """

    pair: Pair

    def __init__(self, before: Pair | None = None) -> None:
        self.before = before

    def update(self, keys: Tensor, values: Tensor, *_: object) -> Pair:
        """What the layer looks at: its own keys and values, behind those of the prefix where there are any."""
        self.pair = keys, values
        if self.before is None:
            return keys, values
        return torch.cat([self.before[0], keys], dim=-2), torch.cat([self.before[1], values], dim=-2)


def run_layers(
    model: Any,
    x: Tensor,
    allowed: Tensor,
    positions: Tensor,
    prefix: Sequence[Pair] | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, list[Pair]]:
    """A decoder of transformers (Gemma, Llama) on embeddings `x` (B, N, D), under a mask of ours.

    Args:
        model: has `layers`, `rotary_emb` and `norm`.
        x: embeddings.
        allowed: (B, 1, N or 1, P + N) bool, True where a token (row) sees another (column).
        positions: (B, N) for the rotary embedding.
        prefix: keys and values of each layer for the P tokens before; P = 0 without.
        recompute: keep no activations within layers for the backward pass, compute them again.

    Returns:
        (normalised hidden states (B, N, D), keys and values of the N tokens in each layer).
    """
    rotary = model.rotary_emb(x, position_ids=positions)
    found: list[Pair] = []
    for index, layer in enumerate(model.layers):

        def step(x: Tensor, *before: Tensor, layer: Any = layer) -> tuple[Tensor, Tensor, Tensor]:
            cache = LayerCache((before[0], before[1]) if before else None)
            out = layer(
                x,
                attention_mask=allowed,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
            return (out, *cache.pair)

        inputs = (x, *(prefix[index] if prefix is not None else ()))
        if recompute and torch.is_grad_enabled():
            x, keys, values = checkpoint(step, *inputs, use_reentrant=False)
        else:
            x, keys, values = step(*inputs)
        found.append((keys, values))
    return model.norm(x), found
