#!/usr/bin/env bash
# From a fresh clone to an extended model, an adapter and a picture: makes .venv once, then
# runs `longctx train experiment=quickstart`. Further overrides are passed on: launch/quickstart.sh seed=1
. "$(dirname "$0")/setup.sh" train
exec "$PYTHON" -m longctx train experiment=quickstart "$@"
