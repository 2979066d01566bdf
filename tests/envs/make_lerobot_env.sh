#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Make the LeRobot test environment: .venv-lerobot in the checkout. Does nothing when it is there with these pins.
#
#   PYTHON               interpreter to build it with; python3.11 where that is unset or another version
#   ROBOPOST_ENV_CACHE   folder to keep environments in, by the hash of their pins, so that further checkouts link to
#                        one that is already built (default: none, the environment is made in the checkout)
set -eu

root=$(CDPATH= cd -- "$(dirname -- "$0")/../.." && pwd)
pins="$root/tests/envs/lerobot-requirements.txt"
link="$root/.venv-lerobot"

say() { printf 'lerobot environment: %s\n' "$*"; }
die() { say "$*" >&2; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true; }
version=
for python in "${PYTHON:-python3.11}" python3.11 python3; do
  version=$(version_of "$python")
  case $version in 3.11.*) break ;; esac
done
case $version in 3.11.*) ;; *) die "no Python 3.11 found. Fix: install it, or set PYTHON to its interpreter" ;; esac
hash=$( { cat "$pins"; echo "$version"; } | "$python" -c \
  'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')

ready() { [ -x "$1/bin/python" ] && [ "$(cat "$1/.pins" 2>/dev/null)" = "$hash" ]; }

if ready "$link"; then
  say "ready ($hash)"
  exit 0
fi
if [ -n "${ROBOPOST_ENV_CACHE:-}" ]; then
  mkdir -p "$ROBOPOST_ENV_CACHE"
  env="$ROBOPOST_ENV_CACHE/lerobot-$hash"
else
  env=$link
fi
if ! ready "$env"; then
  say "1/4 new environment at $env (Python $version)"
  rm -rf "$env"
  "$python" -m venv "$env"
  pip() { "$env/bin/python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
  say "2/4 torch"
  # With its dependencies: a CUDA build of torch doesn't import without them. torchvision and lerobot stay out.
  pip install -c "$pins" "$(grep '^torch==' "$pins")"
  say "3/4 $(grep -c '==' "$pins") pinned packages"
  pip install --no-deps -r "$pins"
  say "4/4 check"
  PYTHONPATH="$root/tests/lerobot/site" HF_HUB_OFFLINE=1 "$env/bin/python" -c \
    'import lerobot.policies.factory; from lerobot.datasets.lerobot_dataset import LeRobotDataset' || die "lerobot does not import"
  printf '%s\n' "$hash" > "$env/.pins"
fi
if [ "$env" != "$link" ]; then
  rm -rf "$link"
  ln -s "$env" "$link"
fi
say "ready ($hash)"
