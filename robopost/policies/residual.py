# SPDX-License-Identifier: Apache-2.0
"""A bounded correction on top of a frozen policy: a = clip(a_base + kappa * tanh(f(obs, a_base)), -1, 1).

The correction starts at exactly zero, so training starts from the base policy's behaviour (ResFiT, arXiv 2509.19301).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robopost.artefacts.checkpoint import find_policy, load_json, load_policy
from robopost.compose import policy_config_from_dict, to_dict
from robopost.data.batch import Obs, Spec, below
from robopost.data.dataset import Dataset
from robopost.errors import CheckpointError, ConfigError
from robopost.nets.encoder import EncodedConfig, ObsEncoder
from robopost.nets.mlp import MLP
from robopost.policies.base import EPISODE_STEP, Action, Policy, build_policy
from robopost.policies.chunked import StepPolicy
from robopost.policies.pretrained import check_fits
from robopost.registry import POLICIES
from robopost.vector import Arrays, Step, VecEnv, to_torch

BASE_ACTION = "base_action"
FEATURES = "features"  # under which `encode` gives the encoded observation
LABEL_BATCH = 4096  # frames of demonstrations the base policy answers at once


@dataclass
class ResidualConfig(EncodedConfig):
    """Config of `residual`; `base` is the policy to improve."""

    name: str = "residual"
    base: str = ""  # run folder, checkpoint or policy folder of the base policy
    # Filled from `base`; they travel with the checkpoint, which then needs nothing else.
    base_config: dict[str, Any] = field(default_factory=dict)
    base_spec: dict[str, Any] = field(default_factory=dict)
    scale: float = 0.2  # kappa: largest correction, as a fraction of half the action range
    hidden: list[int] = field(default_factory=lambda: [256, 256])
    layernorm: bool = False  # before each activation of the correction's network
    warmup_noise: float = 0.2  # uniform noise on the base action during warm-up, same unit as scale

    def __post_init__(self) -> None:
        if not 0.0 < self.scale <= 2.0:
            raise ConfigError(
                f"policy.scale={self.scale} must lie in (0, 2]: a fraction of half the action range"
            )
        if self.horizon != 1 or self.execute not in (0, 1):
            raise ConfigError("policy.horizon of a residual policy is 1: it corrects every executed step")
        if self.base and not self.base_config:
            # Loops stack the history that the config names, before the policy exists.
            with contextlib.suppress(CheckpointError):  # building the policy names what is wrong
                stored = load_json(find_policy(self.base) / "policy.json")["config"]
                self.history = int(stored.get("history", 1))


@POLICIES.register("residual", config=ResidualConfig)
class ResidualPolicy(Policy):
    """Frozen base policy of any class plus a bounded per-step correction.

    Observations carry `base_action` (A,) in environment units: during training `wrap_env` adds it, in `act` the
    policy computes it itself when it is absent. The base keeps one chunk queue per environment.
    """

    registry_name = "residual"
    wraps_env = True
    own_keys = (BASE_ACTION,)
    normaliser_fixed = True  # the base policy's

    def __init__(self, config: ResidualConfig, spec: Spec, base: Policy | None = None) -> None:
        """Build the correction of `base`, or of the policy that `config` names.

        Raises:
            ConfigError: there is none, or it can't act in an environment of `spec`.
        """
        if base is None and config.base_config:
            stored = Spec.from_json(config.base_spec) if config.base_spec else _without_base(spec)
            base = build_policy(policy_config_from_dict(config.base_config), stored)
        else:
            if base is None and not config.base:
                raise ConfigError(
                    "policy.base is empty: a residual policy corrects another one. Fix: policy.base=<run>"
                )
            base = load_policy(config.base) if base is None else base
            config = replace(config, base_config=to_dict(base.config), base_spec=base.spec.to_json())
            _check_base(base, _without_base(spec))
        shape = ((spec.action_dim,), "float32")
        super().__init__(
            replace(config, history=base.history), replace(spec, obs=spec.obs | {BASE_ACTION: shape})
        )
        self.obs_keys = [*base.obs_keys, BASE_ACTION]
        self.base = base.requires_grad_(False)
        self._copy_normaliser(base)
        keys = [key for key in self.obs_keys if key != BASE_ACTION]
        self.encoder = ObsEncoder(base.spec, keys, base.history, config)
        self.net = MLP(
            self.encoder.out_dim + spec.action_dim,
            config.hidden,
            spec.action_dim,
            layernorm=config.layernorm,
        )
        last = [module for module in self.net.modules() if isinstance(module, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self._runner: StepPolicy | None = None

    def _copy_normaliser(self, base: Policy) -> None:
        """Observations as the base sees them; actions where it maps a range to [-1, 1], else the spec's bounds."""
        source, target = base.normaliser.state_dict(), self.normaliser.state_dict()
        provenance = dict(base.normaliser.provenance)
        ranged = (provenance.get("action") == "minmax") or (
            provenance.get("action") == "bounds" and base.spec.bounded
        )
        wanted = [key for key in source if key.startswith("obs_") and key in target]
        wanted += ["action_shift", "action_scale"] if ranged else []
        for key in wanted:
            target[key].copy_(source[key])
        # Critics read the base action too: in the units of the actions beside it.
        target[f"obs_shift_{BASE_ACTION}"].copy_(target["action_shift"])
        target[f"obs_scale_{BASE_ACTION}"].copy_(target["action_scale"])
        self.normaliser.provenance = provenance | ({} if ranged else {"action": "bounds"})

    def encode(self, obs: Obs, augment: torch.Generator | None = None) -> Obs:
        """Normalised observations to what the correction reads: `features` (B, D) and `base_action` (B, A).

        Critics that read the same share the encoder with it. `augment` shifts images at random.
        """
        return {FEATURES: self.encoder(obs, augment), BASE_ACTION: _newest(obs[BASE_ACTION])}

    def correction(self, encoded: Obs, net: MLP | None = None) -> Tensor:
        """Correction (B, A) in [-scale, scale], normalised units; `net` replaces the network, e.g. by its target."""
        inputs = torch.cat([encoded[FEATURES], encoded[BASE_ACTION]], dim=-1)
        return self.config.scale * torch.tanh((self.net if net is None else net)(inputs))

    def draw(
        self, encoded: Obs, generator: torch.Generator | None, deterministic: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is added to the base action (B, A), with `log_prob` and `chain` as `sample` gives them."""
        return self.correction(encoded), None, None

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Corrected action (B, 1, A), normalised; the correction is deterministic."""
        encoded = self.encode(obs)
        change, log_prob, chain = self.draw(encoded, generator, deterministic)
        return (encoded[BASE_ACTION] + change).clamp(-1.0, 1.0)[:, None], log_prob, chain

    def executed(self, obs: Obs, change: Tensor) -> Tensor:
        """The base action in raw observations, changed by `change` (B, A) in normalised units: environment units.

        It is `sample`'s action, but for rounding: where `change` is 0 it is the base action to the bit.
        """
        base, normaliser = _newest(obs[BASE_ACTION]), self.normaliser
        start = normaliser.action(base)
        change = change.maximum((-1 - start).clamp_max(0)).minimum((1 - start).clamp_min(0))
        raw = base + change * normaliser.action_scale
        return raw.maximum(normaliser.action_low).minimum(normaliser.action_high)

    @torch.no_grad()
    def act(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> Action:
        """See `Policy.act`; queries the base policy where observations don't carry its action."""
        if BASE_ACTION not in obs:
            obs = obs | {BASE_ACTION: self._with_history(self.base_action(obs, generator=generator))}
        encoded = self.encode(self.normaliser.obs(obs))
        change, log_prob, chain = self.draw(encoded, generator, deterministic)
        return Action(self.executed(obs, change)[:, None], log_prob, chain)

    def base_action(
        self, obs: Obs, *, generator: torch.Generator | None = None, only: Tensor | None = None
    ) -> Tensor:
        """Next base action (N, A) in environment units of every environment, taking one step off its queue."""
        rows = next(iter(obs.values())).shape[0]
        if self._runner is None or self._runner.num_envs != rows:
            self._runner = StepPolicy(self.base, rows)
        return self._runner.act(obs, generator=generator, deterministic=True, only=only)

    def reset(self, env_mask: Tensor | None = None) -> None:
        """Forget the base policy's queues of ended episodes."""
        if self._runner is not None:
            self._runner.reset(env_mask)

    def random_action(self, obs: Obs, generator: torch.Generator) -> Tensor:
        """Base action plus uniform noise: warm-up data stays near the base policy."""
        base = _newest(obs[BASE_ACTION])
        noise = torch.rand(base.shape, generator=generator, device=base.device) * 2 - 1
        return self.executed(obs, self.config.warmup_noise * noise)

    def wrap_env(self, env: VecEnv) -> VecEnv:
        """Add `base_action` to the observations of `env`."""
        return BaseActionEnv(env, self)

    @torch.no_grad()
    def label_demos(self, demos: Dataset) -> Dataset:
        """Add the base action along demonstrations, as if the base policy had been asked while they were executed.

        The base is queried only where its queue would refill, all those frames in batches; its queue starts empty in
        every episode.
        """
        first = demos.first_rows()
        row = torch.arange(len(first), device=first.device)
        asked = row - (row - first) % self.base.execute
        labels = torch.empty(len(first), self.spec.action_dim)
        queries = torch.unique(asked)
        back = torch.arange(1 - self.history, 1, device=first.device)
        for part in queries.split(LABEL_BATCH):
            past = torch.maximum(part[:, None] + back, first[part][:, None])
            obs = {key: demos.obs[key][past if self.history > 1 else part] for key in self.base.obs_keys}
            if self.base.reads_step:
                obs[EPISODE_STEP] = part - first[part]
            chunk = self.base.act(
                {k: v.to(self.device) for k, v in obs.items()}, deterministic=True
            ).chunk.cpu()
            for offset in range(self.base.execute):
                at = part + offset
                inside = at < len(first)
                same = inside & (asked[at.clamp_max(len(first) - 1)] == part)
                labels[at[same].cpu()] = chunk[same.cpu(), offset]
        return demos.with_obs(BASE_ACTION, labels)

    def _with_history(self, action: Tensor) -> Tensor:
        return action if self.history == 1 else action[:, None].expand(-1, self.history, -1)


class BaseActionEnv(VecEnv):
    """Adds the base policy's next action to `obs` and `next_obs` (both needed by a temporal-difference target).

    At an episode's end `next_obs` carries the base action for the true final observation, then the queue of that
    environment is emptied, for terminations and time limits alike.
    """

    def __init__(self, env: VecEnv, policy: ResidualPolicy) -> None:
        # Not calling super().__init__: this wraps a VecEnv, not a gymnasium environment.
        self.inner = env
        self.env = env.env
        self.num_envs = env.num_envs
        self.history = env.history
        self.spec = policy.spec
        self.policy = policy
        self._runner = StepPolicy(policy.base, env.num_envs)

    def reset(self, seed: Any = None, options: dict[str, Any] | None = None) -> Arrays:
        """See `VecEnv.reset`."""
        obs = self.inner.reset(seed, options)
        self._runner.reset()
        return self._with(obs, self._query(obs))

    def step(self, action: np.ndarray) -> Step:
        """See `VecEnv.step`."""
        step = self.inner.step(action)
        base = self._query(step.next_obs)
        next_obs = self._with(step.next_obs, base)
        if not step.done.any():
            return replace(step, obs=next_obs, next_obs=next_obs)
        ended = torch.from_numpy(step.done)
        self._runner.reset(ended)
        fresh = np.where(step.done[:, None], self._query(step.obs, only=ended), base)
        return replace(step, obs=self._with(step.obs, fresh), next_obs=next_obs)

    def get_state(self) -> Arrays:
        """See `VecEnv.get_state`; includes the base policy's queues."""
        queues = {f"base/{key}": value.cpu().numpy() for key, value in self._runner.state_dict().items()}
        return self.inner.get_state() | queues

    def set_state(self, state: Arrays) -> None:
        """See `VecEnv.set_state`."""
        self.inner.set_state({key: value for key, value in state.items() if not key.startswith("base/")})
        queues = {key: torch.from_numpy(value) for key, value in below(state, "base/").items()}
        self._runner.load_state_dict(queues)

    def close(self) -> None:
        """See `VecEnv.close`."""
        self.inner.close()

    def _query(self, obs: Arrays, only: Tensor | None = None) -> np.ndarray:
        tensors = to_torch(obs, self.policy.device)
        return self._runner.act(tensors, deterministic=True, only=only).cpu().numpy()

    def _with(self, obs: Arrays, base: np.ndarray) -> Arrays:
        if self.history > 1:
            base = np.repeat(base[:, None], self.history, axis=1)
        return obs | {BASE_ACTION: base.copy()}


def _newest(action: Tensor) -> Tensor:
    """Of a history of base actions (B, h, A) the one to correct."""
    return action[:, -1] if action.dim() == 3 else action


def _check_base(base: Policy, env: Spec) -> None:
    """Raise ConfigError where `base` can't act in an environment of `env`, or can't be corrected."""
    if BASE_ACTION in base.own_keys:
        raise ConfigError(
            "the base policy is a residual policy itself. Fix: policy=<that run> to go on with its correction"
        )
    check_fits(base, env, "the base policy")
    for key in base.obs_keys:
        wanted, offered = base.spec.obs[key][1], env.obs[key][1]
        if wanted != offered:
            raise ConfigError(f"observation {key!r}: the base policy expects {wanted}, got {offered}")
    if 0 < env.max_steps < base.execute:
        raise ConfigError(
            f"the base policy executes chunks of {base.execute} steps, episodes here end after {env.max_steps}: "
            "it was made for another task. Fix: policy.base=<run>, or a larger env.max_steps"
        )
    for name, value in base.normaliser.state_dict().items():
        if name in ("action_low", "action_high"):
            continue
        if not torch.isfinite(value).all() or ("_scale" in name and not (value > 0).all()):
            raise ConfigError(
                f"the base policy's normaliser has {name} with values that are not finite or not above 0. "
                "Fix: clone it again from data that `robopost data verify` accepts"
            )


def _without_base(spec: Spec) -> Spec:
    return replace(spec, obs={key: value for key, value in spec.obs.items() if key != BASE_ACTION})
