# SPDX-License-Identifier: Apache-2.0
"""Any Gymnasium observation space as robopost's flat dict: `state`, `image` or `image_<camera>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from robopost.errors import EnvError, unknown

IMAGE_NAMES = ("image", "pixels", "rgb", "observation")
# Goal environments: what the robot sees, where it is, where it should be. Other dicts keep their own order.
GOAL_KEYS = ("observation", "achieved_goal", "desired_goal")


class Observe(Protocol):
    """Maps one environment's observations to the dict contract; `space` describes the result."""

    space: gym.spaces.Dict

    def __call__(self, raw: Any) -> dict[str, np.ndarray]:
        """Convert one observation."""
        ...


class PlainDict:
    """For environments that offer the dict contract already: floating-point values become float32."""

    def __init__(self, space: gym.Space) -> None:
        if not isinstance(space, gym.spaces.Dict):
            raise EnvError(f"expected a Dict of observations, got {space}")
        self.space = space

    def __call__(self, raw: Any) -> dict[str, np.ndarray]:
        """Convert one observation."""
        arrays = {key: np.asarray(value) for key, value in raw.items()}
        return {key: a.astype(np.float32) if a.dtype.kind == "f" else a for key, a in arrays.items()}


class ObservationAdapter:
    """Maps observations of `space` to robopost's dict.

    Vectors and scalars (nested dicts included) are concatenated into `state`, float32, in the order of the
    space; goal dicts in the order observation, achieved_goal, desired_goal. uint8 arrays (H, W, C) are
    images; a single one, or one called `pixels` / `rgb`, becomes `image`, others `image_<name>`.

    Attributes:
        space: `gymnasium.spaces.Dict` of the result.
        parts: what `state` is made of, as (path, size), in order.

    Raises:
        EnvError: a part is neither a vector nor an image.
    """

    def __init__(self, space: gym.Space) -> None:
        vectors: list[tuple[tuple[str, ...], gym.spaces.Box]] = []
        images: list[tuple[tuple[str, ...], gym.spaces.Box]] = []
        for path, leaf in _leaves(space):
            if not isinstance(leaf, gym.spaces.Box):
                where = "/".join(path) or "observation"
                raise EnvError(f"{where} is a {leaf}: robopost needs Box observations or dicts of them")
            if len(leaf.shape) > 2 and not _is_image(leaf):
                raise EnvError(
                    f"{'/'.join(path) or 'observation'} has shape {leaf.shape} and dtype {leaf.dtype}: "
                    "images must be uint8 (H, W, C)"
                )
            (images if _is_image(leaf) else vectors).append((path, leaf))
        self.parts = [("/".join(path), int(np.prod(leaf.shape))) for path, leaf in vectors]
        self._vectors = [path for path, _ in vectors]
        self._images = {_image_key(path, len(images)): path for path, _ in images}
        spaces: dict[str, gym.Space] = {}
        if vectors:
            low = np.concatenate([leaf.low.ravel().astype(np.float32) for _, leaf in vectors])
            high = np.concatenate([leaf.high.ravel().astype(np.float32) for _, leaf in vectors])
            spaces["state"] = gym.spaces.Box(low, high, dtype=np.float32)
        for (_, leaf), key in zip(images, self._images, strict=True):
            spaces[key] = gym.spaces.Box(0, 255, leaf.shape, np.uint8)
        self.space = gym.spaces.Dict(spaces)

    def __call__(self, raw: Any) -> dict[str, np.ndarray]:
        """Convert one observation."""
        out: dict[str, np.ndarray] = {}
        if self._vectors:
            pieces = [np.asarray(_get(raw, path), dtype=np.float32).ravel() for path in self._vectors]
            out["state"] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        for key, path in self._images.items():
            out[key] = np.asarray(_get(raw, path))
        return out


class BatchAdapter(ObservationAdapter):
    """The same mapping over a batch of torch tensors (N, ...), on their device; results are new tensors."""

    def __call__(self, raw: Any) -> dict[str, Any]:
        """Convert a batch of observations."""
        import torch

        out: dict[str, Any] = {}
        if self._vectors:
            flat = [_get(raw, path) for path in self._vectors]
            pieces = [value.reshape(len(value), -1).to(torch.float32) for value in flat]
            out["state"] = torch.cat(pieces, dim=1)
        for key, path in self._images.items():
            image = _get(raw, path)
            if image.dtype != torch.uint8:
                name = "/".join(path)
                raise EnvError(
                    f"{name} is {image.dtype}, images must be uint8. Fix: normalize=False in its term"
                )
            out[key] = image.clone()
        return out


def select(space: gym.spaces.Dict, keys: list[str]) -> gym.spaces.Dict:
    """The spaces of `keys` (empty = all).

    Raises:
        EnvError: a key the environment does not offer.
    """
    for key in keys:
        if key not in space.spaces:
            raise unknown("env.obs_keys entry", key, space.spaces, EnvError)
    return gym.spaces.Dict({key: space[key] for key in (keys or space.spaces)})


def _leaves(space: gym.Space, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], gym.Space]]:
    if not isinstance(space, gym.spaces.Dict):
        return [(path, space)]
    names = list(space.spaces)
    if set(names) == set(GOAL_KEYS):
        names = list(GOAL_KEYS)
    return [leaf for name in names for leaf in _leaves(space.spaces[name], (*path, name))]


def _get(raw: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        raw = raw[name]
    return raw


def _is_image(space: gym.spaces.Box) -> bool:
    return space.dtype == np.uint8 and len(space.shape) == 3


def _image_key(path: tuple[str, ...], count: int) -> str:
    name = path[-1] if path else ""
    return "image" if count == 1 or name in IMAGE_NAMES else f"image_{name.removeprefix('image_')}"


def stack(rows: Sequence[Mapping[str, np.ndarray]], keys: list[str]) -> dict[str, np.ndarray]:
    """Rows of N environments as one dict of (N, ...) arrays."""
    return {key: np.stack([row[key] for row in rows]) for key in keys}
