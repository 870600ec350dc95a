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
# Tests start hundreds of processes: none of them is to compile the package again, 0.7 s each time.
export PYTHONDONTWRITEBYTECODE=
# Ray's native threads outlive its shutdown, and now and then one crashes while the interpreter is taken
# apart, after the last test: the runner leaves with pytest's own exit code before that can happen.
EEVP_REQUIRE_DEMO_MODEL=1 PYTHONFAULTHANDLER=1 "$PYTHON" -c '
import os, sys, pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
' "$@"
