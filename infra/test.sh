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

export EEVP_REQUIRE_DEMO_MODEL=1 PYTHONFAULTHANDLER=1
# Ray's native threads outlive its shutdown, and now and then one crashes while the interpreter is taken
# apart, after the last test: the runner leaves with pytest's own exit code before that can happen.
runner='
import os, sys, pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
'
if (($#)); then
  exec "$PYTHON" -c "$runner" "$@"
fi
# Those that start a Ray run one by one and mostly wait. The others run beside them, several at a time,
# with one thread each and last in line for the processor; what they say comes at the end.
others="$(mktemp)"
OMP_NUM_THREADS=1 nice -n 19 "$PYTHON" -c "$runner" \
  -n auto --maxprocesses 8 --dist worksteal -m "not ray" >"$others" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null || true; rm -f "$others"' EXIT
failed=0
RAY_worker_niceness=0 "$PYTHON" -c "$runner" -m ray || failed=$? # by itself Ray puts its workers behind
wait "$beside" || failed=$?
cat "$others"
exit "$failed"
