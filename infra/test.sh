#!/usr/bin/env bash
# Every check: lint, format, types, tests. Arguments go to pytest: infra/test.sh -m "not slow"
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$EEVP_ROOT"

eevp_env gguf,object-store,test
"$PYTHON" infra/fetch_model.py
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
EEVP_REQUIRE_DEMO_MODEL=1 "$PYTHON" -m pytest "$@"
