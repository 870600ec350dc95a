#!/usr/bin/env bash
# The whole product in one command: environment, demo model, and the job of jobs/corpus.yaml on a
# local Ray with two replicas. A second run finds its output done and shows the summary again;
# `infra/demo.sh --fresh` starts over. Other arguments go to `eevp-batch submit`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [[ "${1:-}" == "--fresh" ]]; then
  shift
  rm -rf "$EEVP_ROOT/out/corpus-demo"
fi
eevp_env gguf
"$PYTHON" "$EEVP_ROOT/infra/fetch_model.py"
eevp="$EEVP_ROOT/.venv/bin/eevp-batch" out="$EEVP_ROOT/out/corpus-demo" code=0
"$eevp" submit "$EEVP_ROOT/jobs/corpus.yaml" "$@" || code=$?
if [[ "$code" == 0 ]]; then
  eevp_say "Next: $eevp report $out   (what came out; verify instead of report proves that all is there)"
else
  eevp_say "Next: infra/demo.sh goes on with the job; $eevp status $out says how far it is"
fi
exit "$code"
