#!/usr/bin/env bash
# A Ray cluster of three nodes on one Linux machine, each in a network namespace with an address of
# its own, and a fourth one, the laptop, that submits a job to it through Ray's Jobs API. Nodes share
# one folder; the laptop does not see it, and they do not see the laptop's. In the middle of the job
# one node is cut off: its link goes down, its processes go on. The job has to end without it, and
# `eevp-batch verify` has to accept what it left.
#
#     sudo infra/namespaces.sh                 # the demo model, 192 rows, some minutes
#     sudo infra/namespaces.sh --model FOLDER --rows 96 --python .venv/bin/python --out FILE
# --out keeps the figures as JSON; those of earlier runs are in tests/bench/results/.
#
#     sudo infra/namespaces.sh --clean         # what runs that were killed by SIGKILL left
#
# It needs root, for namespaces, and iproute2. Nothing of it reaches another machine: the bridge
# between the nodes has no uplink. Namespaces, links, processes and files are removed at its end,
# also after an error or Ctrl-C. EEVP_KEEP=1 keeps the files.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python" MODEL="$ROOT/models/smollm2-135m-instruct" ROWS=192 RESULT=
NODES=(head worker1 worker2) CUT=worker2
NET=10.77.5 PORT=8265
COMMAND="infra/namespaces.sh $*"
NAME="eevp-$$"

say() { printf '\n== %s\n' "$*"; }
refuse() {
  printf 'namespaces.sh: %s\n' "$*" >&2
  exit 2
}

# Ends every process in a namespace and takes the namespace away, with its end of the link.
remove_namespace() {
  local pids
  for _ in 1 2 3; do
    pids="$(ip netns pids "$1" 2>/dev/null || true)"
    [[ -z "$pids" ]] && break
    # shellcheck disable=SC2086
    kill -9 $pids 2>/dev/null || true
    sleep 0.5
  done
  ip netns del "$1" 2>/dev/null || true
}

clean_up() {
  local status=$?
  trap - EXIT INT TERM HUP
  for node in "${NODES[@]}" laptop; do remove_namespace "$NAME-$node"; done
  ip link del "evb$$" 2>/dev/null || true
  if [[ -n "${WORK:-}" ]]; then
    if [[ "${EEVP_KEEP:-}" == 1 ]]; then say "files are kept in $WORK"; else rm -rf "$WORK"; fi
  fi
  exit "$status"
}

# What runs left that were killed: theirs are the names with the id of a process that has gone.
clean_leftovers() {
  local name pid
  for name in $(ip netns list | awk '{print $1}' | grep -E '^eevp-[0-9]+-' || true); do
    pid="${name#eevp-}" pid="${pid%%-*}"
    [[ -d "/proc/$pid" ]] && continue
    printf 'removing %s\n' "$name"
    remove_namespace "$name"
    ip link del "evb$pid" 2>/dev/null || true
  done
}

while [[ $# -gt 0 ]]; do
  case "$1" in
    --model) MODEL="$(cd "$2" && pwd)" && shift 2 ;;
    --rows) ROWS="$2" && shift 2 ;;
    --python) PYTHON="$(cd "$(dirname "$2")" && pwd)/$(basename "$2")" && shift 2 ;;
    --out) RESULT="$(cd "$(dirname "$2")" && pwd)/$(basename "$2")" && shift 2 ;;
    --clean) clean_leftovers && exit 0 ;;
    *) refuse "found $1; allowed: --model FOLDER, --rows N, --python FILE, --out FILE, --clean" ;;
  esac
done

[[ "$(uname -s)" == Linux ]] || refuse "network namespaces are Linux's; this is $(uname -s)"
[[ "$(id -u)" == 0 ]] || refuse "making network namespaces takes root: run it with sudo"
command -v ip >/dev/null || refuse "ip is not there; on Debian and Ubuntu: apt install iproute2"
[[ -x "$PYTHON" ]] || refuse "no $PYTHON; infra/demo.sh makes it, or name one with --python"
[[ -f "$MODEL/config.json" ]] || refuse "$MODEL holds no model; infra/fetch_model.py makes one"
ip netns add "$NAME-probe" 2>/dev/null ||
  refuse "this root may not make network namespaces (a container needs CAP_SYS_ADMIN for it)"
ip netns del "$NAME-probe"
ip link show "evb$$" >/dev/null 2>&1 && refuse "a link evb$$ is there already"

WORK="$(mktemp -d /tmp/eevp-ns-XXXXXX)"
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
SHARED="$WORK/shared" LAPTOP="$WORK/laptop" OUT="$WORK/shared/out"
mkdir -p "$SHARED/model" "$LAPTOP/prompts" /tmp/ray
PATH="$(dirname "$PYTHON"):$PATH"
export PATH RAY_USAGE_STATS_ENABLED=0 PYTHONDONTWRITEBYTECODE=1
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN="$("$PYTHON" -c 'import secrets; print(secrets.token_hex(32))')"

# enter NODE COMMAND..: in its namespaces; the command sees what the node's machine would.
enter() {
  local node="$1" hidden="$LAPTOP"
  shift
  [[ "$node" == laptop ]] && hidden="$SHARED"
  mkdir -p "$WORK/$node/ray"
  # Mounts are the command's own: `ip netns exec` gives it a mount namespace. Each node has its own
  # folder for Ray's sessions, and an empty one in the place of what is not on it.
  # shellcheck disable=SC2016
  ip netns exec "$NAME-$node" bash -c '
    mount --bind "$1" /tmp/ray
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs "$2"
    [[ "$2" == "$4" ]] || mount --bind "$3" "$4/model"
    shift 4
    exec "$@"' enter "$WORK/$node/ray" "$hidden" "$MODEL" "$SHARED" "$@"
}
on_laptop() { (cd "$LAPTOP" && enter laptop env PYTHONPATH="$ROOT" XDG_STATE_HOME="$LAPTOP" "$@"); }
eevp() { on_laptop "$PYTHON" -m eevp_batch "$@"; }
facts() { PYTHONPATH="$ROOT" "$PYTHON" "$ROOT/infra/namespaces_facts.py" "$@"; }

say "namespaces $NAME-{head,worker1,worker2,laptop} on a bridge without uplink"
ip link add "evb$$" type bridge
ip link set "evb$$" up
number=0
for node in "${NODES[@]}" laptop; do
  number=$((number + 1))
  ip netns add "$NAME-$node"
  ip link add "ev$$n$number" type veth peer name eth0 netns "$NAME-$node"
  ip link set "ev$$n$number" master "evb$$" up
  ip -n "$NAME-$node" addr add "$NET.$number/24" dev eth0
  ip -n "$NAME-$node" link set eth0 up
  ip -n "$NAME-$node" link set lo up
  [[ "$node" == "$CUT" ]] && CUT_LINK="ev$$n$number" CUT_ADDRESS="$NET.$number"
  printf '%-8s %s\n' "$node" "$NET.$number"
done

say "ray start on three nodes, with a token"
STARTED=()
start_ray() {
  mkdir -p "$WORK/$1"
  enter "$1" ray start --node-ip-address="$2" --num-cpus=1 --object-store-memory=100000000 \
    --disable-usage-stats --block "${@:3}" >"$WORK/$1/ray.log" 2>&1 &
  STARTED+=($!)
}
# Until so many nodes live; a node that does not start ends the script, with what it said.
wait_for_nodes() {
  on_laptop "$PYTHON" "$ROOT/infra/namespaces_facts.py" wait-for-cluster \
    "http://$NET.1:$PORT" "$1" "${STARTED[@]}" || { tail -n 20 "$WORK"/*/ray.log && exit 1; }
}
start_ray head "$NET.1" --head --port=6379 --dashboard-host="$NET.1" --dashboard-port="$PORT"
wait_for_nodes 1
start_ray worker1 "$NET.2" --address="$NET.1:6379"
start_ray worker2 "$NET.3" --address="$NET.1:6379"
wait_for_nodes 3

cp "$ROOT"/jobs/prompts/*.parquet "$LAPTOP/prompts/"
cat >"$LAPTOP/job.yaml" <<JOB
name: cut-off
input: {path: prompts/*.parquet, limit: $ROWS}
prompt: {on_overlong: truncate_left}
model: {path: $SHARED/model, dtype: float32}
sampling: {max_new_tokens: 48}
run: {chunk_rows: 8}
cluster:
  address: http://$NET.1:$PORT
  replicas: 3
  cpus_per_replica: 1
  shared_paths: [$SHARED]
output: {path: $OUT}
JOB

expect() {
  local wanted="$1" code=0
  shift
  "$@" || code=$?
  printf '(exit code %s)\n' "$code"
  [[ "$code" == "$wanted" ]] || { printf 'expected %s\n' "$wanted" >&2 && exit 1; }
}
say "without the token: refused"
expect 5 on_laptop env -u RAY_AUTH_TOKEN RAY_AUTH_MODE=disabled \
  "$PYTHON" -m eevp_batch submit job.yaml
say "with an output folder on the laptop: refused, with its place in the job file"
expect 2 eevp submit job.yaml --set output.path=out
say "with an output folder that each node has for itself: refused by the cluster"
expect 2 eevp submit job.yaml --set output.path=/tmp/ray/out \
  --set "cluster.shared_paths=[$SHARED, /tmp/ray]" --set input.limit=1
say "submitted; the prompts go along"
RUN="$(eevp submit --no-wait job.yaml)"

say "cutting $CUT ($CUT_ADDRESS) off once the job is in its middle"
facts wait-for-middle "$OUT"
ip link set "$CUT_LINK" down
CUT_UNIX_S="$(date +%s.%N)"
printf 'link of %s down at %s\n' "$CUT" "$(date +%T)"
eevp logs -f "$RUN" >"$WORK/job.log" 2>&1 || { cat "$WORK/job.log" && exit 1; }

say "what the cluster says of it, from the laptop"
tail -n 20 "$WORK/job.log"
eevp list --address "http://$NET.1:$PORT"
eevp status "$RUN"

say "eevp-batch verify"
expect 0 env PYTHONPATH="$ROOT" "$PYTHON" -m eevp_batch verify "$OUT"
say "figures"
facts report "$OUT" "$CUT_UNIX_S" ${RESULT:+"$RESULT" "$COMMAND"}
