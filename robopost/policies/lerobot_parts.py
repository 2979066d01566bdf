# SPDX-License-Identifier: Apache-2.0
"""What a LeRobot checkpoint consists of, read, kept as text and written again; and its observations from ours."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robopost.data.batch import Obs, Spec
from robopost.errors import CheckpointError, ConfigError, require
from robopost.nets.encoder import INSTRUCTION
from robopost.policies.flow_vla import columns_of
from robopost.policies.lerobot_files import (
    BACKBONE,
    CONFIG,
    EXTRA,
    POST,
    PRE,
    TOKENIZER,
    WEIGHTS,
    read_step,
    unpacked,
)

if TYPE_CHECKING:
    from robopost.policies.lerobot import LeRobotConfig

ACTION, STATE, IMAGES, PADDED = "action", "observation.state", "observation.images", "action_is_pad"
NEEDS = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99")}
NEEDS |= {"QUANTILE10": ("q10", "q90")}


class LeRobotParts:
    """A LeRobot policy, its two processors, and which of our observations are which of its features.

    Attributes:
        policy: lerobot's `PreTrainedPolicy`, on the CPU.
        settings: its config.
        pre, post: processors.
        keys: our observation keys to its features.
    """

    def __init__(self, files: dict[str, bytes], spec: Spec, config: LeRobotConfig) -> None:
        self.files = dict(files)
        task = self.task = config.task
        factory = require("lerobot.policies.factory", EXTRA)
        settings_type = require("lerobot.configs.policies", EXTRA).PreTrainedConfig
        with unpacked(files) as folder, contextlib.redirect_stdout(io.StringIO()):
            self.settings = settings_type.from_pretrained(folder)
            name = getattr(self.settings, "vlm_model_name", None)
            if name is not None:
                self.settings.vlm_model_name = str(folder / BACKBONE)
                self.settings.load_vlm_weights = False
            self.settings.device = "cpu"
            self.policy: nn.Module = factory.get_policy_class(self.settings.type)(self.settings)
            if name is not None:
                self.settings.vlm_model_name = name
            before: dict[str, dict[str, Any]] = {}
            if read_step(files[PRE], "device_processor") is not None:
                before["device_processor"] = {"device": "cpu"}
            if read_step(files[PRE], "tokenizer_processor") is not None:
                local = folder / TOKENIZER if (folder / TOKENIZER).is_dir() else folder / BACKBONE
                # Always as many tokens: what is cached of a prefix has one size.
                before["tokenizer_processor"] = {"tokenizer_name": str(local), "padding": "max_length"}
            after = (
                {"device_processor": {"device": "cpu"}} if read_step(files[POST], "device_processor") else {}
            )
            self.pre, self.post = factory.make_pre_post_processors(
                self.settings, str(folder), preprocessor_overrides=before, postprocessor_overrides=after
            )
        self.speaks = "tokenizer_processor" in before
        self.columns: dict[str, slice] = {}
        if "state" in spec.obs:
            self.columns["state"] = columns_of(config.proprio, int(spec.obs["state"][0][0]))
        self.keys = match_keys(self.settings, spec, config.keys, self.columns)
        if self.speaks and INSTRUCTION not in spec.obs and not task:
            raise ConfigError(
                "the policy follows instructions, the observations hold none. Fix: policy.task=<what it shall do>"
            )

    def load(self, file: Path) -> None:
        """Read weights.

        Raises:
            CheckpointError: missing, corrupt, or not of this policy.
        """
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        torch_files = require("safetensors.torch", EXTRA)
        try:
            missing, _ = torch_files.load_model(self.policy, str(file), strict=False)
        except Exception as error:  # safetensors and torch raise several
            raise CheckpointError(f"{file}: {next(iter(str(error).splitlines()), error)}") from error
        if missing:
            raise CheckpointError(f"{file} lacks {sorted(missing)[0]!r} and {len(missing) - 1} more weights")

    # -- observations

    def batch(self, obs: Obs) -> dict[str, Any]:
        """Our raw observations as its preprocessed batch."""
        some = next(iter(obs.values()))
        self._go_to(some.device)
        batch: dict[str, Any] = {}
        for ours, theirs in self.keys.items():
            value = obs[ours][..., self.columns[ours]] if ours in self.columns else obs[ours]
            if value.dtype == torch.uint8:
                value = fit_image(value, self.settings.input_features[theirs].shape)
            batch[theirs] = value
        if self.speaks:
            texts = obs.get(INSTRUCTION)
            if texts is None:
                batch["task"] = [self.task] * len(some)
            else:
                texts = texts if texts.dim() == 2 else texts[:, -1]
                batch["task"] = [
                    bytes(row).rstrip(b"\0").decode("utf-8", "replace") for row in texts.cpu().numpy()
                ]
        return {key: value for key, value in self.pre(batch).items() if value is not None}

    def normalise(self, action: Tensor) -> Tensor:
        """Actions (..., A) in environment units to its units."""
        self._go_to(action.device)
        normaliser = next(step for step in self.pre.steps if hasattr(step, "_normalize_action"))
        return normaliser._normalize_action(action, inverse=False)

    def unnormalise(self, action: Tensor) -> Tensor:
        """Its actions (..., A) to environment units."""
        self._go_to(action.device)
        return self.post(action)

    def _go_to(self, device: torch.device) -> None:
        for step in (*self.pre.steps, *self.post.steps):
            if hasattr(step, "tensor_device"):
                step.tensor_device, step.device = device, device.type

    # -- statistics

    @property
    def modes(self) -> dict[str, str]:
        """Feature to the name of its normalisation mode."""
        mapping = {
            str(getattr(k, "value", k)): v.value for k, v in self.settings.normalization_mapping.items()
        }
        both = {**self.settings.input_features, **self.settings.output_features}
        return {name: mapping.get(feature.type.value, "IDENTITY") for name, feature in both.items()}

    def _normalisers(self) -> list[Any]:
        return [step for step in (*self.pre.steps, *self.post.steps) if hasattr(step, "_normalize_action")]

    def check_statistics(self) -> None:
        """Raise CheckpointError where a statistic is missing: lerobot would leave the values as they are."""
        for name, mode in self.modes.items():
            for step in self._normalisers():
                if name not in step.features or mode == "IDENTITY":
                    continue
                have = step._tensor_stats.get(name, {})
                lacking = [item for item in NEEDS[mode] if item not in have]
                if lacking and (name in self.keys.values() or name == ACTION):
                    raise CheckpointError(
                        f"the policy normalises {name!r} with {mode} and its processors have no {lacking[0]!r}. "
                        "Fix: policy.statistics=data takes those of the data"
                    )

    def use_statistics(self, stats: dict[str, dict[str, Any]]) -> None:
        """Replace the processors' statistics by those of a dataset of ours.

        Raises:
            ConfigError: the data has none for a feature, or a mode needs quantiles.
        """
        names = {**self.keys, ACTION: ACTION}
        modes = self.modes
        table: dict[str, dict[str, Any]] = {}
        for ours, theirs in names.items():
            mode = modes[theirs]
            if mode == "IDENTITY":
                continue
            lacking = [item for item in NEEDS[mode] if item not in stats.get(ours, {})]
            if lacking:
                raise ConfigError(
                    f"the policy normalises {theirs!r} with {mode}, the data has no {lacking[0]!r} of {ours!r}. "
                    "Fix: policy.statistics=keep"
                )
            values = {key: torch.as_tensor(stats[ours][key], dtype=torch.float32) for key in NEEDS[mode]}
            if ours in self.columns:
                values = {key: value[self.columns[ours]] for key, value in values.items()}
            if theirs.startswith("observation.image"):
                values = {key: value.view(-1, 1, 1) / 255 for key, value in values.items()}
            table[theirs] = values
        for step in self._normalisers():
            known = {name: values for name, values in table.items() if name in step.features}
            step.stats = {name: {k: v.numpy() for k, v in values.items()} for name, values in known.items()}
            step._tensor_stats = {
                name: {k: v.to(step.device or "cpu") for k, v in values.items()}
                for name, values in known.items()
            }
        self._store_processors()

    def _store_processors(self) -> None:
        """Put the processors as they are now into `files`."""
        old = {
            name for name in self.files if name.startswith(("policy_preprocessor", "policy_postprocessor"))
        }
        with tempfile.TemporaryDirectory(prefix="robopost-lerobot-") as out:
            for processor in (self.pre, self.post):
                processor.save_pretrained(out)
            fresh = {path.name: path.read_bytes() for path in Path(out).iterdir()}
        kept = {name: data for name, data in self.files.items() if name not in old}
        named = read_step(self.files[PRE], "tokenizer_processor")
        self.files = kept | fresh
        if named is not None:  # the name it had, not the folder it was read from
            plain = json.loads(self.files[PRE])
            for step in plain["steps"]:
                if step.get("registry_name") == "tokenizer_processor":
                    step["config"] = named
            self.files[PRE] = json.dumps(plain, indent=2).encode()

    def fingerprint(self) -> str:
        """sha256 of all statistics: policies that act in the same units have the same."""
        digest = hashlib.sha256()
        for step in self._normalisers():
            for name, value in sorted(step.state_dict().items()):
                digest.update(name.encode() + value.cpu().float().numpy().tobytes())
        return digest.hexdigest()

    # -- writing

    def export(self, folder: Path) -> None:
        """Write a folder that lerobot's `from_pretrained` reads."""
        folder.mkdir(parents=True, exist_ok=False)
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        if (folder / BACKBONE).is_dir():  # by path, so that the folder is complete
            where = str((folder / BACKBONE).resolve())
            config = json.loads((folder / CONFIG).read_text())
            old, config["vlm_model_name"], config["load_vlm_weights"] = config["vlm_model_name"], where, False
            (folder / CONFIG).write_text(json.dumps(config, indent=2))
            plain = json.loads((folder / PRE).read_text())
            for step in plain["steps"]:
                if step.get("config", {}).get("tokenizer_name") == old:
                    step["config"]["tokenizer_name"] = where
            (folder / PRE).write_text(json.dumps(plain, indent=2))
        twin = copy.deepcopy(self.policy).to("cpu")
        require("safetensors.torch", EXTRA).save_model(twin, str(folder / WEIGHTS))


def match_keys(settings: Any, spec: Spec, given: dict[str, str], columns: dict[str, slice]) -> dict[str, str]:
    """Our observation keys to the policy's input features.

    `state` is `observation.state`, `image_<camera>` is `observation.images.<camera>`, `image` is `observation.image`
    or the only camera, `<name>` is `observation.<name>`; `given` overrules that.

    Raises:
        ConfigError: a feature without an observation, or of another size.
    """
    features = {name: item for name, item in settings.input_features.items() if "empty_camera" not in name}
    visual = [name for name, item in features.items() if item.type.value == "VISUAL"]
    found: dict[str, str] = {}
    for key, (shape, dtype) in spec.obs.items():
        if key == INSTRUCTION:
            continue
        camera = dtype == "uint8" and len(shape) == 3
        if key in given:
            guesses = [given[key]]
        elif camera and key == "image":
            guesses = ["observation.image", f"{IMAGES}.image", *(visual if len(visual) == 1 else [])]
        elif camera:
            guesses = [f"{IMAGES}.{key.removeprefix('image_')}"]
        else:
            guesses = [f"observation.{key}"]
        for name in guesses:
            if name in features and name not in found.values():
                found[key] = name
                break
    for name, item in features.items():
        ours = next((key for key, theirs in found.items() if theirs == name), None)
        if ours is None:
            raise ConfigError(
                f"the policy observes {name!r}, the observations are {', '.join(spec.obs)}. "
                f"Fix: policy.keys={{<observation>: {name}}}"
            )
        shape = tuple(spec.obs[ours][0])
        if ours in columns:
            shape = (columns[ours].stop - columns[ours].start,)
        if item.type.value != "VISUAL" and shape != tuple(item.shape):
            raise ConfigError(
                f"the policy's {name!r} has shape {tuple(item.shape)}, {ours!r} here has {shape}"
            )
    return found


def fit_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Images (..., H, W, C) uint8 to (..., C, H', W') float32 in [0, 1], scaled to the declared `shape`."""
    x = image.movedim(-1, -3).float() / 255
    if tuple(x.shape[-2:]) == tuple(shape[-2:]):
        return x
    flat = x.flatten(0, -4)
    sized = torch.nn.functional.interpolate(flat, tuple(shape[-2:]), mode="bilinear", antialias=True)
    return sized.unflatten(0, x.shape[:-3])
