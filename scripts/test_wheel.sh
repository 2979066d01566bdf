#!/usr/bin/env bash
# Build sdist and wheel, install the wheel into an empty environment, train and evaluate from an empty folder.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
.venv/bin/python -m build --outdir "$place/dist" . >"$place/build.log" 2>&1 || { cat "$place/build.log"; exit 1; }
"${PYTHON:-python3}" -m venv "$place/env"
"$place/env/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$place"/dist/*.whl
mkdir "$place/empty" && cd "$place/empty"
"$place/env/bin/robopost" train recipe=debug_onpolicy out=run
"$place/env/bin/robopost" eval policy=run episodes=2
"$place/env/bin/python" - "$root" <<'PY'
import pathlib, sys
import robopost, robopost_envs, robopost_hardware
for package in (robopost, robopost_envs, robopost_hardware):
    folder = pathlib.Path(package.__file__).parent
    assert (folder / "py.typed").exists(), f"{folder} ships no py.typed"
    assert not str(folder).startswith(sys.argv[1]), f"{package.__name__} comes from the checkout"
PY
echo "wheel: 1 passed, 0 failed"
