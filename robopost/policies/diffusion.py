# SPDX-License-Identifier: Apache-2.0
"""Diffusion policy: DDPM or DDIM over action chunks, through the schedulers of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, require, unknown
from robopost.nets.denoiser import denoise_steps
from robopost.nets.masked import masked_mean
from robopost.policies.chain import ChainPolicy, DenoiserConfig
from robopost.registry import POLICIES

SAMPLERS = ("ddim", "ddpm")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass
class DiffusionConfig(DenoiserConfig):
    """Config of `Diffusion`."""

    name: str = "diffusion"
    sampler: str = "ddim"  # ddim | ddpm
    eta: float = 0.0  # ddim: noise of a step relative to ddpm's, 0 = none
    prediction: str = "sample"  # sample | epsilon | v_prediction: what the network gives
    train_steps: int = 100  # noise levels in training
    beta_schedule: str = "squaredcos_cap_v2"

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown("policy.sampler", self.sampler, SAMPLERS)
        if self.prediction not in PREDICTIONS:
            raise unknown("policy.prediction", self.prediction, PREDICTIONS)
        if not 0 <= self.eta <= 1:
            raise ConfigError(f"policy.eta={self.eta} must lie in [0, 1]: 0 = no noise, 1 = that of ddpm")
        if not 1 <= self.steps <= self.train_steps:
            raise ConfigError(
                f"policy.steps={self.steps} must lie in 1..{self.train_steps} (policy.train_steps)"
            )


class Sampler(nn.Module):
    """Denoising steps in closed form: x_{k+1} = clean * x0_hat + current * x_k + noise * eps_hat + std * z.

    DDPM's posterior (Ho et al. 2020, eq. 7, "fixed small" variance) or DDIM (Song et al. 2021, eq. 12 and 16).
    Numbers are those of diffusers' schedulers, which give the noise levels; the closed form takes all steps of a chain
    in one batch.

    Attributes:
        levels: (K,) int64 noise level each step starts from, the noisiest first.
        signal, spread: (K, 1, 1) weights of the clean chunk and of noise at that level.
        clean, current, noise: (K, 1, 1) coefficients.
        std: (K,) coefficient.
    """

    levels: Tensor
    signal: Tensor
    spread: Tensor
    clean: Tensor
    current: Tensor
    noise: Tensor
    std: Tensor

    def __init__(self, levels: Tensor, alphas: Tensor, stride: int, kind: str, eta: float = 0.0) -> None:
        super().__init__()
        alphas = alphas.double()
        alpha = alphas[levels]
        before = levels - stride
        alpha_before = torch.where(before >= 0, alphas[before.clamp_min(0)], torch.ones_like(alpha))
        variance = (1 - alpha_before) / (1 - alpha) * (1 - alpha / alpha_before)
        if kind == "ddpm":
            clean = alpha_before.sqrt() * (1 - alpha / alpha_before) / (1 - alpha)
            current = (alpha / alpha_before).sqrt() * (1 - alpha_before) / (1 - alpha)
            noise = torch.zeros_like(alpha)
        else:
            variance = eta**2 * variance
            clean, current = alpha_before.sqrt(), torch.zeros_like(alpha)
            noise = (1 - alpha_before - variance).clamp_min(0).sqrt()
        columns = {"signal": alpha.sqrt(), "spread": (1 - alpha).sqrt()}
        columns |= {"clean": clean, "current": current, "noise": noise}
        for name, value in columns.items():  # against (B, n, H, A)
            self.register_buffer(name, value.float()[:, None, None], persistent=False)
        self.register_buffer("levels", levels.clone(), persistent=False)
        self.register_buffer("std", variance.sqrt().float(), persistent=False)
        self.stochastic = bool((variance > 0).any())


@POLICIES.register("diffusion", config=DiffusionConfig)
class Diffusion(ChainPolicy):
    """Denoising diffusion over chunks (Chi et al. 2023; Ho et al. 2020, eq. 14; Song et al. 2021, eq. 12).

    With `deterministic` the chunk comes from DDIM with eta = 0, started at zero, whichever sampler is configured:
    the same chunk for the same observation. Where demonstrations have several modes that is a compromise between
    them, and a sample acts better.
    """

    registry_name = "diffusion"

    def __init__(self, config: DiffusionConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: DiffusionConfig = config
        scheduler = _scheduler(config)
        self._levels = scheduler.timesteps.long()
        self.register_buffer("alphas", scheduler.alphas_cumprod.clone(), persistent=False)
        self.alphas: Tensor
        self.sampler = self.make_sampler(config.sampler, config.eta)
        self.noiseless = self.make_sampler("ddim")

    def make_sampler(self, kind: str, eta: float = 0.0) -> Sampler:
        """The `ddpm` or `ddim` sampler of `policy.steps` steps, on the policy's device."""
        stride = self.config.train_steps // self.config.steps
        return Sampler(self._levels, self.alphas.cpu(), stride, kind, eta).to(self.alphas.device)

    def use_sampler(self, kind: str, eta: float = 0.0) -> None:
        """Sample with `make_sampler(kind, eta)` from now on, and wherever the policy is loaded again."""
        self.config.sampler, self.config.eta = kind, eta
        self.sampler = self.make_sampler(kind, eta)

    def predict(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        """Network output (B, H, A) for noisy chunks at integer noise levels `step` (B,)."""
        return self.net(x, cond, step / self.config.train_steps)

    def means(
        self,
        x: Tensor,
        first: int,
        cond: Tensor,
        net: nn.Module | None = None,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """See `ChainPolicy.means`; `sampler` None = the configured one."""
        of = self.sampler if sampler is None else sampler
        steps = slice(first, first + x.shape[1])
        time = of.levels[steps] / self.config.train_steps
        out = denoise_steps(self.net if net is None else net, x, cond, time)
        signal, spread = of.signal[steps], of.spread[steps]
        if self.config.prediction == "sample":
            clean, noise = out, (x - signal * out) / spread
        elif self.config.prediction == "epsilon":
            clean, noise = (x - spread * out) / signal, out
        else:
            clean, noise = signal * x - spread * out, signal * out + spread * x
        clean = clean.clamp(-self.clip, self.clip)
        return of.clean[steps] * clean + of.current[steps] * x + of.noise[steps] * noise

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Denoise from Gaussian noise; the chain holds every intermediate chunk, noise first."""
        rows = len(next(iter(obs.values())))
        x = self.start(rows, generator, deterministic)
        sampler = self.noiseless if deterministic else self.sampler
        noise = None
        if sampler.stochastic:
            noise = torch.randn((rows, self.num_steps, *x.shape[1:]), generator=generator, device=x.device)
            noise = noise * sampler.std[:, None, None]
        chain = self.chain(obs, x, noise, sampler=sampler)
        return chain[-1].clamp(-self.clip, self.clip), None, torch.stack(chain, dim=1)

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Squared error of the configured prediction at a random noise level (Ho et al. 2020, eq. 14)."""
        cond = self.encoder(obs, generator)
        chunk = chunk * mask.unsqueeze(-1)  # padding must not reach the network's input either
        noise = torch.randn(chunk.shape, generator=generator, device=chunk.device)
        step = torch.randint(self.config.train_steps, (len(chunk),), generator=generator, device=chunk.device)
        alpha = self.alphas[step][:, None, None]
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        target = {"epsilon": noise, "sample": chunk, "v_prediction": signal * noise - spread * chunk}
        output = self.predict(signal * chunk + spread * noise, step, cond)
        return masked_mean((output - target[self.config.prediction]).square(), mask)


def _scheduler(config: DiffusionConfig) -> Any:
    """Noise levels and schedule from diffusers."""
    scheduler = require("diffusers", "diffusers").DDPMScheduler(
        num_train_timesteps=config.train_steps,
        beta_schedule=config.beta_schedule,
        # Starts at the noisiest level, where pure noise belongs; diffusers' default starts below it.
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(config.steps)
    return scheduler
