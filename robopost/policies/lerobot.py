# SPDX-License-Identifier: Apache-2.0
"""Policies of the lerobot package (ACT, diffusion, SmolVLA, ...) behind our contract; they keep their processors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopost.data.batch import Obs, Spec
from robopost.errors import ConfigError, unknown
from robopost.nets.norm import Normaliser
from robopost.policies.base import Policy
from robopost.policies.chain import ChainConfig, with_frozen
from robopost.policies.flow_vla import TIMES, check_columns
from robopost.policies.lerobot_files import WEIGHTS, bundle, collect, find_folder, read_config, unbundle
from robopost.policies.lerobot_parts import ACTION, IMAGES, PADDED, STATE, LeRobotParts
from robopost.registry import POLICIES

STATISTICS = ("keep", "data")
SMOLVLA = "encoder.policy.model"
SMOLVLA_GROUPS = {
    "vision": tuple(f"{SMOLVLA}.vlm_with_expert.vlm.model.{part}" for part in ("vision_model", "connector")),
    "language": (f"{SMOLVLA}.vlm_with_expert.vlm.model.text_model", f"{SMOLVLA}.vlm_with_expert.vlm.lm_head"),
    "action": (SMOLVLA,),  # the rest
}


@dataclass
class LeRobotConfig(ChainConfig):
    """Config of `policy=lerobot`: horizon, history and steps are those of the policy at `path`.

    `bundle` is filled when the policy is made (its config, processors, tokenizer), so that a checkpoint is complete.
    """

    name: str = "lerobot"
    path: str = ""  # pretrained folder or hub id
    keys: dict[str, str] = field(
        default_factory=dict[str, str]
    )  # observation: feature, where names don't tell, e.g. {image: observation.images.top}
    proprio: list[int] = field(
        default_factory=lambda: [0, 0]
    )  # first column of `state` and how many (0 = the rest), where the policy knows only the arm's own
    task: str = ""  # the instruction where observations hold none
    statistics: str = (
        "keep"  # keep: the processors' own | data: those of the training data, for another robot
    )
    times: str = "beta"  # SmolVLA's training times: beta = its own, dense near noise | uniform
    normalise_obs: str = "identity"
    normalise_action: str = "identity"
    bundle: str = ""
    source: str = ""  # the `path` it came from

    def __post_init__(self) -> None:
        if self.statistics not in STATISTICS:
            raise unknown("policy.statistics", self.statistics, STATISTICS)
        check_columns(self.proprio)
        if self.times not in TIMES:
            raise unknown("policy.times", self.times, TIMES)
        for name in ("normalise_obs", "normalise_action"):
            if getattr(self, name) != "identity":
                raise ConfigError(
                    f"policy.{name}={getattr(self, name)}: a LeRobot policy normalises itself. "
                    "Fix: policy.statistics=keep or data"
                )
        if not self.path and not self.bundle:
            return
        # Loops read horizon and history from the config before the policy exists.
        stored = read_config(self.path, self.bundle)
        history = int(stored.get("n_obs_steps", 1))
        length = int(
            stored.get("chunk_size", 0) or stored.get("horizon", 0) or stored.get("n_action_steps", 1)
        )
        self.history = history
        self.horizon = length - (history - 1 if stored["type"] == "diffusion" else 0)
        self.execute = self.execute or min(int(stored.get("n_action_steps", 0)), self.horizon)
        self.steps = int(stored.get("num_steps", 0)) or self.steps


@POLICIES.register("lerobot", config=LeRobotConfig)
def lerobot(config: LeRobotConfig, spec: Spec) -> Policy:
    """Load the LeRobot policy at `config.path` (ACT, diffusion, SmolVLA, ...) for `spec`.

    Returns:
        `SmolVLA`, which is a flow policy, or a `LeRobotPolicy`.

    Raises:
        ConfigError: no path, or the policy was made for other observations or actions.
        CheckpointError: nothing usable at the path.
    """
    if not config.path and not config.bundle:
        raise ConfigError("policy.path is empty. Fix: policy.path=<LeRobot policy folder, or hub id>")
    if read_config(config.path, config.bundle)["type"] == "smolvla":
        from robopost.policies.smolvla import SmolVLA

        return SmolVLA(config, spec)
    return LeRobotPolicy(config, spec)


lerobot.module_groups = with_frozen(SMOLVLA_GROUPS)  # type: ignore[attr-defined]
lerobot.has_log_prob = False  # type: ignore[attr-defined]
lerobot.bc_loss = True  # type: ignore[attr-defined]  # all of them have one


def open_parts(config: LeRobotConfig, spec: Spec) -> LeRobotParts:
    """The policy that `config` names, with its weights where it comes from a folder; fills `config.bundle`."""
    if config.path:
        folder = find_folder(config.path)
        parts = LeRobotParts(collect(folder), spec, config)
        parts.load(folder / WEIGHTS)
        config.source, config.path = config.path, ""
        config.bundle = bundle(parts.files)
    else:
        parts = LeRobotParts(unbundle(config.bundle), spec, config)
    wanted = int(parts.settings.output_features[ACTION].shape[0])
    if wanted != spec.action_dim:
        raise ConfigError(f"{config.source} has {wanted} actions, the task has {spec.action_dim}")
    if config.statistics == "keep":
        parts.check_statistics()
    return parts


class LeRobotNormaliser(Normaliser):
    """Ours does nothing: the processors normalise. `fit` gives them the statistics of the data where asked to.

    Args:
        spec: of the policy.
        parts: whose processors normalise.
        config: its `bundle` follows the processors.
        mirror: whether actions in normalised units are the policy's own units, by the processors' affine map; else
            they are environment units.
    """

    def __init__(self, spec: Spec, parts: LeRobotParts, config: LeRobotConfig, *, mirror: bool) -> None:
        super().__init__(spec)
        self.config, self.mirror = config, mirror
        self.parts = parts
        self._follow()

    def fit(
        self,
        stats: dict[str, dict[str, Any]],
        *,
        obs: str = "identity",
        action: str = "identity",
        source: str = "",
    ) -> None:
        """See `Normaliser.fit`: the processors take mean, deviation and range of every feature they normalise."""
        self.parts.use_statistics(stats)
        self.config.bundle = bundle(self.parts.files)
        self._follow()
        self.provenance |= {"source": source, "count": int(stats.get("action", {}).get("count", 0))}

    def _follow(self) -> None:
        size = len(self.action_shift)
        with torch.no_grad():
            zero = torch.zeros(1, size, device=self.action_shift.device)
            ends = (
                [self.parts.unnormalise(zero + x)[0] for x in (0.0, 1.0)]
                if self.mirror
                else [zero[0], zero[0] + 1]
            )
            self.action_shift.copy_(ends[0])
            self.action_scale.copy_(ends[1] - ends[0])
        self.provenance = {
            "obs": "identity",
            "action": f"lerobot {self.parts.modes[ACTION]}" if self.mirror else "identity",
            "source": f"processors of {self.config.source}",
            "processors": self.parts.fingerprint(),
        }


class LeRobotPolicy(Policy):
    """Any LeRobot policy: `predict_action_chunk` and `forward` through its processors.

    Its randomness (noise, dropout, latents) comes from torch's global generator, seeded from ours at each call and
    put back afterwards.
    """

    registry_name = "lerobot"
    capturable = False

    def __init__(self, config: LeRobotConfig, spec: Spec) -> None:
        parts = open_parts(config, spec)
        super().__init__(config, spec)
        self.config: LeRobotConfig = config
        self.parts = parts
        self.model: Any = parts.policy
        self.obs_keys = [
            key for key in self.obs_keys if key in parts.keys or (parts.speaks and key == "instruction")
        ]
        self.normaliser = LeRobotNormaliser(spec, parts, config, mirror=False)
        self.normaliser_fixed = config.statistics == "keep"
        self.diffuses = parts.settings.type == "diffusion"
        if self.history > 1 and not self.diffuses:
            raise ConfigError(
                f"policy.path={config.source} is of type {parts.settings.type} and sees {self.history} observations: "
                "of those, only diffusion is supported"
            )
        if self.diffuses:
            parts.settings.do_mask_loss_for_padding = True  # our chunks end with their episode

    def sample(
        self, obs: Obs, *, generator: torch.Generator | None = None, deterministic: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One chunk per observation; `deterministic` always begins with the same noise."""
        batch = self.parts.batch(obs)
        self.model.eval()
        with torch.no_grad(), seeded(generator, self.device, fixed=deterministic):
            if self.diffuses:
                net = self.model.diffusion
                cond = net._prepare_global_conditioning(self._cameras(batch))
                # The first actions belong to observations of the past.
                chunk = net.conditional_sample(len(cond), global_cond=cond)[:, self.history - 1 :]
            else:
                chunk = self.model.predict_action_chunk(batch)
        return self.parts.unnormalise(chunk)[:, : self.horizon].to(self.device).float(), None, None

    def bc_loss(self, obs: Obs, chunk: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        """Its own training loss; padded steps are told by the key it reads (`action_is_pad`), the mean is its own."""
        batch = self.parts.batch(obs)
        action, padded = self.parts.normalise(chunk), ~mask
        if self.history > 1:  # actions of the past, which our chunks don't have
            first = self.history - 1
            action = torch.cat([action[:, :1].expand(-1, first, -1), action], dim=1)
            padded = torch.cat([torch.ones_like(padded[:, :1]).expand(-1, first), padded], dim=1)
        batch |= {ACTION: action, PADDED: padded}
        self.model.train()
        with seeded(generator, self.device):
            return self.model(self._cameras(batch) if self.diffuses else batch)[0]

    def _cameras(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Diffusion's batch: a dimension for the history, all cameras in one tensor."""
        out = dict(batch)
        cameras = list(self.parts.settings.image_features)
        if self.history == 1:
            for name in (STATE, *cameras):
                out[name] = out[name].unsqueeze(1)
        if cameras:
            out[IMAGES] = torch.stack([out[name] for name in cameras], dim=-4)
        return out

    def export(self, folder: str | Path) -> None:
        """Write a folder that lerobot's `from_pretrained` reads."""
        self.parts.export(Path(folder))


@contextlib.contextmanager
def seeded(generator: torch.Generator | None, device: torch.device, *, fixed: bool = False) -> Iterator[None]:
    """Code in this context draws from torch's global generator, seeded by `generator` (or fixed) and put back."""
    if generator is None and not fixed:
        yield
        return
    where = generator.device if generator is not None else device
    seed = 0 if fixed else int(torch.randint(2**62, (), generator=generator, device=where))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
