# Sourced by quickstart.sh, test.sh and lowest.sh: makes an environment, or reuses it when nothing changed.
# Usage: . launch/setup.sh EXTRA[,EXTRA]           .venv with the pinned set (launch/constraints.txt)
#        . launch/setup.sh EXTRA[,EXTRA] lowest    .venv-lowest with the least releases (launch/lowest.txt)
# After it, $PYTHON is the environment's interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-train}"
pins="launch/${2:-constraints}.txt"
venv=".venv${2:+-$2}"

python="${LONGCTX_PYTHON:-}"
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
      python="$candidate"; break
    fi
  done
fi
[ -n "$python" ] || { echo "longctx needs Python 3.11, 3.12 or 3.13; none was found on PATH (or set LONGCTX_PYTHON)" >&2; exit 2; }

PYTHON="$PWD/$venv/bin/python"
# uv installs no compiled bytecode, so the first process that imports a module writes it for all later ones. Where this is
# switched off, every rank and every test's process compiles torch and transformers anew (12 s of a core each).
export PYTHONDONTWRITEBYTECODE=
# The stamp holds the extras and a checksum of what the environment was made from. A later start reuses it when nothing
# changed and it has at least the extras that are asked for now.
stamp="$venv/.longctx-stamp"
made_from="$(cat pyproject.toml "$pins" launch/setup.sh | cksum) $("$python" -V 2>&1)"
ready() {
  local have from extra
  { read -r have && read -r from; } 2>/dev/null <"$stamp" || return 1
  [ -x "$PYTHON" ] && [ "$from" = "$made_from" ] || return 1
  for extra in ${extras//,/ }; do case ",$have," in *",$extra,"*) ;; *) return 1 ;; esac; done
}
if ! ready; then
  echo "setting up $venv (once; a few minutes) ..." >&2
  [ -x "$PYTHON" ] || "$python" -m venv "$venv"
  pip() { "$PYTHON" -m pip --disable-pip-version-check --quiet "$@"; }
  install() { pip install -c "$pins" "$@"; }
  if [ -n "${LONGCTX_UV:-}" ]; then
    # uv installs the same releases in half the time. It is told where pip is set up to look, and pip stands in for it.
    setting() { "$PYTHON" -m pip config get "$1.$2" 2>/dev/null || true; }
    export UV_FIND_LINKS="${UV_FIND_LINKS:-$(setting :env: find-links)}" UV_INDEX_STRATEGY=unsafe-best-match
    export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-$(setting global extra-index-url)}"
    certificates="$(setting global cert)"
    [ -z "$certificates" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$certificates}"
    install() {
      "$venv/bin/uv" pip install --quiet --python "$PYTHON" -c "$pins" "$@" \
        || pip install -c "$pins" "$@"
    }
    pip install uv || install() { pip install -c "$pins" "$@"; }
  fi
  install --upgrade pip hatchling editables setuptools wheel ninja
  if command -v nvidia-smi >/dev/null 2>&1; then
    install torch
  else
    # No GPU: the CPU build spares gigabytes of CUDA. First where pip is set up to look, then PyTorch's own index,
    # and last whatever pip offers.
    version="$(sed -n 's/^torch==//p' "$pins")"
    install "torch==$version+cpu" 2>/dev/null \
      || pip install -c "$pins" --retries 1 --index-url https://download.pytorch.org/whl/cpu torch 2>/dev/null \
      || install torch
  fi
  # deepspeed comes as source: nothing of it is compiled now, and its build sees the torch that is installed.
  case ",$extras," in *,train,*) DS_BUILD_OPS=0 install --no-build-isolation deepspeed ;; esac
  install --no-build-isolation -e ".[$extras]"
  printf '%s\n' "$extras" "$made_from" > "$stamp"
fi
