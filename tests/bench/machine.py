"""What figures depend on, and what a process tree takes of the machine; Linux only."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def setup(packages: tuple[str, ...] = ("eevp-batch", "torch", "transformers")) -> dict[str, Any]:
    """Hardware, versions, commit, command and date: what a result file starts with."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **versions(*packages),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", module_name(), *sys.argv[1:]]),
    }


def write_json(path: Path | None, content: Any, indent: int | None = 1) -> None:
    """Write a file, where one is asked for; paths among the settings become strings."""
    if path is not None:
        text = json.dumps(content, indent=indent, default=str)
        path.write_text(text + "\n", encoding="utf-8")


def cpu_model() -> str:
    """CPU model as the system names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; a package that is not installed is left out."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The checked-out commit; `+` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def module_name() -> str:
    """The running program, as `python -m` would want it."""
    path = Path(sys.argv[0]).resolve()
    if not path.is_relative_to(ROOT):
        return path.name
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def process_tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def peak_rss_bytes(pid: int) -> int:
    """Sum over the process tree of each process's highest resident size so far.

    The kernel keeps it, so measuring costs nothing; the processes may have had their peaks at
    different times, and pages that they share count once for each.
    """
    total = 0
    for process in process_tree(pid):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue  # it has ended
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) << 10
    return total


class CpuMeter:
    """CPU seconds of one process tree and of everything else on the machine, from now on."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._machine, self._own = _busy_s(), self._tree_s()
        self._started = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Mean cores in use since the meter began: by the tree, and by all others."""
        elapsed = time.perf_counter() - self._started
        own = self._tree_s() - self._own
        others = max(0.0, _busy_s() - self._machine - own)
        return {"own_cores": own / elapsed, "foreign_cores": others / elapsed}

    def _tree_s(self) -> float:
        total = 0.0
        for process in process_tree(self._pid):
            try:
                total += sum(process.cpu_times()[:4])  # its own and its ended children's
            except psutil.NoSuchProcess:
                continue
        return total


def _busy_s() -> float:
    """CPU seconds that the machine has not been idle, stolen time included."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
