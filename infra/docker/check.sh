#!/usr/bin/env bash
# Takes the Dockerfile's steps in a clean Debian root, without Docker: what it installs is what its
# pins say, nothing of this machine's Python is seen. Needs root and mmdebstrap; needs some GiB.
#
#   infra/docker/check.sh                       the CPU variant
#   TORCH_INDEX=default infra/docker/check.sh   torch from pip's own index
#
#   CHECK_ROOT    folder of the root, kept afterwards (default: a temporary one, removed)
#   CHECK_BINDS   further folders of this machine that the root sees, such as a package mirror's
#
# Name resolution, certificates and pip's settings are this machine's.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source_root="$(cd "$here/../.." && pwd)"
root="${CHECK_ROOT:-$(mktemp -d)}"
if [[ -z ${CHECK_ROOT:-} ]]; then trap 'rm -rf "$root"' EXIT; fi

release="$(sed -n 's/^FROM debian:\([a-z]*\).*/\1/p' "$here/Dockerfile")"
mmdebstrap --quiet --variant=minbase "$release" "$root"
du -sh --exclude=proc "$root" | sed 's/\t.*/ in the bare root/' >&2

mkdir -p "$root/context"
for path in eevp_batch infra/constraints.txt pyproject.toml README.md LICENSE; do
  mkdir -p "$root/context/$(dirname "$path")"
  cp -rT "$source_root/$path" "$root/context/$path"
done
python3 "$here/steps.py" "$here/Dockerfile" >"$root/steps.sh"

# In a namespace of its own, so that every mount and process ends with it.
export root
# shellcheck disable=SC2016 # it is the inner shell that expands
unshare --mount --pid --fork --kill-child bash -euo pipefail -c '
  mount -t proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  for path in ${CHECK_BINDS:-}; do
    mkdir -p "$root$path"
    mount --bind "$path" "$root$path"
  done
  for path in /etc/resolv.conf /etc/hosts /etc/pip.conf; do
    if [[ -e $path ]]; then cp -L "$path" "$root$path"; fi
  done
  cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/check.crt"  # the image installs its own
  mkdir -p "$root/root/.config/pip"
  if [[ -e ~/.config/pip/pip.conf ]]; then cp ~/.config/pip/pip.conf "$root/root/.config/pip/"; fi
  mapfile -t kept < <(env | grep -E "^(PIP_|TORCH_INDEX=)" || true)
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "${kept[@]}" PIP_CERT=/etc/check.crt \
    chroot "$root" /bin/bash /steps.sh /context
'
for part in "" /srv/eevp/venv; do
  du -sh --exclude=proc --exclude=dev --exclude=context "$root$part" | sed "s:\t.*: in ${part:-all}:" >&2
done
