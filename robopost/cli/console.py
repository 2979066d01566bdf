# SPDX-License-Identifier: Apache-2.0
"""What commands share: the parser, the console, the log format."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from robopost.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit through `robopost.cli.main`."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        raise ConfigError(f"{message}. See: {self.prog} --help")


def make_parser(command: str, description: str, examples: Sequence[str], *, notes: str = "") -> Parser:
    """A parser for `robopost <command>`; its help ends in `notes` and the examples."""
    epilog = (
        (notes.rstrip() + "\n\n" if notes else "")
        + "examples:\n"
        + "\n".join(f"  {line}" for line in examples)
    )
    return Parser(
        prog=f"robopost {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value` words, and the folders of the user's own configs."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="what to run and with which settings"
    )
    parser.add_argument(
        "--config-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder with configs of your own (algo/, env/, recipe/, ...), searched first",
    )


def console() -> Console:
    """A rich console on standard output."""
    from rich.console import Console

    # Into a file or a pipe: lines as long as they need, never broken at the 80 columns of nobody's terminal.
    return (
        Console(highlight=False)
        if sys.stdout.isatty()
        else Console(highlight=False, width=160, soft_wrap=True)
    )


def setup_logging(*, verbose: bool = True) -> None:
    """Show the library's log on standard error, once per process."""
    from rich.logging import RichHandler

    logger = logging.getLogger("robopost")
    if any(isinstance(handler, RichHandler) for handler in logger.handlers):
        return
    from rich.console import Console

    handler = RichHandler(
        console=Console(stderr=True), show_path=False, markup=False, log_time_format="%H:%M:%S"
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False


def pluck(words: Sequence[str], key: str) -> str | None:
    """The last value given as `key=value`, or None."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{key}=")]
    return found[-1] if found else None
