#!/usr/bin/env bash
# Headless rendering needs a software OpenGL: OSMesa or EGL from the system. Installs it as root, else prints the command.
set -eu
have() { "$1" -c "import ctypes,sys; ctypes.CDLL('$2')" 2>/dev/null; }
python="${1:-python3}"
if have "$python" libOSMesa.so.8 || have "$python" libOSMesa.so || have "$python" libEGL.so.1; then exit 0; fi
command="apt-get install -y --no-install-recommends libosmesa6 libegl1 libegl-mesa0 libgl1"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "set-up: installing software rendering ($command)"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive $command -qq >/dev/null
else
  echo "error: no software OpenGL for headless rendering. Fix: sudo $command" >&2
  exit 1
fi
