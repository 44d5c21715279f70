#!/usr/bin/env bash
# Builds the documentation into build/site, with warnings as errors and without network once mkdocs is installed.
# mkdocs gets an environment of its own (build/docs, 10 s once): nothing else here needs its packages.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=build/docs/bin
if [ ! -x "$bin/mkdocs" ]; then
  "${PYTHON:-python3}" -m venv build/docs
  "$bin/pip" --disable-pip-version-check --quiet install -c launch/constraints.txt mkdocs-material
fi
exec "$bin/mkdocs" build --quiet --strict
