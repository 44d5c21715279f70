#!/usr/bin/env bash
# Builds the documentation into build/site, with warnings as errors, and without network once mkdocs is there.
# It installs mkdocs into a folder of its own (build/docs, 10 s, once), because no other part of longctx needs it.
# Arguments go to mkdocs: launch/docs.sh --site-dir FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
[ -x "$python" ] || python=python3
if [ ! -d build/docs/mkdocs ]; then
  "$python" -m pip --disable-pip-version-check --quiet install --no-compile --target build/docs -c launch/constraints.txt mkdocs-material
fi
export PYTHONPATH="$PWD/build/docs" NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs build --quiet --strict "$@"
