"""Prints a Dockerfile as a shell script that takes its steps in a root that is there already.

Knows what our Dockerfile uses, and refuses the rest: one FROM, and ARG, ENV, SHELL, RUN, WORKDIR,
COPY, USER and CMD. Files are copied from a folder that the script gets as its first argument.

Usage: python infra/docker/steps.py DOCKERFILE
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

HEAD = """\
set -euo pipefail
context=$1 user=
step() { printf '%6d s  %s\\n' "$SECONDS" "$1" >&2; }
run() {
  if [[ -z $user ]]; then /bin/bash -o pipefail -c "$1"; return; fi
  setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups \\
    env "HOME=$(getent passwd "${user%:*}" | cut -d: -f6)" /bin/bash -o pipefail -c "$1"
}
"""


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction's name and the rest of it; comments are gone, lines are joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for instruction in re.sub(r"\\\n", "", "\n".join(lines)).splitlines():
        if instruction.strip():
            name, _, rest = instruction.strip().partition(" ")
            yield name.upper(), rest.strip()


def shell(name: str, rest: str) -> str:
    """One instruction as lines of a shell script.

    Raises:
        ValueError: this file does not know the instruction.
    """
    shown = f"step {shlex.quote(' '.join([name, *rest.split()])[:90])}\n"
    if name in ("FROM", "SHELL", "CMD"):
        return ""
    if name == "ARG":
        variable, _, default = rest.partition("=")
        return f"export {variable}=${{{variable}-{shlex.quote(default)}}}\n"
    if name == "ENV":
        return "".join(f"export {shlex.quote(pair)}\n" for pair in shlex.split(rest))
    if name == "WORKDIR":
        return f"mkdir -p {rest} && cd {rest}\n"
    if name == "USER":
        return f"user={shlex.quote(rest)}\n"
    if name == "COPY" and not rest.startswith("--"):
        *sources, target = rest.split()
        folder = target if target.endswith("/") else str(Path(target).parent)
        copies = "".join(f"cp -rT $context/{s} {_target(s, target)}\n" for s in sources)
        return f"{shown}mkdir -p {folder}\n{copies}"
    if name == "RUN" and not rest.startswith("--"):
        return f"{shown}run {shlex.quote(rest)}\n"
    raise ValueError(f"found {name} {rest}; allowed: what this file's first lines say")


def _target(source: str, target: str) -> str:
    return target + Path(source).name if target.endswith("/") else target


def main() -> None:
    """Print the script."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    print(HEAD + "".join(shell(name, rest) for name, rest in instructions(text)) + "step done")


if __name__ == "__main__":
    main()
