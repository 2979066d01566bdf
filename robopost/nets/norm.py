# SPDX-License-Identifier: Apache-2.0
"""Normalisation that travels with the policy: observations standardised or scaled, actions mapped to [-1, 1]."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Batch, Obs, Spec
from robopost.errors import ConfigError

OBS_MODES = ("identity", "meanstd", "minmax")
ACTION_MODES = ("identity", "bounds", "meanstd", "minmax", "quantile")


class Normaliser(nn.Module):
    """Affine maps per key, stored as buffers so that they are saved, moved and loaded with the policy.

    Only float observations are touched: images (uint8) and instructions pass through and are scaled by their
    encoders. Starts as the identity on observations and as "bounds" on actions: the environment's finite bounds
    map to [-1, 1], unbounded dimensions stay as they are.

    `provenance` says where statistics came from (dataset id, number of rows, mode); it is saved with the policy.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.keys = [key for key, (_, dtype) in spec.obs.items() if dtype.startswith("float")]
        self.shapes = {key: tuple(spec.obs[key][0]) for key in self.keys}
        for key in self.keys:
            self.register_buffer(f"obs_shift_{key}", torch.zeros(self.shapes[key]))
            self.register_buffer(f"obs_scale_{key}", torch.ones(self.shapes[key]))
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        finite = torch.isfinite(low) & torch.isfinite(high)
        self.register_buffer("action_shift", torch.where(finite, (low + high) / 2, torch.zeros_like(low)))
        self.register_buffer("action_scale", torch.where(finite, (high - low) / 2, torch.ones_like(low)))
        self.register_buffer("action_low", low)
        self.register_buffer("action_high", high)
        self.action_shift: Tensor
        self.action_scale: Tensor
        self.action_low: Tensor
        self.action_high: Tensor
        self.provenance: dict[str, Any] = {
            "obs": "identity",
            "action": "bounds",
            "source": "environment bounds",
        }

    def fit(
        self,
        stats: dict[str, dict[str, Any]],
        *,
        obs: str = "meanstd",
        action: str = "bounds",
        source: str = "",
    ) -> None:
        """Set the maps from dataset statistics, in place.

        Args:
            stats: key -> {"mean", "std", "min", "max", "count"}; keys are observation keys and "action", which for
                `quantile` needs "q01" and "q99" as well, and may have "mask" (A,): False leaves a dimension as it is.
            obs: one of OBS_MODES. `meanstd` divides by max(std, 1e-3), `minmax` maps the range to [-1, 1].
            action: one of ACTION_MODES. `quantile` maps the 1 % and 99 % quantiles to [-1, 1].
            source: dataset id written into `provenance`.
        """
        if obs not in OBS_MODES or action not in ACTION_MODES:
            raise ConfigError(
                f"normalise: obs={obs!r} (allowed {OBS_MODES}), action={action!r} (allowed {ACTION_MODES})"
            )
        for key in self.keys:
            if obs != "identity":
                if key not in stats:
                    raise ConfigError(
                        f"no statistics for observation key {key!r}; the data has {', '.join(stats)}"
                    )
                shift, scale = _affine(stats[key], obs)
                if shift.shape != self.shapes[key]:
                    raise ConfigError(
                        f"{key!r} has the shape {self.shapes[key]} here and {tuple(shift.shape)} in the data: "
                        "they are of different tasks"
                    )
                getattr(self, f"obs_shift_{key}").copy_(shift)
                getattr(self, f"obs_scale_{key}").copy_(scale)
        if action in ("meanstd", "minmax", "quantile"):
            shift, scale = _affine(stats["action"], action)
            if shift.shape != self.action_shift.shape:
                raise ConfigError(f"{len(self.action_shift)} actions here and {len(shift)} in the data")
            self.action_shift.copy_(shift)
            self.action_scale.copy_(scale)
        elif action == "identity":
            self.action_shift.zero_()
            self.action_scale.fill_(1.0)
        count = int(stats.get("action", {}).get("count", 0))
        self.provenance = {"obs": obs, "action": action, "source": source, "count": count}

    def fit_columns(self, key: str, columns: slice, stats: dict[str, Any], mode: str) -> None:
        """Set the map of some columns of one observation key, `mode` as in `fit` or `quantile`.

        Raises:
            ConfigError: a statistic is missing, or has another number of columns.
        """
        shift, scale = _affine(stats, mode)
        for name, values in (("shift", shift), ("scale", scale)):
            target = getattr(self, f"obs_{name}_{key}")[columns]
            if target.shape != values.shape:
                raise ConfigError(
                    f"{key!r} has {len(target)} such columns here, the statistics {len(values)}"
                )
            target.copy_(values)

    def fingerprint(self) -> str:
        """sha256 (hex) of all maps and bounds, rounded to float32: equal where two policies share their units."""
        digest = hashlib.sha256()
        for name, value in sorted(self.named_buffers()):
            if value.is_floating_point():
                # Adding 0 turns -0 into 0, which means the same.
                array = (value.detach().float().cpu() + 0.0).contiguous().numpy()
                digest.update(f"{name} {array.shape} ".encode() + array.tobytes())
        return digest.hexdigest()

    def obs(self, obs: Obs) -> Obs:
        """Normalise the float keys of `obs`; a history dimension broadcasts."""
        out = dict(obs)
        maps: Any = self._buffers
        for key in self.keys:
            if key in out:
                out[key] = (out[key].float() - maps[f"obs_shift_{key}"]) / maps[f"obs_scale_{key}"]
        return out

    def action(self, action: Tensor) -> Tensor:
        """Environment units to normalised units, any leading dimensions."""
        return (action - self.action_shift) / self.action_scale

    def unnormalise_action(self, action: Tensor) -> Tensor:
        """Normalised units to environment units, clipped to the bounds: the action that is executed."""
        raw = torch.addcmul(self.action_shift, action, self.action_scale)
        return raw.clamp(self.action_low, self.action_high)

    def batch(self, batch: Batch) -> Batch:
        """Normalise obs, next_obs and action of a batch: what `Algorithm.update` receives."""
        changed: dict[str, Any] = {"obs": self.obs(batch.obs), "next_obs": self.obs(batch.next_obs)}
        if batch.extra is not None and "next_action" in batch.extra:
            changed["extra"] = batch.extra | {"next_action": self.action(batch.extra["next_action"])}
        return replace(batch, action=self.action(batch.action), **changed)


def _affine(stats: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
    get = lambda name: torch.as_tensor(stats[name], dtype=torch.float32)  # noqa: E731
    if mode == "meanstd":
        return get("mean"), get("std").clamp_min(1e-3)
    names = ("q01", "q99") if mode == "quantile" else ("min", "max")
    missing = [name for name in names if name not in stats]
    if missing:
        raise ConfigError(
            f"normalisation by {mode} needs the statistic {missing[0]!r}, there are {', '.join(stats)}"
        )
    low, high = (get(name) for name in names)
    half = (high - low) / 2
    if stats.get("mask") is not None:
        mask = torch.as_tensor(stats["mask"], dtype=torch.bool)
        low, high, half = low * mask, high * mask, torch.where(mask, half, torch.ones_like(half))
    # A constant dimension would divide by zero: leave it centred and unscaled.
    return (high + low) / 2, torch.where(half < 1e-6, torch.ones_like(half), half)
