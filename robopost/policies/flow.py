# SPDX-License-Identifier: Apache-2.0
"""Flow-matching policy: rectified flow and shortcut models, sampled with a few Euler steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.denoiser import build_denoiser
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.masked import masked_mean
from robopost.policies.base import Policy
from robopost.registry import POLICIES

VARIANTS = ("rectified", "shortcut")
PREDICTIONS = ("sample", "velocity")


@dataclass(frozen=True)
class TimeGrid:
    """The times t_k = k/K, k = 0..K-1, of `steps` Euler steps from noise (t = 0) to data (t = 1).

    The one place that knows the grid: training targets, the sampler and any later log-probability of the
    chain read it here. A sampler on linspace(0, 1, K) with a log-probability on k/K diverges in fine-tuning.
    """

    steps: int

    @property
    def dt(self) -> float:
        """Length of one step."""
        return 1.0 / self.steps

    def time(self, k: int, batch: int, device: torch.device) -> Tensor:
        """(batch,) filled with t_k."""
        return torch.full((batch,), k / self.steps, device=device)

    def draw(self, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """(batch,) training times, uniform over [0, 1): the points of grids of any number of steps."""
        return torch.rand(batch, generator=generator, device=device)


@dataclass
class FlowConfig(EncodedConfig):
    """Config of `Flow`."""

    name: str = "flow"
    horizon: int = 16
    normalise_action: str = "minmax"
    variant: str = "rectified"  # rectified | shortcut
    steps: int = 10  # Euler steps K when sampling; a power of two for shortcut
    backbone: str = "mlp"  # mlp | unet | transformer
    width: int = 256
    depth: int = 3
    prediction: str = "sample"  # sample: the network gives x_1 | velocity: the network gives the velocity
    shortcut_finest: int = 64  # shortcut: smallest step is 1/this, trained by flow matching
    shortcut_fraction: float = 0.25  # shortcut: share of the batch with self-consistency targets

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("policy.variant", self.variant, VARIANTS)
        if self.prediction not in PREDICTIONS:
            raise unknown("policy.prediction", self.prediction, PREDICTIONS)
        if self.steps < 1:
            raise ConfigError(f"policy.steps={self.steps} must be at least 1")
        if self.variant == "shortcut":
            for name in ("steps", "shortcut_finest"):
                value = getattr(self, name)
                if value < 1 or value & (value - 1):
                    raise ConfigError(f"policy.{name}={value} must be a power of two for a shortcut model")
            if self.steps > self.shortcut_finest:
                raise ConfigError(
                    f"policy.steps={self.steps} must not exceed policy.shortcut_finest={self.shortcut_finest}"
                )
            if not 0 < self.shortcut_fraction < 1:
                raise ConfigError(f"policy.shortcut_fraction={self.shortcut_fraction} must lie in (0, 1)")


@POLICIES.register("flow", config=FlowConfig)
class Flow(Policy):
    """Velocity field that carries Gaussian noise to action chunks; K Euler steps, no log-probability.

    Rectified flow (Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23): x_t = (1 - t) x_0 + t x_1, the field
    regresses x_1 - x_0. Shortcut models (Frans et al. 2024, eq. 4 and 5) also take the step size, and learn
    that one step of 2d equals two steps of d.

    With `prediction=sample` the network's output is an estimate of x_1 and the velocity is (x_1 - x) / (1 - t): a
    small network then spends nothing on reproducing the noise, and the loss is the velocity loss weighted by
    (1 - t)^2.
    """

    registry_name = "flow"

    def __init__(self, config: FlowConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: FlowConfig = config
        self.grid = TimeGrid(config.steps)
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.net = build_denoiser(
            config.backbone,
            self.horizon,
            spec.action_dim,
            self.encoder.out_dim,
            width=config.width,
            depth=config.depth,
            times=2 if config.variant == "shortcut" else 1,
        )
        self.clip = chunk_clip(config, spec)

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor, step: Tensor | float | None = None) -> Tensor:
        """Velocity (B, H, A) at `x` (B, H, A) and time `t` (B,), given encoded observations `cond` (B, D).

        `step` is the step a shortcut model is asked to jump, None = the grid's; rectified flow ignores it.
        """
        out = self.output(x, t, cond, step)
        return out if self.config.prediction == "velocity" else (out - x) / (1 - t)[:, None, None]

    def output(self, x: Tensor, t: Tensor, cond: Tensor, step: Tensor | float | None = None) -> Tensor:
        """What the network gives at `x`: x_1 or the velocity, as `prediction` says."""
        if self.config.variant == "rectified":
            return self.net(x, cond, t)
        size = torch.as_tensor(
            self.grid.dt if step is None else step, dtype=t.dtype, device=t.device
        ).expand_as(t)
        level = -size.log2() / max(1, self.config.shortcut_finest.bit_length() - 1)
        return self.net(x, cond, t, level)

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Euler integration; the chain holds x_0 .. x_K before the final clip.

        `deterministic` starts at x_0 = 0 instead of Gaussian noise: the same chunk for the same observation. Where
        demonstrations have several modes that is a compromise between them, and a sample acts better.
        """
        cond = self.encoder(obs)
        x = initial_noise(cond, self.horizon, self.spec.action_dim, generator, deterministic)
        chain = [x]
        for k in range(self.grid.steps):
            x = x + self.velocity(x, self.grid.time(k, len(cond), x.device), cond) * self.grid.dt
            chain.append(x)
        return x.clamp(-self.clip, self.clip), None, torch.stack(chain, dim=1)

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Flow-matching loss; for shortcut models part of the batch trains self-consistency."""
        cond = self.encoder(obs, generator)
        chunk = chunk * mask.unsqueeze(-1)  # padding must not reach the network's input either
        batch, device = len(chunk), chunk.device
        x0 = torch.randn(chunk.shape, generator=generator, device=device)
        consistent = int(batch * self.config.shortcut_fraction) if self.config.variant == "shortcut" else 0
        t = self.grid.draw(batch, generator, device)
        finest = self.config.shortcut_finest
        step = torch.full((batch,), 1.0 / finest, device=device)
        if consistent:
            # t on the grid of the step it belongs to: 2d = 2^-level, t = i * 2d
            levels = finest.bit_length() - 1
            level = torch.randint(levels, (consistent,), generator=generator, device=device)
            count = 2.0**level
            step[:consistent] = 1.0 / count
            t[:consistent] = (t[:consistent] * count).floor() / count
        at = t[:, None, None]
        x = (1 - at) * x0 + at * chunk
        target = chunk - x0
        if consistent:
            c = slice(0, consistent)
            target = torch.cat([self.shortcut_target(x[c], t[c], cond[c], step[c]), target[consistent:]])
        if self.config.prediction == "sample":
            target = x + (1 - at) * target
        return masked_mean((self.output(x, t, cond, step) - target).square(), mask)

    @torch.no_grad()
    def shortcut_target(self, x: Tensor, t: Tensor, cond: Tensor, step: Tensor) -> Tensor:
        """Mean velocity of two half steps (Frans et al. 2024, eq. 4): the target of one step `step` (B,)."""
        half = step / 2
        first = self.velocity(x, t, cond, half)
        second = self.velocity(x + first * half[:, None, None], t + half, cond, half)
        return (first + second) / 2


def initial_noise(
    cond: Tensor, horizon: int, action_dim: int, generator: torch.Generator | None, deterministic: bool
) -> Tensor:
    """Start of a generative chain (B, H, A) for conditions (B, D): Gaussian noise, or its mean."""
    shape = (len(cond), horizon, action_dim)
    if deterministic:
        return torch.zeros(shape, device=cond.device)
    return torch.randn(shape, generator=generator, device=cond.device)


def chunk_clip(config: EncodedConfig, spec: Spec) -> float:
    """1 where normalised actions lie in [-1, 1] by construction, otherwise infinity."""
    inside = config.normalise_action == "minmax" or (config.normalise_action == "bounds" and spec.bounded)
    return 1.0 if inside else float("inf")
