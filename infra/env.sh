# Makes .venv and installs the package into it. Sourced by demo.sh and test.sh, from any folder:
#
#     source infra/env.sh; eevp_env gguf        # or: eevp_env gguf,object-store,test
#
# The second time it only compares a stamp. It sets PYTHON, the environment's interpreter.
#
#   EEVP_PYTHON        interpreter to make .venv with (default: the first python3 that is >= 3.11)
#   EEVP_TORCH_INDEX   where torch comes from: an index URL (say, a CUDA build's), or `default` for
#                      pip's own index. Without it PyTorch's CPU index is asked first, because on
#                      Linux the default index has the CUDA build, gigabytes that a CPU never uses.
#                      A torch that is already in .venv and fits the package is kept.

EEVP_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$EEVP_ROOT/.venv/bin/python"
EEVP_TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

eevp_say() { printf '%s\n' "$*" >&2; }

eevp_find_python() {
  local candidate
  for candidate in ${EEVP_PYTHON:-python3 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  eevp_say "No Python >= 3.11 found (tried: ${EEVP_PYTHON:-python3 python3.13 python3.12 python3.11})." \
    "Set EEVP_PYTHON to one."
  return 1
}

# Runs pip with its output in .venv/install.log, and shows the end of it when it fails.
eevp_pip() {
  local log="$EEVP_ROOT/.venv/install.log"
  if ! "$PYTHON" -m pip --disable-pip-version-check --no-input "$@" >>"$log" 2>&1; then
    tail -n 15 "$log" >&2
    eevp_say "pip failed: pip $*" "(all of its output: $log)"
    return 1
  fi
}

eevp_make_venv() {
  "$PYTHON" -m pip --version >/dev/null 2>&1 && return
  local python
  python="$(eevp_find_python)" || return
  eevp_say "Making .venv with $("$python" --version) ..."
  if ! "$python" -m venv --clear "$EEVP_ROOT/.venv"; then
    eevp_say "$python -m venv failed; on Debian and Ubuntu: apt install python3-venv"
    return 1
  fi
}

# Whether .venv has a torch within the package's range; prints its version.
eevp_own_torch() {
  "$PYTHON" - <<'PYTHON' 2>/dev/null
import sys
from importlib.metadata import version
installed = version("torch")
print(installed.partition("+")[0])
sys.exit(not (2, 9) <= tuple(map(int, installed.split(".")[:2])) < (3, 0))
PYTHON
}

eevp_install_torch() {
  local torch
  torch="$(grep -m1 '^torch==' "$EEVP_ROOT/infra/constraints.txt")"
  case "${EEVP_TORCH_INDEX:-}" in
    "")
      eevp_say "Installing $torch, CPU build ..."
      # A network without that index must not hold anyone up, so the patience is short.
      if eevp_pip install --no-deps --timeout 15 --retries 2 \
        --index-url "$EEVP_TORCH_CPU_INDEX" "$torch" 2>/dev/null; then
        return
      fi
      eevp_say "$EEVP_TORCH_CPU_INDEX has not given it; taking torch from pip's default index." \
        "If that is the CUDA build, it is some gigabytes (EEVP_TORCH_INDEX chooses another)."
      eevp_pip install "$torch" -c "$EEVP_ROOT/infra/constraints.txt"
      ;;
    default)
      eevp_say "Installing $torch from pip's default index ..."
      eevp_pip install "$torch" -c "$EEVP_ROOT/infra/constraints.txt"
      ;;
    *)
      eevp_say "Installing $torch from $EEVP_TORCH_INDEX ..."
      eevp_pip install "$torch" --index-url "$EEVP_TORCH_INDEX"
      ;;
  esac
}

# What has to be the same for an installation to be kept: the settings, the pins, and the place,
# because scripts in .venv/bin name their interpreter by its full path.
eevp_stamp() {
  { echo "$EEVP_ROOT $1"; cat "$EEVP_ROOT/pyproject.toml" "$EEVP_ROOT/infra/constraints.txt"; } |
    cksum
}

eevp_install() {
  local extras="$1" torch pins="$EEVP_ROOT/.venv/constraints.txt"
  eevp_make_venv || return
  if ! torch="$(eevp_own_torch)"; then
    eevp_install_torch || return
    torch="$(eevp_own_torch)" || return
  fi
  # The pins, but with the torch that is there.
  sed "s/^torch==.*/torch==$torch/" "$EEVP_ROOT/infra/constraints.txt" >"$pins"
  eevp_say "Installing eevp-batch[$extras] ..."
  eevp_pip install -c "$pins" -e "${EEVP_ROOT}[$extras]" || return
}

# eevp_env EXTRAS: the environment with the package and these extras, made only where it has changed.
eevp_env() {
  local extras="$1" stamp_file="$EEVP_ROOT/.venv/stamp-${1//,/-}" stamp
  stamp="$(eevp_stamp "$extras")"
  [[ -x "$PYTHON" && "$(cat "$stamp_file" 2>/dev/null)" == "$stamp" ]] && return
  mkdir -p "$EEVP_ROOT/.venv"
  (
    # Two scripts started together take turns, where the system has flock.
    if command -v flock >/dev/null; then flock 9; fi
    [[ "$(cat "$stamp_file" 2>/dev/null)" == "$stamp" ]] && exit 0
    eevp_install "$extras" && echo "$stamp" >"$stamp_file"
  ) 9<"$EEVP_ROOT/infra/env.sh"
}
