#!/usr/bin/env bash
# Creates the virtual environment. Usage: install.sh PYTHON VENV
set -euo pipefail
python=$1 venv=$2

say() { printf '%s\n' "$*" >&2; }

if ! command -v "$python" >/dev/null; then
  python=python3
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
  say "Python 3.11 is needed, with which the requirements are pinned. On Debian 12: apt-get install python3 python3-venv."
  say "Elsewhere, name yours: make PYTHON=/path/to/python3.11"
  exit 2
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing python3-venv…"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv python3.11-venv >/dev/null \
      || apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
  else
    say "The module venv is missing: sudo apt-get install python3-venv"
    exit 2
  fi
fi
[ -x "$venv/bin/pip" ] || "$python" -m venv --clear "$venv"
say "Installing the pinned requirements into $venv (about two minutes, some 2 GB with TensorFlow)…"
"$venv/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
# The suite and its stubs, in place; their build tool is among the pinned requirements.
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e protos/python -e .
say "Installed."
