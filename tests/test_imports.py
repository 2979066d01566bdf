# SPDX-License-Identifier: Apache-2.0
"""Dependencies point one way. Imports are parsed, not run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Lower may not import higher at module level.
LEVELS = {
    "data": 1,
    "nets": 2,
    "vector": 2,
    "policies": 3,
    "artefacts": 3,
    "algos": 4,
    "evaluate": 4,
    "track": 4,
    "report": 5,
    "loops": 5,
    "merging": 5,
    "collect": 6,
    "suite": 6,
    "demo": 7,
    "cli": 8,
}
FREE = {
    "compose",
    "config",
    "config_files",
    "errors",
    "overrides",
    "registry",
    "machine",
    "results",
    "tables",
    "bench",
    "interleave",
    "accel",
    "progress",
}


def module_imports(path: Path, *, everywhere: bool = False) -> set[str]:
    """Absolute names imported at module level (or anywhere); `if TYPE_CHECKING` blocks don't count."""
    found: set[str] = set()

    def walk(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                walk(node.orelse)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if everywhere:
                    walk(node.body)
            else:
                walk(
                    [
                        child
                        for child in ast.iter_child_nodes(node)
                        if isinstance(child, (ast.stmt, ast.excepthandler))
                    ]
                )

    walk(ast.parse(path.read_text()).body)
    return found


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def part(name: str) -> str:
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def own_part(path: Path) -> str:
    first = path.relative_to(ROOT / "robopost").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", files("robopost"), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_downwards(path):
    own = own_part(path)
    level = LEVELS.get(own, 0)
    for name in module_imports(path):
        top = name.partition(".")[0]
        assert top not in ("robopost_envs", "robopost_hardware"), (
            f"{name}: environments and robots register themselves"
        )
        if top == "robopost" and part(name) in LEVELS and part(name) != own and own not in FREE:
            assert LEVELS[part(name)] <= level, f"{own} (level {level}) imports {name}"
        if top == "robopost" and own != "cli":
            assert part(name) != "cli", f"{name}: only the command line imports the command line"


def test_every_part_has_a_level():
    parts = {own_part(path) for path in files("robopost")} - {"__init__"}
    assert parts - LEVELS.keys() - FREE == set(), "name the new part in LEVELS or FREE"


@pytest.mark.parametrize("path", files("envs"), ids=lambda path: str(path.relative_to(ROOT)))
def test_environments_know_no_algorithms(path):
    parts = {part(name) for name in module_imports(path) if name.startswith("robopost.")}
    assert parts <= {"config", "data", "errors", "registry", "vector"}


@pytest.mark.parametrize("path", files("hardware"), ids=lambda path: str(path.relative_to(ROOT)))
def test_robot_side_imports_no_torch(path):
    names = {name.partition(".")[0] for name in module_imports(path, everywhere=True)}
    assert not names & {"torch", "torchvision"}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("from robopost.cli import main; main(['--help'])", ("torch", "hydra", "rich", "numpy")),
        ("from robopost.cli import main; main(['train', '--help'])", ("torch", "hydra", "mujoco")),
        (
            "from robopost.cli import main; main(['completion', '--words', 'robopost train algo='])",
            ("torch", "hydra"),
        ),
        ("import robopost.config, robopost.registry", ("torch",)),
        ("import robopost_envs", ("mujoco", "gym_pusht", "gymnasium_robotics", "isaaclab")),
    ],
)
def test_light_imports_stay_light(code, absent):
    check = f"{code}\nimport sys\nprint('LOADED', [name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "LOADED []"
