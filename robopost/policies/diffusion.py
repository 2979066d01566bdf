# SPDX-License-Identifier: Apache-2.0
"""Diffusion policy: DDPM or DDIM over action chunks, through the schedulers of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, require, unknown
from robopost.nets.denoiser import build_denoiser
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.masked import masked_mean
from robopost.policies.base import Policy
from robopost.policies.flow import chunk_clip, initial_noise
from robopost.registry import POLICIES

SAMPLERS = ("ddim", "ddpm")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass
class DiffusionConfig(EncodedConfig):
    """Config of `Diffusion`."""

    name: str = "diffusion"
    horizon: int = 16
    normalise_action: str = "minmax"
    sampler: str = "ddim"  # ddim | ddpm
    prediction: str = "sample"  # sample | epsilon | v_prediction: what the network gives
    train_steps: int = 100  # noise levels in training
    steps: int = 10  # denoising steps when sampling
    beta_schedule: str = "squaredcos_cap_v2"
    backbone: str = "mlp"  # mlp | unet | transformer
    width: int = 256
    depth: int = 3

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown("policy.sampler", self.sampler, SAMPLERS)
        if self.prediction not in PREDICTIONS:
            raise unknown("policy.prediction", self.prediction, PREDICTIONS)
        if not 1 <= self.steps <= self.train_steps:
            raise ConfigError(
                f"policy.steps={self.steps} must lie in 1..{self.train_steps} (policy.train_steps)"
            )


@POLICIES.register("diffusion", config=DiffusionConfig)
class Diffusion(Policy):
    """Denoising diffusion over chunks (Chi et al. 2023; Ho et al. 2020, eq. 14; Song et al. 2021, eq. 12).

    With `deterministic` the chunk comes from DDIM with eta = 0, started at zero, whichever sampler is configured:
    the same chunk for the same observation. Where demonstrations have several modes that is a compromise between
    them, and a sample acts better.
    """

    registry_name = "diffusion"

    def __init__(self, config: DiffusionConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        self.config: DiffusionConfig = config
        self.encoder = ObsEncoder(spec, self.obs_keys, self.history, config)
        self.net = build_denoiser(
            config.backbone,
            self.horizon,
            spec.action_dim,
            self.encoder.out_dim,
            width=config.width,
            depth=config.depth,
        )
        self.clip = chunk_clip(config, spec)
        self.schedulers = {name: _scheduler(name, config, self.clip) for name in {config.sampler, "ddim"}}
        self.register_buffer("alphas", self.schedulers["ddim"].alphas_cumprod.clone(), persistent=False)
        self.alphas: Tensor

    def predict(self, x: Tensor, step: Tensor, cond: Tensor) -> Tensor:
        """Network output (B, H, A) for noisy chunks at integer noise levels `step` (B,)."""
        return self.net(x, cond, step / self.config.train_steps)

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Denoise from Gaussian noise; the chain holds every intermediate chunk, noise first."""
        cond = self.encoder(obs)
        batch, device = len(cond), cond.device
        x = initial_noise(cond, self.horizon, self.spec.action_dim, generator, deterministic)
        scheduler = self.schedulers["ddim" if deterministic else self.config.sampler]
        chain = [x]
        for step in scheduler.timesteps.tolist():
            output = self.predict(x, torch.full((batch,), step, device=device), cond)
            x = scheduler.step(output, step, x, generator=generator).prev_sample
            chain.append(x)
        return x.clamp(-self.clip, self.clip), None, torch.stack(chain, dim=1)

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


def _scheduler(name: str, config: DiffusionConfig, clip: float) -> Any:
    diffusers = require("diffusers", "diffusers")
    kind = {"ddim": diffusers.DDIMScheduler, "ddpm": diffusers.DDPMScheduler}[name]
    bounded = clip != float("inf")
    # "trailing" starts at the noisiest level, where pure noise belongs; diffusers' default starts below it.
    options = {"set_alpha_to_one": True} if name == "ddim" else {}
    scheduler = kind(
        num_train_timesteps=config.train_steps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction,
        timestep_spacing="trailing",
        clip_sample=bounded,
        clip_sample_range=clip if bounded else 1.0,
        **options,
    )
    scheduler.set_timesteps(config.steps)
    return scheduler
