# SPDX-License-Identifier: Apache-2.0
"""FAST action tokens (Pertsch et al. 2025): chunks as byte pairs of rounded cosine coefficients.

Orthonormal cosine transform along time, coefficients times `scale` rounded, flattened with the frequency as the slow
index, shifted to start at 0, one character each, and a BPE of those characters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robopost.errors import CheckpointError, ConfigError, DataError, require

FIRST = 0x100  # character of the smallest coefficient: above the control characters that tokenizers treat specially
SURROGATES = range(0xD800, 0xE000)  # code points that are no characters


def dct_matrix(size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal cosine transform (size, size): row k is frequency k; its transpose is its inverse."""
    k, n = torch.arange(size, dtype=dtype)[:, None], torch.arange(size, dtype=dtype)[None]
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * (n + 0.5) * k / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


def coefficients(chunk: Tensor) -> Tensor:
    """Cosine coefficients (..., H, A) of chunks (..., H, A)."""
    return dct_matrix(chunk.shape[-2], chunk.dtype).to(chunk.device) @ chunk


def from_coefficients(values: Tensor) -> Tensor:
    """Undo `coefficients`."""
    return dct_matrix(values.shape[-2], values.dtype).to(values.device).mT @ values


@dataclass
class FastTokens:
    """A trained tokenizer of chunks (H, A) in [-1, 1].

    Attributes:
        horizon: H.
        action_dim: A.
        scale: coefficients are multiplied by it before they are rounded: larger is finer and longer.
        low: smallest coefficient, which is character 0.
        high: largest.
        bpe: the `tokenizers.Tokenizer`.
    """

    horizon: int
    action_dim: int
    scale: float
    low: int
    high: int
    bpe: Any

    @classmethod
    def fit(cls, chunks: Tensor, *, scale: float = 10.0, vocab_size: int = 1024) -> FastTokens:
        """Train on chunks (N, H, A) in normalised units.

        Raises:
            ConfigError: a scale that isn't positive, or coefficients that take more values than the vocabulary has
                entries: those beyond would have no token.
            DataError: no chunks, or values that aren't finite.
        """
        if not scale > 0:
            raise ConfigError(f"scale={scale} must be above 0")
        if chunks.dim() != 3 or not len(chunks) or not bool(torch.isfinite(chunks).all()):
            raise DataError(f"chunks of shape {tuple(chunks.shape)} must be (N, H, A) with N > 0, and finite")
        values = _rounded(chunks, scale)
        low, high = int(values.min()), int(values.max())
        if high - low + 1 > vocab_size:
            raise ConfigError(
                f"coefficients take {high - low + 1} values ({low}..{high}) at scale={scale:g}, vocab_size="
                f"{vocab_size} has fewer entries. Fix: a smaller scale, a larger vocab_size, or normalised actions"
            )
        tokenizers = require("tokenizers", "vla")
        alphabet = [_character(value, low) for value in range(low, high + 1)]
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
        bpe.train_from_iterator([_text(row, low) for row in values.flatten(1).tolist()], trainer)
        return cls(chunks.shape[1], chunks.shape[2], scale, low, high, bpe)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.bpe.get_vocab_size()

    def encode(self, chunks: Tensor) -> list[list[int]]:
        """Tokens of each of chunks (N, H, A); coefficients beyond those of the training data are clipped to them.

        Raises:
            DataError: another shape.
        """
        if chunks.shape[1:] != (self.horizon, self.action_dim):
            raise DataError(
                f"chunks of shape {tuple(chunks.shape)} must be (N, {self.horizon}, {self.action_dim})"
            )
        rows = _rounded(chunks, self.scale).clamp(self.low, self.high).flatten(1).tolist()
        return [list(self.bpe.encode(_text(row, self.low)).ids) for row in rows]

    def decode(self, tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Chunks (N, H, A) float32 of tokens, and which of them could be read (N,) bool.

        What is no chunk (ids outside the vocabulary, another number of coefficients) gives zeros and False.
        """
        chunks = torch.zeros(len(tokens), self.horizon, self.action_dim)
        read = torch.zeros(len(tokens), dtype=torch.bool)
        for index, ids in enumerate(tokens):
            pieces: list[Any] = [
                self.bpe.id_to_token(int(token)) if 0 <= int(token) < 2**32 else None for token in ids
            ]
            if any(piece is None for piece in pieces):
                continue
            values = [_value(character, self.low) for piece in pieces for character in piece]
            if len(values) != self.horizon * self.action_dim:
                continue
            table = torch.tensor(values, dtype=torch.float64).view(self.horizon, self.action_dim)
            chunks[index] = from_coefficients(table / self.scale).float()
            read[index] = True
        return chunks, read

    def to_json(self) -> dict[str, Any]:
        """Plain JSON form; `from_json` reverses it."""
        numbers = {name: getattr(self, name) for name in ("horizon", "action_dim", "scale", "low", "high")}
        return numbers | {"bpe": self.bpe.to_str()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FastTokens:
        """Rebuild from `to_json` output.

        Raises:
            CheckpointError: a field is missing, or the BPE can't be read.
        """
        try:
            bpe = require("tokenizers", "vla").Tokenizer.from_str(data["bpe"])
            horizon, actions, low, high = (
                int(data[name]) for name in ("horizon", "action_dim", "low", "high")
            )
            return cls(horizon, actions, float(data["scale"]), low, high, bpe)
        except Exception as error:  # tokenizers raises bare Exceptions
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise CheckpointError(f"no FAST tokenizer: {reason}") from error


def _rounded(chunks: Tensor, scale: float) -> Tensor:
    return (coefficients(chunks.double()) * scale).round().long()


def _character(value: int, low: int) -> str:
    code = FIRST + value - low
    return chr(code if code < SURROGATES.start else code + len(SURROGATES))


def _value(character: str, low: int) -> int:
    code = ord(character)
    return (code if code < SURROGATES.start else code - len(SURROGATES)) - FIRST + low


def _text(row: list[int], low: int) -> str:
    return "".join(_character(value, low) for value in row)
