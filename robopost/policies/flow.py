# SPDX-License-Identifier: Apache-2.0
"""Flow-matching policy: rectified flow and shortcut models, sampled with a few Euler steps."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.denoiser import denoise_steps
from robopost.nets.masked import masked_mean
from robopost.policies.chain import ChainPolicy, DenoiserConfig
from robopost.registry import POLICIES

VARIANTS = ("rectified", "shortcut")
PREDICTIONS = ("sample", "velocity")
SOLVERS = ("euler", "midpoint")


@dataclass(frozen=True)
class TimeGrid:
    """The times t_k = k/K, k = 0..K-1, at which `steps` solver steps begin, from noise (t = 0) to data (t = 1).

    The one place that knows the grid: training targets, the sampler and any log-probability of the chain read it
    here. A sampler on linspace(0, 1, K) with a log-probability on k/K diverges in fine-tuning.
    """

    steps: int
    solver: str = "euler"  # euler | midpoint: a second evaluation in the middle of each step

    @property
    def dt(self) -> float:
        """Length of one step."""
        return 1.0 / self.steps

    def starts(self, first: int, count: int, device: torch.device) -> Tensor:
        """(count,) times t_k at which the steps `first` .. first + count - 1 begin."""
        return torch.arange(first, first + count, device=device) / self.steps

    def points(self, device: torch.device) -> Tensor:
        """All times at which the solver asks for a velocity, in order: (K,), or (2K,) with midpoints."""
        halves = 2 if self.solver == "midpoint" else 1
        return torch.arange(self.steps * halves, device=device) / (self.steps * halves)

    def draw(self, batch: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        """(batch,) training times, uniform over [0, 1): the points of grids of any number of steps."""
        return torch.rand(batch, generator=generator, device=device)


@dataclass
class FlowConfig(DenoiserConfig):
    """Config of `Flow`; `steps` is a power of two for a shortcut model."""

    name: str = "flow"
    variant: str = "rectified"  # rectified | shortcut
    solver: str = "euler"  # euler: one evaluation per step | midpoint: two, of second order
    prediction: str = "sample"  # sample: the network gives x_1 | velocity: the network gives the velocity
    shortcut_finest: int = 64  # shortcut: smallest step is 1/this, trained by flow matching
    shortcut_fraction: float = 0.25  # shortcut: share of the batch with self-consistency targets

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise unknown("policy.variant", self.variant, VARIANTS)
        if self.solver not in SOLVERS:
            raise unknown("policy.solver", self.solver, SOLVERS)
        if self.prediction not in PREDICTIONS:
            raise unknown("policy.prediction", self.prediction, PREDICTIONS)
        if self.steps < 1:
            raise ConfigError(f"policy.steps={self.steps} must be at least 1")
        if self.variant == "shortcut":
            if self.solver != "euler":
                raise ConfigError(
                    "policy.solver=midpoint needs policy.variant=rectified: a shortcut model jumps whole steps"
                )
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


class FlowPolicy(ChainPolicy):
    """A velocity field that carries Gaussian noise (t = 0) to action chunks (t = 1), in K solver steps.

    Rectified flow (Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23): x_t = (1 - t) x_0 + t x_1, the field regresses
    x_1 - x_0. Subclasses set `grid` and say what their network gives.
    """

    registry_name = "flow"  # what errors call the family
    grid: TimeGrid

    @property
    def num_steps(self) -> int:
        """Steps K of the grid."""
        return self.grid.steps

    @property
    def rectified(self) -> bool:
        """True where the field is the velocity at a point, False where it depends on the step that is taken."""
        return True

    @property
    def prediction(self) -> str:
        """What the network's loss is the squared error of: `velocity`, or `sample` (x_1)."""
        return "velocity"

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity (B, H, A) at `x` (B, H, A) and time `t` (B,), given encoded observations `cond` (B, D)."""
        return self.velocities(x[:, None], t[:, None], cond)[:, 0]

    def velocities(self, x: Tensor, t: Tensor, cond: Tensor, net: nn.Module | None = None) -> Tensor:
        """Velocities (B, n, H, A) at n points `x` (B, n, H, A) of each sample, in one batch.

        `t` are their times: (n,) for all samples, or (B, n).
        """
        return denoise_steps(self.net if net is None else net, x, cond, t)

    @abstractmethod
    def time_embedding(self, steps: range) -> Tensor:
        """(n, T) what the network makes of the times at which `steps` begin."""

    def means(self, x: Tensor, first: int, cond: Tensor, net: nn.Module | None = None) -> Tensor:
        """See `ChainPolicy.means`: where the solver goes from each x_k."""
        dt = self.grid.dt
        t = self.grid.starts(first, x.shape[1], x.device)
        velocity = self.velocities(x, t, cond, net)
        if self.grid.solver == "midpoint":
            velocity = self.velocities(x + velocity * (dt / 2), t + dt / 2, cond, net)
        return x + velocity * dt

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Solve the flow; the chain holds x_0 .. x_K before the final clip.

        `deterministic` starts at x_0 = 0 instead of Gaussian noise: the same chunk for the same observation. Where
        demonstrations have several modes that is a compromise between them, and a sample acts better.
        """
        x = self.start(len(next(iter(obs.values()))), generator, deterministic)
        chain = self.chain(obs, x)
        return chain[-1].clamp(-self.clip, self.clip), None, torch.stack(chain, dim=1)


@POLICIES.register("flow", config=FlowConfig)
class Flow(FlowPolicy):
    """Velocity field that carries Gaussian noise to action chunks; K solver steps, no log-probability.

    A rectified flow (`FlowPolicy`) or a shortcut model. Shortcut models (Frans et al. 2024, eq. 4 and 5) also take
    the step size, and learn that one step of 2d equals two steps of d.

    With `prediction=sample` the network's output is an estimate of x_1 and the velocity is (x_1 - x) / (1 - t): a
    small network then spends nothing on reproducing the noise, and the loss is the velocity loss weighted by
    (1 - t)^2.
    """

    registry_name = "flow"

    def __init__(self, config: FlowConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: FlowConfig = config
        self.grid = TimeGrid(config.steps, config.solver)

    def build(self, config: FlowConfig) -> tuple[nn.Module, nn.Module]:
        """See `ChainPolicy.build`; a shortcut model takes the step's size too."""
        return self.build_denoiser(config, times=2 if config.variant == "shortcut" else 1)

    @property
    def rectified(self) -> bool:
        """See `FlowPolicy.rectified`."""
        return self.config.variant == "rectified"

    @property
    def prediction(self) -> str:
        """See `FlowPolicy.prediction`."""
        return self.config.prediction

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor, step: Tensor | float | None = None) -> Tensor:
        """Velocity (B, H, A) at `x` (B, H, A) and time `t` (B,), given encoded observations `cond` (B, D).

        `step` is the step a shortcut model is asked to jump, None = the grid's; rectified flow ignores it.
        """
        return self._to_velocity(self.net(x, cond, *self._times(t, step)), x, t)

    def velocities(self, x: Tensor, t: Tensor, cond: Tensor, net: nn.Module | None = None) -> Tensor:
        """Velocities (B, n, H, A) at n points `x` (B, n, H, A) of each sample, in one batch.

        `t` are their times: (n,) for all samples, or (B, n).
        """
        out = denoise_steps(self.net if net is None else net, x, cond, *self._times(t, None))
        return self._to_velocity(out, x, t)

    def output(self, x: Tensor, t: Tensor, cond: Tensor, step: Tensor | float | None = None) -> Tensor:
        """What the network gives at `x`: x_1 or the velocity, as `prediction` says."""
        return self.net(x, cond, *self._times(t, step))

    def _times(self, t: Tensor, step: Tensor | float | None) -> tuple[Tensor, ...]:
        """Time inputs of the network: a shortcut model also gets the size of its step."""
        if self.config.variant == "rectified":
            return (t,)
        size = torch.as_tensor(
            self.grid.dt if step is None else step, dtype=t.dtype, device=t.device
        ).expand_as(t)
        return t, -size.log2() / max(1, self.config.shortcut_finest.bit_length() - 1)

    def _to_velocity(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return out if self.config.prediction == "velocity" else (out - x) / (1 - t)[..., None, None]

    def time_embedding(self, steps: range) -> Tensor:
        """(n, T) what the network makes of the times at which `steps` begin."""
        t = self.grid.starts(steps.start, len(steps), self.device)
        embed = cast(nn.Module, self.net.time)
        return embed(*self._times(t, None))

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
