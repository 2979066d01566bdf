# SPDX-License-Identifier: Apache-2.0
"""The command line. Commands are imported when they are called: `robopost --help` stays instant."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a policy: any algorithm, environment and data",
    "eval": "evaluate a policy: success and return with intervals, video, JSON",
    "collect": "record episodes of a scripted expert or a policy into a store",
    "data": "inspect, verify, import and export datasets",
    "merge": "merge the weights of a model and its fine-tuned children",
    "report": "one HTML page of runs: curves, tables, videos",
    "bench": "run a benchmark, or say which targets hold",
    "demo": "demonstrations -> flow policy -> fine-tuned -> evaluated, in minutes on a CPU",
    "doctor": "what is installed, what each extra enables, GPU, GL, video, ROS 2",
    "completion": "print a shell completion script",
}
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the console script.

    Args:
        argv: words after `robopost`; default: of this process.

    Returns:
        Exit code: 0 fine, 1 unexpected error, 2 something the user can mend, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("ROBOPOST_DEBUG"))
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BrokenPipeError:  # `robopost ... | head`
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except KeyboardInterrupt as stop:
        _say("interrupted" + (f"; {stop.args[0]}" if stop.args else ""))
        return INTERRUPTED
    except Exception as error:
        return _report(error, debug)


def _dispatch(words: list[str]) -> int:
    from robopost.errors import unknown

    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from robopost import __version__

        sys.stdout.write(f"robopost {__version__}\n")
        return 0
    name = words[0]
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    module = importlib.import_module(f"robopost.cli.{name}")
    return int(module.main(words[1:]) or 0)


def _report(error: Exception, debug: bool) -> int:
    from robopost.errors import RobopostError

    if isinstance(error, RobopostError) and not debug:
        _say(f"error: {' '.join(str(error).split())}")
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not debug:
        where = f" while writing {error.filename}" if error.filename else ""
        _say(f"error: the disk is full{where}. Fix: free some space, or put out= on another disk")
        return 2
    import traceback

    traceback.print_exc()
    if isinstance(error, RobopostError):
        return error.exit_code
    _say(
        f"unexpected {type(error).__name__}: a bug of robopost or a plugin; `robopost doctor` shows versions"
    )
    return 1


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{text}" for name, text in COMMANDS.items())
    return (
        "usage: robopost COMMAND [key=value ...] [--help]\n\n"
        "Post-training for robot policies: offline RL, fine-tuning, evaluation.\n\n"
        f"commands:\n{listed}\n\n"
        "options:\n"
        "  --debug     show the traceback of an error\n"
        "  --version   print the version\n\n"
        "examples:\n"
        "  robopost demo\n"
        "  robopost train algo=sac env=HalfCheetah-v5 steps=50000\n"
        "  robopost eval policy=runs/<run> episodes=100 video=4\n"
    )
