# SPDX-License-Identifier: Apache-2.0
"""Composition of a config: Hydra chooses the files, dataclasses check them, the library sees dataclasses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robopost.config import CollectConfig, DemoConfig, EvalConfig, TrainConfig
from robopost.config_files import file_options, find_file, search_dirs
from robopost.errors import ConfigError, nearest, unknown
from robopost.overrides import NO_TARGET, TARGET, Override, field_names, first_line, parse, set_value
from robopost.registry import ALGOS, ENVS, POLICIES, Registry

REGISTRIES: dict[str, Registry] = {"algo": ALGOS, "policy": POLICIES, "env": ENVS}
ALIASES = {"steps": "loop.steps"}
GYMNASIUM_ID = re.compile(r"^([\w.-]+/)?[A-Za-z][\w.-]*-v\d+$")
PRUNED = "_pruned_"
_stored: dict[tuple[str, str], type] = {}  # schemas that are in Hydra's store


@dataclasses.dataclass(frozen=True)
class Root:
    """A composable root config: its schema and the config groups of its defaults list."""

    schema: type
    groups: tuple[str, ...]


ROOTS: dict[str, Root] = {
    "train": Root(TrainConfig, ("data", "track", "env", "policy", "algo", "recipe")),
    "eval": Root(EvalConfig, ("env",)),
    "collect": Root(CollectConfig, ("env",)),
    "demo": Root(DemoConfig, ()),
}


def options(group: str, dirs: Sequence[Path] | None = None) -> list[str]:
    """Every name `group=` accepts: config files, and registered names that need no file."""
    names = set(file_options(group, search_dirs() if dirs is None else dirs))
    if group in REGISTRIES:
        names |= {entry.name for entry in REGISTRIES[group] if entry.config is not None}
    return sorted(names)


def compose(
    overrides: Sequence[str] = (),
    config_name: str = "train",
    *,
    config_dirs: Sequence[str | Path] = (),
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Compose a config from the command line's words.

    Args:
        overrides: `group=name` and `key=value` words; a gymnasium id as `env=` and a path as `policy=` or
            `data=` are understood too.
        config_name: a root of `ROOTS`; "train" gives a `TrainConfig`.
        config_dirs: further config trees, searched before the shipped one.
        given: group -> config dataclass to start from where the words choose no name.

    Raises:
        ConfigError: anything wrong, in one line.
    """
    return to_object(compose_tree(overrides, config_name, config_dirs=config_dirs, given=given))


def compose_tree(
    overrides: Sequence[str] = (),
    config_name: str = "train",
    *,
    config_dirs: Sequence[str | Path] = (),
    given: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Like `compose`, before conversion: a typed OmegaConf tree in which values may still be missing."""
    root = ROOTS[config_name]
    dirs = search_dirs(config_dirs)
    primary = _register(config_name, root, dirs)
    words = _without_replaced([_expand(item, root, dirs) for item in parse(overrides)], root)
    choices: dict[str, Override] = {}
    values: list[Override] = []
    for word in words:
        if word.key in root.groups and not (word.key == "recipe" and word.value is None):
            choices[word.key] = _checked_choice(word, dirs)
        else:
            values.append(word)
    tree = _load(primary, choices, dirs)
    OmegaConf.set_struct(tree, True)
    for group, word in choices.items():
        if word.value is None:
            tree[group] = None
    for group, config in (given or {}).items():
        if group not in choices and config is not None:
            tree[group] = OmegaConf.structured(config)
    for group in root.groups:
        if group in REGISTRIES:
            _type_group(tree, group, choices.get(group))
    for item in values:
        group = item.key.partition(".")[0]
        if group in choices and choices[group].value is None:
            raise ConfigError(
                f"{item.text} and {choices[group].text} exclude each other. Fix: drop one of them"
            )
        set_value(tree, item)
    return tree


def to_object(tree: DictConfig) -> Any:
    """Resolve a composed tree into its dataclasses.

    Raises:
        ConfigError: a value is missing, or an interpolation can't be resolved.
    """
    keys = _check_tree(tree, "")
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise ConfigError(f"{missing[0]} has no value. Fix: set {missing[0]}=...")
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        wanted = re.search(r"Interpolation key '([^']+)'", str(error))
        hint = nearest(wanted.group(1), keys) if wanted else ""
        raise ConfigError(f"{key}: {first_line(error)}.{hint}" if key else first_line(error)) from error


def to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as plain JSON values."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value

    return plain(config)


def from_dict(data: dict[str, Any]) -> TrainConfig:
    """Rebuild a `TrainConfig` from `to_dict` output; pieces are found by their registered names.

    Raises:
        ConfigError: a name, key or type the installed version doesn't know.
    """
    rest = {key: value for key, value in data.items() if key not in REGISTRIES}
    config = _structured(TrainConfig, rest, "config")
    for group in REGISTRIES:
        setattr(config, group, group_from_dict(group, data[group]) if data.get(group) else None)
    return config


def group_from_dict(group: str, data: dict[str, Any]) -> Any:
    """Rebuild the config dataclass of one algo, policy or env from `to_dict` output."""
    entry = REGISTRIES[group].get(str(data.get("name", "")))
    if entry.config is None:
        raise ConfigError(f"{group} {entry.name!r} has no config dataclass")
    return _structured(entry.config, data, group)


def override(config: Any, words: Sequence[str], *, allowed: Sequence[str]) -> Any:
    """A copy of a config dataclass with `key=value` words applied.

    Args:
        config: any config dataclass.
        words: overrides.
        allowed: keys, or prefixes ending in a dot, that may change.

    Raises:
        ConfigError: a key that is unknown or may not change.
    """
    tree = OmegaConf.structured(config)
    OmegaConf.set_struct(tree, True)
    for item in parse(words):
        key = ALIASES.get(item.key, item.key)
        if not any(key == name or (name.endswith(".") and key.startswith(name)) for name in allowed):
            raise ConfigError(f"{item.text}: can't change here. Allowed: {', '.join(allowed)}")
        set_value(tree, Override(key, item.value, item.text))
    return to_object(tree)


def policy_config_from_dict(data: dict[str, Any]) -> Any:
    """Rebuild a policy's config dataclass from `to_dict` output."""
    return group_from_dict("policy", data)


def env_config_from_dict(data: dict[str, Any]) -> Any:
    """Rebuild an environment's config dataclass from `to_dict` output."""
    return group_from_dict("env", data)


def _structured(cls: type, data: dict[str, Any], where: str) -> Any:
    tree = OmegaConf.structured(cls)
    for key, value in data.items():
        set_value(tree, Override(str(key), value, f"{where}.{key}"))
    if "${" in str(data):  # a stored config is resolved; one from elsewhere shall not read the environment
        raise ConfigError(f"{where} holds an interpolation '${{...}}'; stored configs hold plain values")
    return OmegaConf.to_object(tree)


def _register(config_name: str, root: Root, dirs: Sequence[Path]) -> str:
    """Put the schemas of the root and of every registered name into Hydra's store.

    Returns:
        The name under which Hydra finds the root config.
    """
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=root.schema)
    # Hydra looks for the root in its primary folder or in the store, not along the search path.
    if not (dirs[0] / f"{config_name}.yaml").exists():
        path = find_file(".", config_name, dirs)
        defaults: list[Any] = [f"{config_name}_schema", "_self_", *({group: None} for group in root.groups)]
        body = yaml.safe_load(path.read_text()) if path else {"defaults": defaults}
        config_name = f"_{config_name}"  # not the file's name: Hydra would take the stored one for its schema
        store.store(name=config_name, node=body)
    for group in root.groups:
        if group not in REGISTRIES:
            continue
        for entry in REGISTRIES[group]:
            if entry.config is None or _stored.get((group, entry.name)) is entry.config:
                continue
            _stored[group, entry.name] = entry.config
            node = OmegaConf.structured(entry.config)
            if not node.name:
                node.name = entry.name
            store.store(group=group, name=f"{entry.name}_schema", node=node)
    return config_name


def _expand(item: Override, root: Root, dirs: Sequence[Path]) -> list[Override]:
    """Conveniences: aliases, a gymnasium id as `env`, a path or hub id as `policy` or `data`."""
    key, value = ALIASES.get(item.key, item.key), item.value
    if key not in root.groups or not isinstance(value, str) or value in options(key, dirs):
        return [Override(key, value, item.text)]
    if key == "env" and GYMNASIUM_ID.match(value):
        return [Override("env", "gymnasium", item.text), Override("env.id", value, item.text)]
    if key == "policy" and _looks_like_path(value):
        return [Override("policy", "pretrained", item.text), Override("policy.path", value, item.text)]
    if key == "data" and _looks_like_path(value):
        return [Override("data", "none", item.text), Override("data.path", value, item.text)]
    return [Override(key, value, item.text)]


def _without_replaced(expanded: Sequence[list[Override]], root: Root) -> list[Override]:
    """All words but those of a choice that a later one replaces: of `env=Hopper-v5 env=null` nothing is left."""
    last = {
        word.key: index for index, words in enumerate(expanded) for word in words if word.key in root.groups
    }
    return [
        word
        for index, words in enumerate(expanded)
        if all(last.get(word.key, index) == index for word in words)
        for word in words
    ]


def _looks_like_path(value: str) -> bool:
    return "/" in value or value.startswith((".", "~")) or Path(value).suffix != "" or Path(value).exists()


def _checked_choice(word: Override, dirs: Sequence[Path]) -> Override:
    available = options(word.key, dirs)
    if word.value is None and word.key in REGISTRIES:
        return word
    if not isinstance(word.value, str):
        raise ConfigError(f"{word.text}: {word.key} is chosen by name. Available: {', '.join(available)}")
    if word.value not in available:
        if word.key == "data":
            available.append("or a path such as data/push.zarr")
        raise unknown(word.key, word.value, available)
    return word


def _load(config_name: str, choices: dict[str, Override], dirs: Sequence[Path]) -> DictConfig:
    """Let Hydra compose the chosen files. `dirs[0]` is its primary folder, the others its search path."""
    words = []
    for group, word in choices.items():
        if word.value is not None:
            # A registered name without a file of its own: its schema is its config.
            bare = group in REGISTRIES and find_file(group, word.value, dirs) is None
            words.append(f"{group}={word.value}_schema" if bare else f"{group}={word.value}")
    recipe = choices.get("recipe")
    if recipe is not None and _prune_recipe(recipe.value, choices, dirs):
        words = [f"recipe={PRUNED}" if word.startswith("recipe=") else word for word in words]
    if len(dirs) > 1:
        rest = ",".join(f"'file://{folder}'" for folder in dirs[1:])
        words.append(f"hydra.searchpath=[{rest}]")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(dirs[0]), version_base="1.3"):
            return hydra_compose(config_name, overrides=words)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{mark.name}, line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(
            f"{place}not valid YAML: {getattr(error, 'problem', None) or first_line(error)}"
        ) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error)) from error


def _explain(error: BaseException) -> str:
    """One line from a Hydra or OmegaConf error, with the nearest key where the key is unknown."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = re.match(r"In '([^']+)'", lines[0]) if lines else None
    prefix = f"{place.group(1)}.yaml: " if place else ""
    if isinstance(cause, OmegaConfBaseException):
        key = str(getattr(cause, "full_key", None) or getattr(cause, "key", None) or "")
        last = key.rpartition(".")[2]
        if last == TARGET:
            return f"{prefix}{key}: {NO_TARGET}"
        names = field_names(getattr(cause, "object_type", None))
        if names and last not in names:
            return f"{prefix}unknown key {key!r}.{nearest(last, names)} Keys: {', '.join(names)}"
        return f"{prefix}{key}: {first_line(cause)}" if key else f"{prefix}{first_line(cause)}"
    text = " ".join(lines).split(" Search path:")[0]
    return text or type(error).__name__


def _prune_recipe(name: str, choices: dict[str, Override], dirs: Sequence[Path]) -> bool:
    """Alternatives replace: drop the recipe's section of every group the user has chosen otherwise.

    Stores the pruned recipe under `PRUNED` and returns True when something had to go.
    """
    path = find_file("recipe", name, dirs)
    if path is None:
        return False
    try:
        body = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError:
        return False  # Hydra reports it with the line
    if not isinstance(body, dict):
        raise ConfigError(f"{path}: a recipe is a mapping, got {type(body).__name__}")
    own: dict[str, Any] = {}
    for item in body.get("defaults", []):
        if isinstance(item, dict):
            for key, value in item.items():
                own[str(key).removeprefix("override").strip().lstrip("/")] = value
    replaced = [
        group for group, word in choices.items() if group != "recipe" and own.get(group) != word.value
    ]
    replaced = [group for group in replaced if group in body]
    for group in replaced:
        del body[group]
    if replaced:
        ConfigStore.instance().store(group="recipe", name=PRUNED, node=body, package="_global_")
    return bool(replaced)


def _type_group(tree: DictConfig, group: str, choice: Override | None) -> None:
    """Check a chosen algo, policy or env against its dataclass, also where its file names no schema."""
    node = tree.get(group)
    if node is None:
        return
    name = node.get("name") or (choice.value if choice is not None else "")
    entry = REGISTRIES[group].get(str(name))
    if entry.config is None:
        raise ConfigError(f"{group} {entry.name!r} has no config dataclass, it can't be configured")
    if OmegaConf.get_type(node) is entry.config:
        return
    typed = OmegaConf.structured(entry.config)
    plain: Any = OmegaConf.to_container(node, resolve=False)
    for key, value in plain.items():
        set_value(typed, Override(str(key), value, f"{group}.{key}"))
    if not typed.name:
        typed.name = entry.name
    tree[group] = typed


def _check_tree(node: Any, path: str) -> list[str]:
    """All keys of a tree. Dictionaries inside a config are free-form: `_target_` must not hide there."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        items = ((key, node._get_node(key)) for key in node)
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_missing():
        items = ((index, node._get_node(index)) for index in range(len(node)))
    keys = []
    for key, child in items:
        where = f"{path}.{key}" if path else str(key)
        if key == TARGET:
            raise ConfigError(f"{where}: {NO_TARGET}")
        keys += [where, *_check_tree(child, where)]
    return keys
