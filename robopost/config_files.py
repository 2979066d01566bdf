# SPDX-License-Identifier: Apache-2.0
"""Where the Hydra tree lies and which names it offers; imports nothing heavy, for help and completion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robopost.errors import ConfigError


def config_dir() -> Path:
    """The folder of the shipped Hydra tree: inside an installed wheel, or `configs/` of the checkout.

    Raises:
        ConfigError: neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").exists():
            return folder
    raise ConfigError(f"the config tree is missing beside {package}. Fix: reinstall robopost")


def search_dirs(extra: Sequence[str | Path] = ()) -> list[Path]:
    """Folders searched for config files, first match wins: `extra`, then the shipped tree.

    Raises:
        ConfigError: a folder of `extra` does not exist.
    """
    folders = []
    for folder in extra:
        path = Path(folder).expanduser().resolve()
        if not path.is_dir():
            raise ConfigError(f"--config-dir {str(folder)!r} is not a folder")
        folders.append(path)
    return [*folders, config_dir()]


def file_options(group: str, dirs: Sequence[Path]) -> list[str]:
    """Names of the YAML files of `group`, sorted; one in a sub-folder is called `folder/name`."""
    names = set()
    for root in dirs:
        folder = root / group
        names |= {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    return sorted(names)


def find_file(group: str, name: str, dirs: Sequence[Path]) -> Path | None:
    """The file of `group=name`, or None for a registered name without one."""
    for root in dirs:
        path = root / group / f"{name}.yaml"
        if path.exists():
            return path
    return None


def summary(path: Path) -> str:
    """The first comment line of a config file: what it is, in one line."""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            text = line.lstrip("# ").strip()
            if text and not text.startswith(("@package", "SPDX")):
                return text
        elif line.strip():
            break
    return ""
