"""A system's process, seen from the benchmark: started, run in turn with others, measured."""

from __future__ import annotations

import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.machine import ROOT, CpuMeter, peak_rss_bytes
from tests.bench.rivals.wire import Outputs

RIVALS = Path(__file__).parent / "rivals"


@dataclass(frozen=True)
class Rivals:
    """Where the rivals are; None for one that is not here.

    Attributes:
        vllm_python, openvino_python: interpreters that have them.
        openvino_model: folder of the exported model.
        kv_gib: memory that a rival may use for keys and values.
    """

    vllm_python: str | None = None
    openvino_python: str | None = None
    openvino_model: str | None = None
    kv_gib: int = 2

    def has(self, engine: str) -> bool:
        """Whether a system of this engine can be started; our interpreter's always can."""
        if engine == "openvino":
            return self.openvino_python is not None and self.openvino_model is not None
        return engine != "vllm" or self.vllm_python is not None

    def command(self, engine: str) -> list[str]:
        """What to start for an engine."""
        if not self.has(engine):
            raise SystemExit(f"{engine} needs --{engine}-python (and --openvino-model)")
        if engine == "vllm":
            return [str(self.vllm_python), str(RIVALS / "vllm_rival.py")]
        if engine == "openvino":
            return [str(self.openvino_python), str(RIVALS / "openvino_rival.py")]
        return [sys.executable, "-m", "tests.bench.systems"]

    def environment(self, engine: str, threads: int) -> dict[str, str]:
        """Environment variables of a system's process."""
        found = dict(os.environ) | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if engine in ("vllm", "openvino"):
            found.pop("PYTHONPATH", None)
        if engine == "vllm":
            found |= self._vllm_environment(threads)
        return found

    def _vllm_environment(self, threads: int) -> dict[str, str]:
        """Its default reserves one core and leaves out the allocator and OpenMP it is fast with."""
        library = Path(str(self.vllm_python)).parent.parent / "lib" / "libiomp5.so"
        allocator = ctypes.util.find_library("tcmalloc_minimal")
        if not library.is_file() or allocator is None:
            print("vllm: libiomp5 or tcmalloc_minimal is missing; it is slower without", flush=True)
        preload = [allocator, str(library) if library.is_file() else None]
        return {
            "VLLM_CPU_KVCACHE_SPACE": str(self.kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "LD_PRELOAD": ":".join(name for name in preload if name),
        }


@dataclass
class Running:
    """One system's process and what it measured.

    Attributes:
        load_s, first_token_s: seconds from the start of the process until the model was loaded,
            and until the first token of a first prompt was there.
        runs: what each run took and gave.
    """

    name: str
    setting: dict[str, Any]
    process: subprocess.Popen[str]
    load_s: float = 0.0
    first_token_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def write(self, message: dict[str, Any]) -> None:
        """Send one line."""
        if self.process.stdin is None:
            raise SystemExit(f"{self.name} cannot be spoken to")
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """Wait for one line."""
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended early; its messages are above")
        return dict(json.loads(line))

    def run(self, rows: int) -> None:
        """Run once over `rows` prompts; the CPU use of others is noted beside it."""
        meter = CpuMeter(self.process.pid)
        self.write({"rows": rows})
        run = self.read()
        run |= meter.read()
        run["peak_rss_bytes"] = peak_rss_bytes(self.process.pid)
        self.runs.append(run)

    def end(self) -> None:
        """Close its input and wait until it has ended."""
        self.process.communicate()

    @property
    def outputs(self) -> Outputs:
        return self.runs[0]["outputs"]  # type: ignore[no-any-return]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def rates(self) -> list[float]:
        """Generated tokens per second, of each run."""
        return [sum(map(len, run["outputs"])) / run["seconds"] for run in self.runs]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def note(self, key: str) -> float | None:
        """Median over the runs of something noted beside them; None where it was not."""
        found = [run[key] for run in self.runs if run.get(key) is not None]
        return statistics.median(found) if found else None


def start(name: str, setting: dict[str, Any], request: dict[str, Any], rivals: Rivals) -> Running:
    """Start a system's process and wait until its model is loaded and warm.

    Args:
        setting: the system's own part of the request.
        request: what all systems are asked alike: model, prompts, limits.
    """
    engine, threads = setting["engine"], request["threads"]
    started_at = time.monotonic()
    process = subprocess.Popen(
        rivals.command(engine),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=rivals.environment(engine, threads),
    )
    model = rivals.openvino_model if engine == "openvino" else request["model"]
    asked = {
        **request,
        **setting,
        "kv_gib": rivals.kv_gib,
        "model": str(Path(str(model)).resolve()),
    }
    running = Running(name, setting, process)
    running.write(asked)
    ready = running.read()
    running.load_s = ready["loaded_at"] - started_at
    running.first_token_s = ready["first_token_at"] - started_at
    running.versions = ready["versions"]
    return running
