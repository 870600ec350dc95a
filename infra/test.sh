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
run_tests() {
  EEVP_REQUIRE_DEMO_MODEL=1 PYTHONFAULTHANDLER=1 "$PYTHON" -c '
import os, sys, pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
' "$@"
}

if (($#)); then
  run_tests "$@"
  exit
fi
# Several at a time, each with one thread; after them, one by one, those that start a Ray.
failed=0
OMP_NUM_THREADS=1 run_tests -n auto --maxprocesses 8 --dist worksteal -m "not ray" || failed=$?
run_tests -m ray || failed=$?
exit "$failed"
