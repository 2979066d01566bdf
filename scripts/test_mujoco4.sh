#!/usr/bin/env bash
# The environments on the newest MuJoCo, which users get by default: .venv with mujoco 4 laid over the pinned one.
set -eu
cd "$(dirname "$0")/.."
pins="mujoco==4.0.0 mujoco-core==4.0.0"
stamp=".venv-mujoco4/.installed-$(echo "$pins" | sha256sum | cut -c1-16)"
if [ ! -e "$stamp" ]; then
  rm -rf .venv-mujoco4
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-mujoco4 $pins
  touch "$stamp"
fi
export PYTHONPATH="$PWD/.venv-mujoco4"
.venv/bin/python -c 'import mujoco; assert mujoco.__version__.startswith("4."), mujoco.__version__'
.venv/bin/python -m pytest tests/envs/test_arms.py tests/envs/test_arms_tasks.py tests/envs/test_mujoco_v5.py
