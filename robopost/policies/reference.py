# SPDX-License-Identifier: Apache-2.0
"""Published MLP actors stored as npz: stable-baselines3 zoo actors, DAPG policies of the Adroit hand."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopost.config import PolicyConfig
from robopost.data.batch import Obs, Spec
from robopost.errors import CheckpointError, ConfigError, unknown
from robopost.nets.mlp import MLP
from robopost.policies.base import EPISODE_STEP, Policy
from robopost.registry import POLICIES

OBS_MODES = ("plain", "time_feature", "ant27_zeros", "ant27_zeros_time")
OUTPUTS = ("tanh", "clip", "linear")
STDS = ("none", "constant", "state")
ANT_USED = 27  # Ant-v5's positions and velocities; v3 actors saw zeros in place of its contact forces
ANT_CONTACT = 84


@dataclass
class ReferenceConfig(PolicyConfig):
    """Config of `Reference`; made by `load_reference` from an npz file and its index."""

    name: str = "reference"
    normalise_obs: str = "identity"
    hidden: list[int] = field(default_factory=list)
    activation: str = "tanh"
    output: str = (
        "clip"  # tanh: scaled to the bounds | clip: environment units, clipped | linear: same, unbounded
    )
    std: str = "none"  # none | constant | state: what a stochastic action adds
    obs_mode: str = "plain"  # plain | time_feature | ant27_zeros | ant27_zeros_time
    clip_obs: float = 0.0  # clip of the standardised observation, 0 = none
    time_limit: int = 1000  # T of the time feature 1 - t/T

    def __post_init__(self) -> None:
        for key, options in (("obs_mode", OBS_MODES), ("output", OUTPUTS), ("std", STDS)):
            if getattr(self, key) not in options:
                raise unknown(f"policy.{key}", getattr(self, key), options)


@POLICIES.register("reference", config=ReferenceConfig)
class Reference(Policy):
    """MLP actor of another code base, with its own observation standardisation and features.

    Its time feature needs the step within the episode. `StepPolicy` tells it; without (`act` called on its own)
    it counts itself: row i of every call is environment i, `reset(env_mask)` marks new episodes, and a call with
    another number of rows starts anew.
    """

    registry_name = "reference"
    normaliser_fixed = True  # its own statistics are part of the weights

    def __init__(self, config: ReferenceConfig, spec: Spec) -> None:
        super().__init__(config, spec)
        if config.horizon != 1 or config.history != 1:
            raise ConfigError("policy=reference acts on one observation at a time: horizon and history are 1")
        self.config: ReferenceConfig = config
        self.in_dim = input_dim(config.obs_mode, self._width(spec))
        self.net = MLP(self.in_dim, config.hidden, spec.action_dim, config.activation)
        self.register_buffer("obs_mean", torch.zeros(self.in_dim))
        self.register_buffer("obs_std", torch.ones(self.in_dim))
        self.register_buffer("out_scale", torch.ones(spec.action_dim))
        self.register_buffer("out_shift", torch.zeros(spec.action_dim))
        self.obs_mean: Tensor
        self.obs_std: Tensor
        self.out_scale: Tensor
        self.out_shift: Tensor
        if config.std == "constant":
            self.log_std = torch.nn.Parameter(torch.zeros(spec.action_dim))
        elif config.std == "state":
            self.log_std_head = torch.nn.Linear((config.hidden or [self.in_dim])[-1], spec.action_dim)
        self.reads_step = config.obs_mode in ("time_feature", "ant27_zeros_time")
        self._steps = torch.zeros(0)

    def reset(self, env_mask: Tensor | None = None) -> None:
        """Start the step count of the environments in `env_mask` (N,) bool anew; None = of all."""
        if env_mask is None or len(env_mask) != len(self._steps):
            self._steps = torch.zeros(0)
        else:
            self._steps[env_mask.to(self._steps.device)] = 0

    def features(self, state: Tensor, step: Tensor | None = None) -> Tensor:
        """Standardised network input (B, in_dim) from raw states (B, D).

        Args:
            state: raw states.
            step: (B,) steps since each episode's start; None = as counted here, which advances the count.
        """
        if self.config.obs_mode.startswith("ant27"):
            state = torch.cat([state[:, :ANT_USED], state.new_zeros(len(state), ANT_CONTACT)], dim=-1)
        if self.reads_step:
            if step is None:
                if len(self._steps) != len(state):
                    self._steps = torch.zeros(len(state), device=state.device)
                step, self._steps = self._steps, self._steps + 1
            left = 1 - step.to(state.dtype) / self.config.time_limit
            state = torch.cat([state, left.unsqueeze(-1)], dim=-1)
        out = (state - self.obs_mean) / self.obs_std
        return out.clamp(-self.config.clip_obs, self.config.clip_obs) if self.config.clip_obs else out

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One action; stochastic where the actor brought a std."""
        *layers, last = self.net
        hidden = self.features(obs[self.obs_keys[0]], obs.get(EPISODE_STEP))
        for layer in layers:
            hidden = layer(hidden)
        out = last(hidden)
        if not deterministic and self.config.std != "none":
            log_std = (
                self.log_std if self.config.std == "constant" else self.log_std_head(hidden).clamp(-20, 2)
            )
            noise = torch.randn(out.shape, generator=generator, device=out.device)
            out = out + log_std.exp() * noise
        out = out * self.out_scale + self.out_shift
        if self.config.output == "tanh":
            return out.tanh().unsqueeze(1), None, None
        return self.normaliser.action(out).unsqueeze(1), None, None

    def _width(self, spec: Spec) -> int:
        if len(self.obs_keys) != 1 or len(spec.obs[self.obs_keys[0]][0]) != 1:
            raise ConfigError(
                f"a reference actor reads one state vector, the environment offers {', '.join(spec.obs)}. "
                "Fix: env.obs_keys=[state]"
            )
        return spec.obs[self.obs_keys[0]][0][0]


def input_dim(obs_mode: str, state_dim: int) -> int:
    """Network input size of an actor in `obs_mode` on states of `state_dim`."""
    base = ANT_USED + ANT_CONTACT if obs_mode.startswith("ant27") else state_dim
    return base + (obs_mode == "time_feature" or obs_mode.endswith("_time"))


def load_reference(path: str | Path, spec: Spec, device: torch.device | str = "cpu") -> Reference:
    """Load an npz actor described in the `index.json` beside it.

    Args:
        path: the npz file: layers `w0`, `b0`, `w1`, ... with weights (out, in).
        spec: the environment it will act in.
        device: where the policy goes.

    Raises:
        CheckpointError: unreadable, not described, or made for other observation or action sizes.
    """
    path = Path(path)
    arrays, entry = _read(path), index_entry(path)
    depth = sum(key[0] == "w" and key[1:].isdigit() for key in arrays)
    if depth == 0:
        raise CheckpointError(f"{path}: no layers w0, w1, ... in it: not a reference actor")
    dapg = "in_shift" in arrays
    std = "constant" if "log_std" in arrays else "state" if "logstd_w" in arrays else "none"
    config = ReferenceConfig(
        hidden=[len(arrays[f"b{layer}"]) for layer in range(depth - 1)],
        activation="tanh" if dapg else entry["activation"],
        output="linear" if dapg else entry["output"],
        std=std,
        obs_mode=entry.get("obs_mode", "plain"),
        clip_obs=float(entry.get("clip_obs") or 0.0),
    )
    made_for = (arrays["w0"].shape[1], arrays[f"w{depth - 1}"].shape[0])
    policy = Reference(config, spec)
    if made_for != (policy.in_dim, spec.action_dim):
        raise CheckpointError(
            f"{path} was made for {entry.get('env', 'another environment')}: inputs and actions {made_for}, "
            f"here {(policy.in_dim, spec.action_dim)}"
        )
    linears = [layer for layer in policy.net if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for layer, linear in enumerate(linears):
            linear.weight.copy_(torch.from_numpy(arrays[f"w{layer}"]))
            linear.bias.copy_(torch.from_numpy(arrays[f"b{layer}"]))
        if dapg:
            policy.obs_mean.copy_(torch.from_numpy(arrays["in_shift"]))
            policy.obs_std.copy_(torch.from_numpy(arrays["in_scale"]) + 1e-8)
            policy.out_shift.copy_(torch.from_numpy(arrays["out_shift"]))
            policy.out_scale.copy_(torch.from_numpy(arrays["out_scale"]))
        elif "obs_mean" in arrays:
            policy.obs_mean.copy_(torch.from_numpy(arrays["obs_mean"]))
            policy.obs_std.copy_(torch.from_numpy(np.sqrt(arrays["obs_var"] + (entry.get("eps") or 1e-8))))
        if std == "constant":
            policy.log_std.copy_(torch.from_numpy(arrays["log_std"]))
        elif std == "state":
            policy.log_std_head.weight.copy_(torch.from_numpy(arrays["logstd_w"]))
            policy.log_std_head.bias.copy_(torch.from_numpy(arrays["logstd_b"]))
    policy.normaliser.provenance = {"obs": "identity", "action": "bounds", "source": f"npz actor {path.name}"}
    return policy.to(device).eval()


def index_entry(path: str | Path) -> dict[str, Any]:
    """What `index.json` beside an npz actor says about it (`env`, `mean_return`, architecture, ...).

    Raises:
        CheckpointError: no index, or the file is not in it.
    """
    path = Path(path)
    index = path.with_name("index.json")
    try:
        entries = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: an npz actor needs a readable index.json beside it ({error})"
        ) from error
    for entry in entries:
        if entry["file"] == path.name:
            return entry
    raise CheckpointError(f"{index} doesn't describe {path.name!r}")


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key].astype(np.float32) for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is not a readable npz file: {error}") from error
