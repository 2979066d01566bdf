# SPDX-License-Identifier: Apache-2.0
"""`robopost completion SHELL`: a script that completes commands, options, config groups and their names."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from robopost.cli import COMMANDS
from robopost.cli.console import make_parser
from robopost.config_files import file_options, search_dirs

GROUPS = {
    "train": ("algo", "policy", "env", "data", "track", "recipe"),
    "eval": ("env",),
    "collect": ("env",),
}
KEYS = {
    "train": ("seed=", "seeds=", "steps=", "device=", "out=", "resume=", "loop.steps=", "loop.online_steps="),
    "eval": ("policy=", "episodes=", "seed=", "num_envs=", "deterministic=", "video=", "out=", "device="),
    "collect": ("policy=", "episodes=", "seed=", "num_envs=", "quality=", "noise=", "out=", "device="),
    "merge": (
        "base=",
        "finetuned=",
        "method=",
        "alpha=",
        "modules=",
        "dtype=",
        "out=",
        "choose=",
        "episodes=",
    ),
    "data": ("info", "verify", "import", "export"),
}
OPTIONS = {
    "train": ("--explain", "--show", "--config-dir"),
    "eval": ("--config-dir",),
    "collect": ("--config-dir",),
    "bench": ("--tier", "--list", "--summary", "--cells", "--rerun"),
    "doctor": ("--json",),
    "completion": ("bash", "zsh", "fish"),
}
BASH = """\
# bash completion of robopost. Install:
# robopost completion bash > ~/.local/share/bash-completion/completions/robopost
_robopost() {
    local line="${COMP_LINE:0:COMP_POINT}" word cut
    # bash splits words at '='; the word under the cursor is what follows the last blank.
    word="${line##*[[:space:]]}"
    local IFS=$'\\n'
    COMPREPLY=($(robopost completion --words "$line" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 0 ]] && COMPREPLY=($(compgen -f -- "${word##*=}")) && return
    if [[ "$word" == *=* && "$COMP_WORDBREAKS" == *=* ]]; then
        cut="${word%"${word##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$cut"}")
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
}
complete -o nosort -F _robopost robopost
"""
ZSH = """\
#compdef robopost
# zsh completion of robopost. Install: robopost completion zsh > a folder of $fpath, as _robopost
_robopost() {
    local -a found
    found=("${(@f)$(robopost completion --words "${LBUFFER}" 2>/dev/null)}")
    if [[ -n "${found[1]}" ]]; then compadd -Q -S '' -- "${found[@]}"; else _files; fi
}
if [[ "$funcstack[1]" == "_robopost" ]]; then _robopost "$@"; else compdef _robopost robopost; fi
"""
FISH = """\
# fish completion of robopost. Install: robopost completion fish > ~/.config/fish/completions/robopost.fish
complete -c robopost -a '(robopost completion --words (commandline -cp) 2>/dev/null)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = make_parser(
        "completion",
        "Print a completion script.",
        (
            'eval "$(robopost completion bash)"',
            "robopost completion fish > ~/.config/fish/completions/robopost.fish",
        ),
    )
    parser.add_argument("shell", nargs="?", choices=sorted(SCRIPTS), help="bash, zsh or fish")
    parser.add_argument(
        "--words", metavar="LINE", help="print what may follow this command line; the scripts call it"
    )
    args = parser.parse_args(argv)
    if args.words is not None:
        sys.stdout.write("".join(f"{word}\n" for word in candidates(args.words)))
    elif args.shell:
        sys.stdout.write(SCRIPTS[args.shell])
    else:
        parser.error("name a shell: bash, zsh or fish")
    return 0


def candidates(line: str) -> list[str]:
    """Whole words that may stand where the command line `line` ends."""
    words = line.split()
    current = "" if not words or line[-1:].isspace() else words.pop()
    if (len(words) <= 1 and words[:1] != []) or not words:
        return [name for name in COMMANDS if name.startswith(current)] if words else []
    command = words[1]
    group, equals, _ = current.partition("=")
    if equals:
        if group not in GROUPS.get(command, ()):
            return []
        names = [f"{group}={name}" for name in file_options(group, search_dirs())]
        return [name for name in names if name.startswith(current)]
    offers = [f"{name}=" for name in GROUPS.get(command, ())] + list(KEYS.get(command, ()))
    offers += [*OPTIONS.get(command, ()), "--help"]
    return [word for word in offers if word.startswith(current) and (current or not word.startswith("-"))]
