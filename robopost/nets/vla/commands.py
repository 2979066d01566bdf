# SPDX-License-Identifier: Apache-2.0
"""Tabletop commands: what a tokenizer made in place is trained on where no instructions are given."""

from __future__ import annotations

import itertools

VERBS = ("put", "pick up", "lift", "touch", "push", "pull", "place", "move", "open", "close", "stack", "turn")
COLOURS = (
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "orange",
    "cyan",
    "white",
    "black",
    "brown",
    "pink",
    "grey",
)
THINGS = (
    "cube",
    "block",
    "zone",
    "bowl",
    "plate",
    "cup",
    "drawer",
    "door",
    "box",
    "bottle",
    "button",
    "object",
)
PLACES = ("in", "on", "into", "onto", "next to", "behind", "left of", "right of", "in front of", "to")


def commands() -> list[str]:
    """Every verb, colour, thing and place, in sentences."""
    things = itertools.cycle(THINGS)
    texts = [
        f"{verb} the {colour} {next(things)} {place} the {other} {next(things)}"
        for verb, place in itertools.product(VERBS, PLACES)
        for colour, other in zip(COLOURS, reversed(COLOURS), strict=True)
    ]
    return [*texts, *(f"{verb} the {colour} {next(things)}" for verb in VERBS for colour in COLOURS)]
