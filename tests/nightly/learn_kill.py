"""SIGKILL while the demo model learns its exits on the narrow job, in every phase, then a resume.

In each phase of `exit: {mode: learn}` the driver of a fresh run is killed, and the same command is
started again. What was committed before has to be there untouched, what was learned is not learned
again, every row comes out once, its phase told truly, and `verify` finds nothing. What a phase lost
is counted: chunks that were under way, and learning that began again.

    python -m tests.nightly.learn_kill --rows 1200 --learn-rows 600 --out FILE
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from eevp_batch.report.summary import summarise
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.bench.machine import setup
from tests.bench.throughput import write_json
from tests.learning_jobs import STAGES, assert_phases_are_told
from tests.plain_output import committed_parts, events, read_rows
from tests.real_jobs import command

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--learn-rows", type=int, default=600)
    parser.add_argument("--delta", type=float, default=0.03)
    parser.add_argument("--layers", type=int, nargs="+", default=[6], help="exit layers")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--phases", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_job(chosen: argparse.Namespace, folder: Path) -> Path:
    """jobs/extract.yaml, learning its exits and auditing a fifth of its rows."""
    script = str(ROOT / "jobs" / "make_extraction.py")
    subprocess.run([sys.executable, script, str(folder), "--rows", str(chosen.rows)], check=True)
    job = yaml.safe_load((ROOT / "jobs" / "extract.yaml").read_text())
    job["input"]["path"] = "notes.parquet"
    job["model"] = {"path": str(MODEL), "dtype": chosen.dtype}
    job["exit"] = {
        "mode": "learn",
        "layers": chosen.layers,
        "delta": chosen.delta,
        "epsilon": 0.05,
        "learn_rows": chosen.learn_rows,
        "learn_gain": 0.0,  # on a job this small no exits pay for themselves
        "kv": "bridge",
        "vocab": {"proposal": "low_rank", "rank": 64},
    }
    job["run"] = {"chunk_rows": 50}
    job["audit"] = {"full_depth_fraction": 0.2}
    job["output"] = {"path": "out"}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def killed_in(phase: str, job: Path) -> None:
    """Start the job, and kill its driver once it is in the phase.

    Raises:
        SystemExit: it ended before.
    """
    out = job.parent / "out"
    driver = command("submit", job)
    while not STAGES[phase](out) and driver.poll() is None:
        time.sleep(0.02)
    driver.kill()
    _, stderr = driver.communicate()
    if driver.returncode != -signal.SIGKILL:
        raise SystemExit(f"{phase}: the job ended before it could be killed: {stderr[-2000:]}")


def tried(phase: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One kill and one resume.

    Raises:
        SystemExit: something was lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(chosen, Path(folder))
        out, learned = Path(folder) / "out", Path(folder) / "out" / "_eevp" / "learned.json"
        killed_in(phase, job)
        before, text = committed_parts(out), learned.read_text() if learned.exists() else None
        leases = len(events(out, "chunk_leased"))
        driver = command("submit", job)
        _, stderr = driver.communicate()
        if driver.returncode:
            raise SystemExit(
                f"{phase}: the resume ended with {driver.returncode}: {stderr[-2000:]}"
            )
        _refuse(not before.items() <= committed_parts(out).items(), "a committed part was touched")
        _refuse(text not in (None, learned.read_text()), "what was learned was learned again")
        rows = read_rows(out)
        _refuse(len({row["row_id"] for row in rows}) != chosen.rows, "rows are missing")
        _refuse(len(rows) != chosen.rows, "a row is there twice")
        phases = assert_phases_are_told(out, num_layers=30)
        problems = verify(Store.open(str(out))).problems
        _refuse(bool(problems), f"verify: {problems}")
        audit = summarise(Store.open(str(out))).audit
        return {
            "committed_chunks_before": len(before),
            "chunks_done_again": leases - len(before),
            "learnings_begun": len(events(out, "learning_started")),
            "learned_record_before": text is not None,
            "exits_learned": [
                {name: event[name] for name in ("layers", "thresholds", "risk", "speed")}
                for event in events(out, "exits_learned")
            ],
            "learning_failed": [event["reason"] for event in events(out, "learning_failed")],
            "rows_by_phase": phases,
            "audit": None if audit is None else audit.to_json(),
            "verify": problems,
        }


def _refuse(is_wrong: bool, what: str) -> None:
    if is_wrong:
        raise SystemExit(what)


def main() -> None:
    """Go through the phases and print what each lost."""
    chosen = options()
    found = {}
    for phase in chosen.phases:
        found[phase] = tried(phase, chosen)
        print(phase, json.dumps(found[phase], indent=1), flush=True)
    write_json(chosen.out, {"setup": setup(), "phases": found})


if __name__ == "__main__":
    main()
