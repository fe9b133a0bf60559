#!/usr/bin/env bash
# Set up .venv and run the main job: fine-tune, observe, plan, apply, serve, report.
#   bash launch/quickstart.sh [--fast] [--data PATH] [--run NAME] ...   (--help lists all)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv
cd "$REPO"
exec python launch/quickstart.py "$@"
