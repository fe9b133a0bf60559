# Sourced by the launchers: a virtual environment in .venv with tested versions, set up once.
#
#   PYTHON       interpreter to build .venv with (default: the newest of python3.13 … python3)

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"

say() { printf '\033[1m==> %s\033[0m\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
    then
      command -v "$candidate"
      return
    fi
  done
  die "no Python 3.11 to 3.13 with the venv module found. Install one, or name it: PYTHON=/path/to/python bash $0"
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

install_torch() {
  local version
  version="$(sed -n 's/^torch==//p' "$REPO/launch/constraints.txt")"
  if has_gpu; then
    say "GPU found: installing torch $version with CUDA"
  else
    say "No GPU found: installing torch $version for CPU"
    # A CPU build carries the local version "+cpu"; it is found where pip is configured for it
    # (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS). The default build works on CPU too, it is only larger.
    if "$VENV/bin/pip" install --quiet "torch==$version+cpu" 2>/dev/null; then return; fi
    say "No CPU build in pip's sources; taking the default build (several GB)"
  fi
  "$VENV/bin/pip" install "torch==$version"
}

# Sets up .venv unless it already matches setup.py and constraints.txt.
ensure_venv() {
  local stamp
  stamp="$(cat "$REPO/setup.py" "$REPO/launch/constraints.txt" | cksum)"
  if [ "$(cat "$VENV/.semantic_ep_stamp" 2>/dev/null)" != "$stamp" ]; then
    local python
    python="$(find_python)" || exit 2
    say "Setting up $VENV with $("$python" --version) (once; a few minutes)"
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --upgrade setuptools wheel
    install_torch
    say "Installing semantic_ep with all extras"
    "$VENV/bin/pip" install --quiet -c "$REPO/launch/constraints.txt" --no-build-isolation \
      -e "$REPO[all,dev]"
    echo "$stamp" >"$VENV/.semantic_ep_stamp"
  fi
  export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
  # Ranks share the cores of a CPU machine: one thread each, or they fight for them.
  has_gpu || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
}
