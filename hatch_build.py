# SPDX-License-Identifier: Apache-2.0
"""Build hook: the Hydra tree ships inside the wheel; an editable install reads it from the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConfigsHook(BuildHookInterface):
    """Adds the config tree to standard wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before each build; `version` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"]["configs"] = "robopost/configs"
