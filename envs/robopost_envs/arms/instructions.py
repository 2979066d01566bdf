# SPDX-License-Identifier: Apache-2.0
"""The instructions of `arm_language`, as text, as bytes and as index tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

OBJECT_NAMES = ("red", "green", "blue")
ZONE_NAMES = ("yellow", "purple", "orange", "cyan")
TOUCH, LIFT, PUT = range(3)
LENGTH = 64  # bytes, padded with zeros

# Pairs of a cube and a zone that `split=train` never shows; each cube and each zone is in others it shows.
HELD_OUT = (("red", "yellow"), ("green", "purple"), ("blue", "orange"), ("red", "cyan"))


def _build() -> tuple[list[str], list[tuple[int, int, int]]]:
    texts, meaning = [], []
    for index, name in enumerate(OBJECT_NAMES):
        texts += [f"touch the {name} cube", f"lift the {name} cube"]
        meaning += [(TOUCH, index, 0), (LIFT, index, 0)]
    for index, name in enumerate(OBJECT_NAMES):
        for zone, zone_name in enumerate(ZONE_NAMES):
            texts.append(f"put the {name} cube in the {zone_name} zone")
            meaning.append((PUT, index, zone))
    return texts, meaning


_texts, _meaning = _build()
INSTRUCTIONS: tuple[str, ...] = tuple(_texts)
KIND, OBJECT, ZONE = (np.array(column) for column in zip(*_meaning, strict=True))  # per instruction number
BYTES = np.stack(
    [np.frombuffer(text.encode().ljust(LENGTH, b"\0"), np.uint8) for text in INSTRUCTIONS]
)  # (18, 64)


def split_ids(split: str, only: Sequence[str] = ()) -> np.ndarray:
    """Instruction numbers of a split: `train`, `heldout` or `all`; of those, the ones that contain a text of `only`."""
    held = np.array(
        [
            kind == PUT and (OBJECT_NAMES[cube], ZONE_NAMES[zone]) in HELD_OUT
            for kind, cube, zone in zip(KIND, OBJECT, ZONE, strict=True)
        ]
    )
    numbers = np.arange(len(INSTRUCTIONS))
    chosen = {"train": numbers[~held], "heldout": numbers[held], "all": numbers}[split]
    if not only:
        return chosen
    return np.array([i for i in chosen if any(text in INSTRUCTIONS[i] for text in only)], int)


def decode(instruction: np.ndarray) -> np.ndarray:
    """Instruction numbers (N,) of byte rows (N, 64); -1 where the text is unknown."""
    same = (instruction[:, None] == BYTES[None]).all(axis=2)
    return np.where(same.any(axis=1), same.argmax(axis=1), -1)
