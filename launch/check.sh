#!/usr/bin/env bash
# Checks format, lint, import layers and types, with the .venv that launch/setup.sh has made.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="$PWD/.venv/bin"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/lint-imports"
"$bin/pyrefly" check
