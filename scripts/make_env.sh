#!/usr/bin/env bash
# Create or refresh .venv: once per content of pyproject.toml and constraints.txt.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
stamp=".venv/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0
"$python" -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "error: robopost needs Python 3.11-3.13, this is " + sys.version.split()[0] + ". Fix: make PYTHON=python3.11")'
[ -x .venv/bin/python ] || { echo "set-up: creating .venv"; "$python" -m venv .venv; }
echo "set-up: installing the pinned packages into .venv (about 2 minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
  -e '.[diffusers,vla,minari,lerobot-read,pusht,robotics,dev]' stable-baselines3
rm -f .venv/.installed-*
touch "$stamp"
echo "set-up: done"
