"""Host memory while a replica reads its model: the highest, beside what the model's files take.

A random model in the shape of a 1.1B Llama is written to a temporary folder, read in a process of
its own the way a replica reads it, and deleted again. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.bench import machine

LIMIT = 1.2
"""Most host memory that is asked for, to the bytes of the model's files."""
SHAPES: dict[str, dict[str, int]] = {
    "llama-1.1b": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "llama-0.6b": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 10,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
SAMPLE_S = 0.005


def write_model(folder: Path, shape: str, dtype: str) -> int:
    """A random model and a tokenizer; returns the bytes of its safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tiny_models import build_tokenizer

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Memory:
    """What the kernel says of this process's memory, and the most of each part since `watch`.

    `VmRSS` is what it has; `RssAnon` of that is its own, `RssFile` are pages of mapped files, which
    the kernel takes back when it needs them; `VmHWM` is the highest `VmRSS` so far.
    """

    PARTS = ("VmRSS", "RssAnon", "RssFile", "VmHWM")

    def __init__(self) -> None:
        self.highest = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @classmethod
    def now(cls) -> dict[str, int]:
        """Bytes by part."""
        found = {}
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            if name in cls.PARTS:
                found[name] = int(rest.split()[0]) << 10
        return found

    def __enter__(self) -> Memory:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM begins anew
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        for name, size in self.now().items():
            self.highest[name] = max(self.highest[name], size)


def read(folder: str, dtype: str, exits: bool, proposal: str) -> dict[str, Any]:
    """Read the model as a replica does; memory before, at its highest and after."""
    from eevp_batch.engine.load import load_engine
    from eevp_batch.model_config import read_model_config
    from eevp_batch.spec import JobSpec

    exit_field: dict[str, Any] = {"mode": "off"}
    if exits:
        exit_field = {"vocab": {"proposal": proposal}}
    spec = JobSpec.model_validate(
        {
            "version": 1,
            "name": "load-memory",
            "input": {"path": "prompts.parquet"},
            "model": {"path": folder, "dtype": dtype},
            "exit": exit_field,
            "output": {"path": "out"},
        }
    )
    config = read_model_config(spec.model)
    before, started = Memory.now(), time.perf_counter()
    with Memory() as memory:
        engine, _ = load_engine(spec, config, num_threads=len(os.sched_getaffinity(0)))
    seconds = time.perf_counter() - started
    after = Memory.now()
    if not engine.is_idle:
        raise SystemExit("an engine that was just built has work")
    return {
        "before": before,
        "highest": memory.highest,
        "after": after,
        "seconds": seconds,
        "layers": type(engine.model.layers).__name__,
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Write, read in a fresh process, delete."""
    with tempfile.TemporaryDirectory(prefix="eevp-load-") as name:
        command = [sys.executable, "-m", "tests.bench.load_memory", "--folder", name]
        command += ["--shape", chosen.shape, "--stored", chosen.stored, "--dtype", chosen.dtype]
        command += ["--proposal", chosen.proposal, *(["--exits-off"] if chosen.exits_off else [])]
        subprocess.run([*command, "--child", "write"], check=True)
        model_bytes = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
        child = subprocess.run([*command, "--child", "read"], check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    ratios = {
        "highest_to_model": found["highest"]["VmHWM"] / model_bytes,
        "highest_of_its_own_to_model": found["highest"]["RssAnon"] / model_bytes,
        "growth_to_model": (found["highest"]["VmHWM"] - found["before"]["VmRSS"]) / model_bytes,
        "after_to_model": found["after"]["VmRSS"] / model_bytes,
    }
    return {"model_bytes": model_bytes, **found, **ratios}


def main() -> None:
    """Run, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-1.1b", choices=list(SHAPES))
    parser.add_argument("--stored", default="bfloat16", help="number type in the files")
    parser.add_argument("--dtype", default="bfloat16", help="number type of the job")
    parser.add_argument("--exits-off", action="store_true")
    parser.add_argument("--proposal", default="full", choices=["full", "int8"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=["write", "read"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child == "write":
        write_model(Path(chosen.folder), chosen.shape, chosen.stored)
        return
    if chosen.child == "read":
        found = read(chosen.folder, chosen.dtype, not chosen.exits_off, chosen.proposal)
        print(json.dumps(found))
        return
    found = measure(chosen)
    for name, value in found.items():
        print(f"{name}: {value:.3f}" if isinstance(value, float) else f"{name}: {value}")
    print(f"asked for, the process itself included: highest_to_model at most {LIMIT}")
    kept = ("shape", "stored", "dtype", "proposal", "exits_off")
    setup = machine.setup() | {name: getattr(chosen, name) for name in kept}
    machine.write_json(chosen.out, {"setup": setup, **found})


if __name__ == "__main__":
    main()
