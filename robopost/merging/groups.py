# SPDX-License-Identifier: Apache-2.0
"""Which module a parameter belongs to: explicit prefixes per model family, and an error for what none of them covers.

The released RETAIN code assigns by substring ("img", "llm" without "_1"), which puts a renamed parameter silently into
the wrong module. Here a family is a table of prefixes, and a parameter that no prefix covers stops the merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from robopost.errors import ConfigError, unknown

Groups = Mapping[str, tuple[str, ...]]
NORMALISER = {"normaliser", "normalize_inputs", "normalize_targets", "unnormalize_outputs", "normalizer"}
_PROJECTIONS = (
    "state_proj",
    "action_in_proj",
    "action_out_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "time_mlp_in",
    "time_mlp_out",
)
_VLM = "paligemma_with_expert.paligemma"
_OPENPI: dict[str, tuple[str, ...]] = {
    "vision": (
        f"{_VLM}.model.vision_tower",
        f"{_VLM}.model.multi_modal_projector",
        f"{_VLM}.vision_tower",
        f"{_VLM}.multi_modal_projector",
    ),
    "language": (f"{_VLM}.model.language_model", f"{_VLM}.language_model", f"{_VLM}.lm_head"),
    "action": ("paligemma_with_expert.gemma_expert", *_PROJECTIONS),
}


def _under(prefix: str, groups: Groups) -> dict[str, tuple[str, ...]]:
    return {name: tuple(f"{prefix}.{item}" for item in items) for name, items in groups.items()}


def _with_frozen(groups: Groups) -> dict[str, tuple[str, ...]]:
    """With the frozen copies that flow and diffusion policies keep of the first steps of their chain."""
    copies = _under("frozen", groups)
    return {name: (*items, *copies[name]) for name, items in groups.items()}


_SMOLVLA: dict[str, tuple[str, ...]] = {
    "vision": ("vlm_with_expert.vlm.model.vision_model", "vlm_with_expert.vlm.model.connector"),
    "language": ("vlm_with_expert.vlm.model.text_model", "vlm_with_expert.vlm.lm_head"),
    "action": ("vlm_with_expert.lm_expert", *_PROJECTIONS),
}
# Families in the order in which they are tried: the first that covers every parameter is taken.
FAMILIES: dict[str, Groups] = {
    "robopost": _with_frozen(
        {
            "vision": (
                "encoder.images",
                "encoder.vlm.vision_tower",
                "encoder.vlm.multi_modal_projector",
            ),
            "language": ("encoder.instruction", "encoder.vlm.language_model"),
            "action": ("net", "log_std", "balance"),
        }
    ),
    "smolvla": _under("model", _SMOLVLA),
    "pi0": _under("model", _OPENPI),
    "openpi": _OPENPI,
    "pi0_transformers": {
        "vision": ("model.vlm.vision_tower", "model.vlm.multi_modal_projector"),
        "language": ("model.vlm.language_model",),
        "action": ("model.dit", "embed_action_time", "action_out_proj"),
    },
    "openvla": {
        "vision": ("vision_backbone", "projector"),
        "language": ("language_model",),
        "action": ("action_head", "proprio_projector", "noisy_action_projector"),
    },
}


def is_normaliser(name: str) -> bool:
    """True for a tensor of a normaliser, which is part of the model's units and is never merged."""
    return not NORMALISER.isdisjoint(name.split("."))


def group_of(name: str, groups: Groups) -> str | None:
    """The group of a parameter by its longest matching prefix, whole name parts only; None where none matches."""
    best, length = None, -1
    for group, prefixes in groups.items():
        for prefix in prefixes:
            if (name == prefix or name.startswith(f"{prefix}.")) and len(prefix) > length:
                best, length = group, len(prefix)
    return best


def find_groups(
    names: Iterable[str], choice: str = "auto", own: Groups | None = None
) -> tuple[str, dict[str, str]]:
    """Assign every parameter to a group.

    Args:
        names: parameters, without normalisers.
        choice: `auto`, a name of `FAMILIES`, a JSON file {group: [prefix, ...]}, or `group:prefix+prefix,group:...`.
        own: groups that the policy's class declares (`module_groups`), tried first by `auto`.

    Returns:
        (name of the family, parameter -> group).

    Raises:
        ConfigError: a parameter matches no group.
    """
    names = list(names)
    if choice != "auto":
        family, groups = _chosen(choice)
        return family, _assign(names, family, groups)
    tables: dict[str, Groups] = ({"the policy's own": own} if own else {}) | FAMILIES
    covered = {
        family: sum(group_of(name, groups) is not None for name in names) for family, groups in tables.items()
    }
    family = max(covered, key=lambda item: covered[item])
    return family, _assign(names, family, tables[family])


def _assign(names: list[str], family: str, groups: Groups) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        group = group_of(name, groups)
        if group is None:
            missing = sum(group_of(item, groups) is None for item in names)
            raise ConfigError(
                f"modules=: parameter {name!r} ({missing} of {len(names)}) matches no group of the family {family!r} "
                f"({', '.join(groups)}). Fix: groups=<one of {', '.join(FAMILIES)}>, or name the prefixes: "
                f"groups=vision:<prefix>+<prefix>,language:<prefix>,action:<prefix>"
            )
        found[name] = group
    return found


def _chosen(choice: str) -> tuple[str, Groups]:
    if choice in FAMILIES:
        return choice, FAMILIES[choice]
    path = Path(choice)
    if path.suffix == ".json":
        try:
            table = json.loads(path.read_text())
            return path.name, {str(group): tuple(map(str, items)) for group, items in table.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"groups={choice}: expected JSON of the form {{group: [prefix, ...]}}: {error}"
            ) from error
    if ":" not in choice:
        raise unknown("groups", choice, [*FAMILIES, "auto"])
    groups: dict[str, tuple[str, ...]] = {}
    for item in choice.split(","):
        group, colon, prefixes = item.partition(":")
        if not colon or not group or not all(prefixes.split("+")):
            raise ConfigError(f"groups={choice}: {item!r} is not <group>:<prefix>+<prefix>")
        groups[group.strip()] = tuple(prefixes.split("+"))
    return "named prefixes", groups


def coefficients(
    names: Iterable[str], groups: Mapping[str, str], modules: Mapping[str, float], alpha: float | None
) -> dict[str, float]:
    """Coefficient of every parameter: that of its group, else `alpha`.

    Args:
        names: parameters.
        groups: parameter -> group; may be empty where `modules` is.
        modules: group -> coefficient.
        alpha: of groups that `modules` does not name.

    Raises:
        ConfigError: a group without parameters, or one without a coefficient.
    """
    names = list(names)
    present = {groups[name] for name in names} if modules else set()
    for group in modules:
        if group not in present:
            raise unknown("group in modules=", group, present)
    found: dict[str, float] = {}
    for name in names:
        value = modules.get(groups[name], alpha) if modules else alpha
        if value is None:
            rest = (
                f"{groups[name]}:<coefficient> to modules=, or alpha=<of all others>" if modules else "alpha="
            )
            raise ConfigError(f"{name!r} has no coefficient. Fix: add {rest}")
        found[name] = float(value)
    return found
