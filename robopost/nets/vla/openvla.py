# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the layout OpenVLA and OpenVLA-OFT are released in: sizes, weights and action statistics."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from robopost.errors import CheckpointError, ConfigError
from robopost.nets.vla.language import PAD_MULTIPLE, LanguageConfig
from robopost.nets.vla.towers import TowerConfig

log = logging.getLogger(__name__)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PROPRIO = "proprio_projector.safetensors"
# Heads can't be told from the weights: those of the towers that were released.
HEADS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": 16,
    "vit_so400m_patch14_siglip_224": 16,
    "vit_so400m_patch14_siglip_384": 16,
}
# In the files, not in the model: OpenVLA reads the last but one block, before any norm and without pooling.
UNUSED = re.compile(r"featurizer\.(norm|fc_norm|attn_pool|head)\.|\.mask_token$")
SIGLIP_NAMES = {
    "patch_embed.proj": "embeddings.patch_embedding",
    "pos_embed": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn": "self_attn",
    "attn.proj": "out_proj",
}
DINO_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "pos_embed": "embeddings.position_embeddings",
    "blocks": "encoder.layer",
    "norm1": "norm1",
    "norm2": "norm2",
    "attn": "attention",
    "attn.proj": "o_proj",
}


class Shards:
    """The tensors of a folder of safetensors files, opened one at a time.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: a file is missing, damaged, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(
                f"policy.checkpoint={folder}: no such folder. Fix: policy.checkpoint=<a checkpoint in OpenVLA's layout>"
            )
        self.folder = folder
        self._files: dict[Path, dict[str, str]] = {}  # name in the file: name here
        if (folder / INDEX).is_file():
            for name, file in read_json(folder / INDEX)["weight_map"].items():
                self._files.setdefault(folder / file, {})[name] = name
        elif (folder / SINGLE).is_file():
            self._files[folder / SINGLE] = {}
        else:
            raise CheckpointError(f"{folder} has neither {INDEX} nor {SINGLE}")
        if (folder / PROPRIO).is_file():
            self._files[folder / PROPRIO] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, names in self._files.items():
            with opened(path) as file:
                held = list(file.keys())
                if not names:
                    prefix = "proprio_projector." if path.name == PROPRIO else ""
                    names |= {name: prefix + name.removeprefix(prefix) for name in held}
                if lost := sorted(names.keys() - set(held)):
                    raise CheckpointError(f"{path} lacks {lost[0]!r}, which the index says it holds")
                self.shapes |= {names[name]: tuple(file.get_slice(name).get_shape()) for name in names}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for path, names in self._files.items():
            with opened(path) as file:
                for stored, name in names.items():
                    yield name, file.get_tensor(stored)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """`path` opened by safetensors.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Fix: fetch all shards of the checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_settings(shards: Shards, siglip_heads: int, dino_heads: int) -> dict[str, Any]:
    """The settings of `TokenVLAConfig` that the checkpoint fixes; sizes of the towers come from its tensors.

    Args:
        shards: the checkpoint.
        siglip_heads: attention heads of a SigLIP tower that isn't one of the released.
        dino_heads: the same for DINOv2.

    Raises:
        CheckpointError: no image tower or language model in it that is known here.
    """
    config, shapes = read_json(shards.folder / "config.json"), shards.shapes
    text = config.get("text_config") or {}
    if text.get("model_type", "llama") != "llama":
        raise CheckpointError(
            f"{shards.folder}: its language model is {text['model_type']!r}, only llama is known"
        )
    for name in (
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
    ):
        if name not in shapes:
            raise CheckpointError(f"{shards.folder} lacks {name!r}: it is not in OpenVLA's layout")
    rows, width = shapes["language_model.model.embed_tokens.weight"]
    heads = int(text.get("num_attention_heads", 32))
    rope = text.get("rope_parameters") or {}
    language = LanguageConfig(
        width=width,
        layers=1 + max(int(n.split(".")[3]) for n in shapes if n.startswith("language_model.model.layers.")),
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        mlp=shapes["language_model.model.layers.0.mlp.gate_proj.weight"][0],
        rope_theta=float(text.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
        norm_eps=float(text.get("rms_norm_eps", 1e-6)),
    )
    towers = {"siglip": TowerConfig(layers=0), "dino": TowerConfig(layers=0)}
    ids, image_size = config.get("timm_model_ids") or [], 0
    for index, prefix in enumerate(prefixes(shapes)):
        kind = kind_of(shapes, prefix)
        spare = siglip_heads if kind == "siglip" else dino_heads
        identity = ids[index] if index < len(ids) else ""
        towers[kind], image_size = read_tower(shapes, prefix, kind, HEADS.get(identity, spare))
    return {
        **towers,
        "language": language,
        "image_size": image_size,
        "vocab": rows - int(config.get("pad_to_multiple_of", PAD_MULTIPLE)),
        "bins": int(config.get("n_action_bins", 256)),
        "slots": "zero",
        "attention": "full",
    }


def prefixes(shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Where image towers lie."""
    first = "vision_backbone.featurizer."
    found = [p for p in (first, "vision_backbone.fused_featurizer.") if f"{p}pos_embed" in shapes]
    if first not in found:
        raise CheckpointError(f"the checkpoint lacks '{first}pos_embed': it is not in OpenVLA's layout")
    return found


def kind_of(shapes: dict[str, tuple[int, ...]], prefix: str) -> str:
    """DINOv2 has a class token, SigLIP none."""
    return "dino" if f"{prefix}cls_token" in shapes else "siglip"


def read_tower(
    shapes: dict[str, tuple[int, ...]], prefix: str, kind: str, heads: int
) -> tuple[TowerConfig, int]:
    """Config of a tower and the pixels of its images."""
    _, positions, width = shapes[f"{prefix}pos_embed"]
    patch = shapes[f"{prefix}patch_embed.proj.weight"][-1]
    blocks = 1 + max(int(n.split(".")[3]) for n in shapes if n.startswith(f"{prefix}blocks."))
    side = math.isqrt(positions)  # one more position is the class token's
    config = TowerConfig(
        width=width,
        layers=blocks - 1,
        heads=heads,
        mlp=shapes[f"{prefix}blocks.0.mlp.fc1.weight"][0],
        patch=patch,
        activation="gelu",
        registers=shapes.get(f"{prefix}reg_token", (1, 0, 0))[1],
        norm=False,
    )
    return config, side * patch


def load_weights(model: nn.Module, shards: Shards) -> None:
    """Copy a checkpoint into a `TokenVLA` without adapters, strictly: every tensor has its place, every place a tensor.

    The projector of the arm's own state and learned slots may be absent: they keep their initial values.

    Raises:
        CheckpointError: a tensor is missing, left over or of another shape; the first one by name is given.
    """
    targets = dict(model.named_parameters())
    filled: set[str] = set()
    kinds = {prefix: kind_of(shards.shapes, prefix) for prefix in prefixes(shards.shapes)}
    last = {
        prefix: max(int(n.split(".")[3]) for n in shards.shapes if n.startswith(f"{prefix}blocks."))
        for prefix in kinds
    }
    left_over: list[str] = []
    with torch.no_grad():
        for name, tensor in shards:
            prefix = next((p for p in kinds if name.startswith(p)), "")
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if prefix and (UNUSED.search(name) or name.startswith(f"{prefix}blocks.{last[prefix]}.")):
                continue
            parts = places(name, tensor, prefix, kinds.get(prefix, ""))
            if not parts or any(place not in targets for place in parts):
                left_over.append(name)
                continue
            for place, value in parts.items():
                if value.shape != targets[place].shape:
                    raise CheckpointError(
                        f"{shards.folder}: {name!r} makes {place!r} {tuple(value.shape)}, "
                        f"here it is {tuple(targets[place].shape)}"
                    )
                targets[place].copy_(value)
                filled.add(place)
    missing = sorted(targets.keys() - filled)
    fresh = [name for name in missing if name.startswith(("proprio_projector.", "slots"))]
    if problem := sorted(left_over) or [name for name in missing if name not in fresh]:
        what = "has the extra tensor" if left_over else "has nothing for"
        raise CheckpointError(
            f"{shards.folder} {what} {problem[0]!r} ({len(left_over)} left over, {len(missing) - len(fresh)} missing)"
        )
    if fresh:
        log.warning("%s has no %s: they start untrained", shards.folder, ", ".join(fresh))


def places(name: str, tensor: Tensor, prefix: str, kind: str) -> dict[str, Tensor]:
    """Parameters that a tensor of the checkpoint fills; none where it is unknown."""
    if prefix:
        root = f"vision.towers.{kind}.model."
        short = name.removeprefix(prefix)
        return {root + key: value for key, value in tower_places(short, tensor, kind).items()}
    if name.startswith("language_model."):
        return {"language." + name.removeprefix("language_model."): tensor}
    if name.startswith("proprio_projector."):
        first = name.replace(".fc1.", ".0.").replace(".fc2.", ".2.")
        return {first: tensor}
    return {name: tensor} if name.startswith("projector.") else {}


def tower_places(name: str, tensor: Tensor, kind: str) -> dict[str, Tensor]:
    """Timm's names of a vision transformer to those of transformers."""
    names = SIGLIP_NAMES if kind == "siglip" else DINO_NAMES
    if name == "pos_embed":
        if kind == "siglip":
            return {names["pos_embed"]: tensor[0]}
        if math.isqrt(tensor.shape[1]) ** 2 == tensor.shape[1]:
            # timm's class token of towers with registers has its position in itself.
            tensor = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        return {names["pos_embed"]: tensor}
    if name in ("cls_token", "reg_token"):
        return {"embeddings." + name.replace("reg_token", "register_tokens"): tensor}
    if name.startswith("patch_embed.proj."):
        return {name.replace("patch_embed.proj", names["patch_embed.proj"]): tensor}
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if match is None:
        return {}
    block, rest = f"{names['blocks']}.{match[1]}.", match[2]
    head, _, tail = rest.partition(".")
    if rest.startswith("attn.qkv."):
        thirds = dict(zip("qkv", tensor.chunk(3), strict=True))
        return {f"{block}{names['attn']}.{k}_proj.{rest.split('.')[-1]}": v for k, v in thirds.items()}
    if rest.startswith("attn.proj."):
        return {f"{block}{names['attn']}.{names['attn.proj']}.{rest.split('.')[-1]}": tensor}
    if head in ("norm1", "norm2"):
        return {f"{block}{names[head]}.{tail}": tensor}
    if head in ("ls1", "ls2"):
        return {f"{block}layer_scale{head[-1]}.lambda1": tensor}
    return {block + rest: tensor} if head == "mlp" else {}


def action_statistics(folder: Path, key: str, dims: int) -> tuple[str, dict[str, Any]]:
    """The statistics that the checkpoint's actions (and state, if it has them) were normalised with.

    Args:
        folder: with dataset_statistics.json, or with `norm_stats` in its config.json.
        key: which data set (`unnorm_key`); empty = the only one.
        dims: of an action here.

    Returns:
        (key, {"action": {"q01", "q99", "mask", ...}, "proprio": ... where there is one}).

    Raises:
        ConfigError: the key is unknown or needed, or the actions have another size.
        CheckpointError: there are no statistics.
    """
    file = folder / "dataset_statistics.json"
    stats = read_json(file) if file.is_file() else read_json(folder / "config.json").get("norm_stats")
    if not stats:
        raise CheckpointError(
            f"{folder} has neither dataset_statistics.json nor norm_stats in its config.json"
        )
    if key not in stats:
        if key or len(stats) > 1:
            raise ConfigError(
                f"policy.unnorm_key={key!r}: the checkpoint has action statistics of {', '.join(sorted(stats))}"
            )
        key = next(iter(stats))
    found = stats[key]
    if len(found["action"].get("q01", ())) != dims:
        raise ConfigError(
            f"policy.unnorm_key={key!r} has {len(found['action'].get('q01', ()))} actions with quantiles, "
            f"the environment has {dims}"
        )
    return key, found
