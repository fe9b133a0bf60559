#!/usr/bin/env bash
# Set up .venv and run the whole test suite, fast tests first. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv
cd "$REPO"
mkdir -p runs/tests

say "Style: ruff"
ruff check .
ruff format --check .
say "Types: mypy"
mypy
say "Tests: unit, distributed, kernels, upstream contracts, end to end"
if [ $# -eq 0 ]; then
  set -- tests/unit tests/distributed tests/kernels tests/upstream tests/e2e
fi
python -m pytest --durations=15 --junitxml=runs/tests/junit.xml "$@"
