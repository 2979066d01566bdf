# SPDX-License-Identifier: Apache-2.0
"""Prints the settings of a config: name, type, default and the comment beside it in the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from robopost.cli.console import console
from robopost.compose import REGISTRIES, ROOTS, options
from robopost.config_files import find_file, search_dirs, summary
from robopost.errors import unknown
from robopost.overrides import type_name


def comments(cls: type) -> dict[str, str]:
    """Field name -> comment on the field's line, over all dataclasses `cls` inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        notes = {
            token.start[0]: token.string.lstrip("# ").strip()
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        found |= _attributes(inspect.getdoc(base) or "")
        body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                text = " ".join(notes[line] for line in lines if line in notes)
                if text:
                    found[node.target.id] = text
    return found


def _attributes(doc: str) -> dict[str, str]:
    """Field name -> text of a docstring's Attributes section."""
    section = re.search(r"^Attributes:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    for names, text in re.findall(
        r"^ {4}([\w, ]+): ((?:.*\n?(?: {5,}.*\n?)*))", section.group(1) if section else "", re.M
    ):
        found |= dict.fromkeys(names.replace(" ", "").split(","), " ".join(text.split()))
    return found


def rows(cls: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(key, type, default, comment) of every setting of a config dataclass, nested ones flattened."""
    hints, notes = typing.get_type_hints(cls), comments(cls)
    out: list[tuple[str, str, str, str]] = []
    for item in dataclasses.fields(cls):
        hint, key = hints[item.name], prefix + item.name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            out += rows(hint, f"{key}.")
            continue
        out.append((key, type_name(hint), _default(item), notes.get(item.name, "")))
    return out


def explain(words: Sequence[str], config_name: str = "train", config_dirs: Sequence[str | Path] = ()) -> None:
    """Print the settings of every `group=name` in `words`; without one, those of the root config."""
    dirs = search_dirs(config_dirs)
    out = console()
    shown = False
    for word in words:
        group, _, name = word.partition("=")
        if group in REGISTRIES and group in ROOTS[config_name].groups:
            _explain_entry(group, name, dirs)
            shown = True
        elif group == "recipe" and name:
            path = find_file("recipe", name, dirs)
            if path is None:
                raise unknown("recipe", name, options("recipe", dirs))
            out.print(f"\n[bold]recipe={escape(name)}[/bold]  {escape(str(path))}\n")
            out.print(escape(path.read_text()))
            shown = True
    if not shown:
        out.print(_table(rows(ROOTS[config_name].schema), f"settings of robopost {config_name}"))


def _explain_entry(group: str, name: str, dirs: Sequence[Path]) -> None:
    from omegaconf import OmegaConf

    from robopost.compose import compose_tree

    registry = REGISTRIES[group]
    if name not in registry and name not in options(group, dirs):
        raise unknown(group, name, options(group, dirs))
    tree = compose_tree([f"{group}={name}"], config_dirs=dirs[:-1])
    entry = registry.get(tree[group].name)
    if entry.config is None:
        raise unknown(group, name, options(group, dirs))
    # The file of this name may set other defaults than the schema.
    values = OmegaConf.to_container(tree[group], resolve=False)
    table = [
        (
            f"{group}.{key}",
            kind,
            _text(typing.cast(dict[str, Any], values)[key]) if "." not in key else default,
            note,
        )
        for key, kind, default, note in rows(entry.config)
        if key != "name"
    ]
    path = find_file(group, name, dirs)
    text = entry.summary or (summary(path) if path else "")
    console().print(_table(table, f"{group}={name}  {text}"))


def _table(lines: Sequence[tuple[str, str, str, str]], title: str) -> Table:
    table = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, title_style="bold")
    for header in ("key", "type", "default", "meaning"):
        table.add_column(header, no_wrap=header == "key", overflow="fold")
    for line in lines:
        table.add_row(*(escape(cell) for cell in line))
    return table


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is not dataclasses.MISSING:
        return _text(item.default)
    return _text(item.default_factory()) if item.default_factory is not dataclasses.MISSING else "???"


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if value == "???":
        return "(must be set)"
    return '""' if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
