# SPDX-License-Identifier: Apache-2.0
"""Instructions as token ids: tokenizers trained on task strings or read from a file, and a table of known prompts."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robopost.errors import CheckpointError, ConfigError, require

UNKNOWN, BEGIN, END, EMPTY = "<unk>", "<s>", "</s>", "▁"  # names of Llama-2's special tokens
SPECIALS = (UNKNOWN, BEGIN, END, EMPTY)
ROWS = 64  # instructions the table has room for at first
VACANT = -(2**63)  # key of a free row
OPENVLA_TEMPLATE = "In: What action should the robot take to {instruction}?\nOut:"


def train_tokenizer(texts: Sequence[str], kind: str, size: int) -> str:
    """A tokenizer of `texts` as JSON; the same texts give the same one.

    Args:
        texts: strings it has to know, e.g. the prompts of all tasks.
        kind: `words` (whole words in lower case, others are unknown) or `bpe` (bytes and their frequent pairs: knows
            everything).
        size: largest number of tokens, special ones included.

    Raises:
        ConfigError: no texts, or more words than `size` has room for.
    """
    if not any(text.strip() for text in texts):
        raise ConfigError("policy.texts is empty: a tokenizer is made from the instructions it has to know")
    tokenizers = require("tokenizers", "vla")
    lower, split = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
    if kind == "words":
        words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())})
        if len(SPECIALS) + len(words) > size:
            raise ConfigError(
                f"policy.texts holds {len(words)} different words, policy.text_tokens={size} has room for "
                f"{size - len(SPECIALS)}. Fix: raise policy.text_tokens"
            )
        vocabulary = {word: index for index, word in enumerate((*SPECIALS, *words))}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
        model.normalizer, model.pre_tokenizer = lower, split
        model.add_special_tokens(list(SPECIALS))
        return model.to_str()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    model.normalizer = lower
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if len(SPECIALS) + len(alphabet) > size:
        raise ConfigError(
            f"policy.text_tokens={size}: tokenizer=bpe needs at least {len(SPECIALS) + len(alphabet)} "
            "(every byte). Fix: raise policy.text_tokens, or policy.tokenizer=words"
        )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(list(texts), trainer)
    return model.to_str()


def read_tokenizer(path: str | Path) -> str:
    """The `tokenizer.json` at `path`, a file or a folder that holds one, as text.

    Raises:
        ConfigError: there is none.
        CheckpointError: it is damaged.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"no tokenizer at {file}. Fix: policy.tokenizer=words, bpe, or a tokenizer.json")
    try:
        text = file.read_text(encoding="utf-8")
        require("tokenizers", "vla").Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{file} is not a tokenizer: {str(error).splitlines()[0]}") from error
    return text


def pack(text: str) -> str:
    """Compress a tokenizer's JSON into letters, digits, `+`, `/` and `=`: safe in any config file."""
    return base64.b64encode(zlib.compress(text.encode("utf-8"), 9)).decode("ascii")


def unpack(packed: str) -> str:
    """Undo `pack`.

    Raises:
        CheckpointError: the text is damaged.
    """
    try:
        return zlib.decompress(base64.b64decode(packed, validate=True)).decode("utf-8")
    except (ValueError, zlib.error) as error:
        raise CheckpointError(f"the policy's tokenizer is damaged: {error}") from error


def tokenizer_hash(text: str) -> str:
    """sha256 of a tokenizer's JSON: policies that share token ids have the same."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class Prompts(nn.Module):
    """Instructions (B, 64) of UTF-8 bytes to token ids (B, length), padded at the left.

    Every instruction is tokenised once and kept in a table on the device; a batch is looked up by tensor operations
    alone. An instruction that is new while tensors can't be read on the host (CUDA graphs, torch.compile, vmap) counts
    as one unknown word: show it to the policy once before (`add`, or any eager call).

    Args:
        tokenizer: JSON.
        length: tokens of a prompt behind the first one (`BEGIN`, which is not part of the result).
        template: text with `{instruction}` in it.
        empty: whether a prompt ends in the empty token, which OpenVLA has before the actions.
        known: instructions to begin with.

    Raises:
        ConfigError: a template without its place holder, or a tokenizer without the special tokens.
    """

    def __init__(
        self, tokenizer: str, length: int, template: str, *, empty: bool, known: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if "{instruction}" not in template:
            raise ConfigError(f"policy.template={template!r} lacks {{instruction}}")
        self.tokenizer: Any = require("tokenizers", "vla").Tokenizer.from_str(tokenizer)
        self.length, self.template, self.empty = length, template, empty
        missing = [name for name in SPECIALS if self.tokenizer.token_to_id(name) is None]
        if missing:
            raise ConfigError(f"the tokenizer has no token {missing[0]!r}, which prompts need")
        self.begin, self.end = (int(self.tokenizer.token_to_id(name)) for name in (BEGIN, END))
        # A fixed hash of 64 bytes: odd multipliers, arithmetic modulo 2^64.
        draw = torch.Generator().manual_seed(20240611)
        factors = torch.randint(-(2**62), 2**62, (64,), generator=draw) * 2 + 1
        self.register_buffer("factors", factors, persistent=False)
        self.register_buffer("keys", torch.full((ROWS,), VACANT), persistent=False)
        self.register_buffer("ids", torch.zeros(ROWS, length, dtype=torch.long), persistent=False)
        self.register_buffer("valid", torch.zeros(ROWS, length, dtype=torch.bool), persistent=False)
        self.factors: Tensor
        self.keys: Tensor
        self.ids: Tensor
        self.valid: Tensor
        self.rows = 0  # of the table that are taken
        self._outgrown: list[tuple[Tensor, ...]] = []  # tables that captured graphs may still read
        self.add(torch.stack([to_bytes(text) for text in dict.fromkeys(("", UNKNOWN, *known))]))
        self.unknown = 1  # row of the prompt that stands for what can't be looked up

    def encode(self, instruction: str) -> list[int]:
        """Token ids of the whole prompt for one instruction, `BEGIN` first.

        Raises:
            ConfigError: more than `length` behind the first.
        """
        ids = self.tokenizer.encode(self.template.replace("{instruction}", instruction.lower())).ids
        ids = [self.begin, *(ids[1:] if ids[:1] == [self.begin] else ids)]
        if self.empty and ids[-1] != (last := int(self.tokenizer.token_to_id(EMPTY))):
            ids.append(last)
        if len(ids) - 1 > self.length:
            raise ConfigError(
                f"{instruction!r} makes a prompt of {len(ids) - 1} tokens, policy.prompt_length={self.length}. "
                "Fix: raise policy.prompt_length"
            )
        return ids

    def add(self, instructions: Tensor) -> None:
        """Tokenise the rows of `instructions` (N, 64) uint8 that the table lacks."""
        rows = torch.unique(instructions.detach().reshape(-1, instructions.shape[-1]).cpu(), dim=0)
        known = set(self.keys.tolist())
        keys = (rows.long() * self.factors.cpu()).sum(-1).tolist()
        fresh = [(key, row) for key, row in zip(keys, rows, strict=True) if key not in known]
        if not fresh:
            return
        ids = torch.full((len(fresh), self.length), self.end)
        valid = torch.zeros(len(fresh), self.length, dtype=torch.bool)
        for index, (_, row) in enumerate(fresh):
            prompt = self.encode(bytes(row.tolist()).rstrip(b"\0").decode("utf-8", "replace"))[1:]
            ids[index, self.length - len(prompt) :] = torch.tensor(prompt)
            valid[index, self.length - len(prompt) :] = True
        last = self.rows + len(fresh)
        if last > len(self.keys):
            self._grow(last)
        for table, new in zip(
            (self.keys, self.ids, self.valid),
            (torch.tensor([key for key, _ in fresh]), ids, valid),
            strict=True,
        ):
            table[self.rows : last] = new.to(table.device)
        self.rows = last

    def _grow(self, rows: int) -> None:
        self._outgrown.append((self.keys, self.ids, self.valid))
        more = max(rows, 2 * len(self.keys)) - len(self.keys)
        self.keys = torch.cat([self.keys, torch.full_like(self.keys[:1], VACANT).expand(more)])
        self.ids = torch.cat([self.ids, torch.zeros_like(self.ids[:1]).expand(more, -1)])
        self.valid = torch.cat([self.valid, torch.zeros_like(self.valid[:1]).expand(more, -1)])

    def forward(self, instructions: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, length) int64 and which of them are the prompt's (B, length) bool; padding is the rest."""
        key = (instructions.long() * self.factors).sum(-1, keepdim=True)
        match = key == self.keys
        found = match.any(-1)
        row = match.long().argmax(-1)
        if not _host_can_read(found):
            row = torch.where(found, row, self.unknown)
        elif not bool(found.all()):
            self.add(instructions)
            row = (key == self.keys).long().argmax(-1)
        return self.ids[row], self.valid[row]


def to_bytes(text: str, length: int = 64) -> Tensor:
    """UTF-8 bytes (length,) uint8 of an instruction, padded with zeros.

    Raises:
        ConfigError: the text is too long.
    """
    data = text.encode()
    if len(data) > length:
        raise ConfigError(f"instruction {text!r} takes {len(data)} bytes, there is room for {length}")
    return torch.tensor(list(data.ljust(length, b"\0")), dtype=torch.uint8)


def _host_can_read(tensor: Tensor) -> bool:
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or functorch.is_batchedtensor(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
