"""Seconds of a job's replay under a grid of settings, by this checkout and by another, in turns.

    python -m tests.bench.replay --job jobs/extract.yaml --set exit.mode=on \
        --set exit.heads=../out/extract-exits --set exit.kv=bridge --beside CHECKOUT --out FILE

Rows that the exits were not fitted to are generated at full depth, and settings are chosen on them
as `calibrate` does. Both checkouts replay the same rows under the same settings, each in a process
that has loaded the model before, and must find the same. Processor seconds say more on a busy
machine. Token-layers are counted beside: rows of every segment that runs, by its layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from eevp_batch.engine.cut import cut_model
from eevp_batch.engine.load import load_job_model
from eevp_batch.fitted_config import read_manifest
from eevp_batch.prepare import prepare
from eevp_batch.tune.calibrate_job import job_costs, replay_settings
from eevp_batch.tune.candidates import NEVER, candidate_grid
from eevp_batch.tune.free_run import FreeRuns
from eevp_batch.tune.outputs import full_depth_rows
from eevp_batch.tune.replay import Replay
from eevp_batch.tune.states import Row
from tests.bench.machine import ROOT, commit, setup, write_json

Json = dict[str, Any]


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--from", dest="source", help="finished full-depth output to draw from")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--settings", type=int, default=6, help="beside that without exits")
    parser.add_argument("--delta", type=float, default=0.02, help="about which settings lie")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout of this repository")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)  # of a process that replays
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print seconds and token-layers of both, and how many times as fast this one is."""
    chosen = options()
    if chosen.task is not None:
        replay_when_told(chosen)
        return
    checkouts = {"this": ROOT} | ({"other": chosen.beside.resolve()} if chosen.beside else {})
    with tempfile.TemporaryDirectory() as folder:
        task, path = made_task(chosen), Path(folder) / "task.json"
        write_json(path, task)
        found = measured(checkouts, path, chosen.rounds)
    facts = {
        "rows": len(task["rows"]),
        "prompt_tokens": sum(len(prompt) for prompt, _ in task["rows"]),
        "generated_tokens": sum(len(generated) for _, generated in task["rows"]),
        "settings": task["grid"],
        "checkouts": found,
    }
    if "other" in found:
        this, other = found["this"], found["other"]
        if this["digest"] != other["digest"]:
            raise SystemExit("the two checkouts replay differently")
        for kind, name in (("seconds", "speed"), ("cpu_seconds", "speed_by_cpu_seconds")):
            pairs = zip(other[kind], this[kind], strict=True)
            facts[name] = median(a / b for a, b in pairs)
        facts["fewer_token_layers"] = other["token_layers"] / this["token_layers"]
    print(json.dumps({key: value for key, value in facts.items() if key != "settings"}, indent=1))
    write_json(chosen.out, {"setup": setup(), **facts})


def made_task(chosen: argparse.Namespace) -> Json:
    """Rows at full depth, and settings to replay them under."""
    job = prepare(chosen.job, chosen.overrides)
    spec = job.spec
    weights, tokenizer, encoder, _ = load_job_model(spec, job.model)
    cut = cut_model(weights, tokenizer, spec.exit)
    runs = FreeRuns(cut, tokenizer, spec.exit, spec.sampling, spec.engine, None)
    seen: list[str] = []
    if spec.exit.heads is not None:
        seen = str(read_manifest(Path(spec.exit.heads))["data"].get("prompt_keys", "")).split()
    draw = (chosen.source, chosen.rows, 0, seen)
    rows = full_depth_rows(spec, job.plan.fields, encoder, lambda: runs.engine(None), print, *draw)
    settings, costs = replay_settings(cut, spec), job_costs(cut, spec.exit, rows)
    grid = candidate_grid(cut.model, settings, rows, costs, chosen.delta, chosen.settings)
    never = [NEVER] * len(grid[0])
    return {
        "rows": [[list(row.prompt_ids), list(row.generated_ids)] for row in rows],
        "grid": [never, *grid],
    }


def measured(checkouts: dict[str, Path], task: Path, rounds: int) -> dict[str, Json]:
    """What each checkout says of the task, in turns; who begins changes."""
    workers = {name: _worker(path, task) for name, path in checkouts.items()}
    found: dict[str, Json] = {name: {"seconds": [], "cpu_seconds": []} for name in workers}
    try:
        for turn in range(rounds + 1):
            for name in sorted(workers, reverse=bool(turn % 2)):
                said = _ask(workers[name])
                times = {kind: said.pop(kind) for kind in ("seconds", "cpu_seconds")}
                found[name] |= said
                for kind, taken in times.items() if turn else ():  # the first turn warms up
                    found[name][kind].append(taken)
                print(f"{name}: {times}", flush=True)
    finally:
        for worker in workers.values():
            worker.communicate()
    return found


def _worker(checkout: Path, task: Path) -> subprocess.Popen[str]:
    """A process that replays with the code of a checkout, on every line that it is sent."""
    return subprocess.Popen(
        # Without the folder of this file, whose modules are named as some of Python's are.
        [sys.executable, "-P", __file__, *sys.argv[1:], "--task", str(task)],
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "PASSIVE"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: subprocess.Popen[str]) -> Json:
    assert worker.stdin is not None and worker.stdout is not None, "both are pipes"
    worker.stdin.write("\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a process that replays has ended")
    said: Json = json.loads(line)
    return said


def replay_when_told(chosen: argparse.Namespace) -> None:
    """Replay the task once for every line of the standard input."""
    task = json.loads(chosen.task.read_text())
    rows = [Row(prompt, generated) for prompt, generated in task["rows"]]
    job = prepare(chosen.job, chosen.overrides)
    weights, tokenizer, *_ = load_job_model(job.spec, job.model)
    cut = cut_model(weights, tokenizer, job.spec.exit)
    model, run_segment = cut.model, cut.model.run_segment
    count = 0

    def counted(depth: int, tokens: Any, pool: Any) -> Any:
        nonlocal count
        count += tokens.num_tokens * len(model.segment_layers(depth))
        return run_segment(depth, tokens, pool)

    model.run_segment = counted  # type: ignore[method-assign]
    replay = Replay(model, replay_settings(cut, job.spec))
    for _ in sys.stdin:
        count, started, before = 0, time.perf_counter(), time.process_time()
        found = replay.run(rows, task["grid"])
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - before
        said = [[(one.exit_layers, one.token_ids) for one in some] for some in found]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        facts = {"commit": commit(), "token_layers": count, "digest": digest}
        print(json.dumps(times | facts), flush=True)


if __name__ == "__main__":
    main()
