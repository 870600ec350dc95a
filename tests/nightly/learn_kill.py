"""SIGKILL while the demo model learns its exits on the narrow job, once in every phase.

One job with `exit: {mode: learn}` is killed in each of its phases in turn, and the same command
goes on with it each time. What was committed has to be there untouched after each kill, what was
learned is not learned again, and in the end every row is there once, its phase told truly, and
`verify` finds nothing. What a kill cost is counted: chunks under way, and learning begun again.

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
from tests.bench.machine import setup, write_json
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
    parser.add_argument("--chunk-rows", type=int, default=50)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
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
    job["run"] = {"chunk_rows": chosen.chunk_rows}
    job["audit"] = {"full_depth_fraction": 0.2}
    job["output"] = {"path": "out"}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def killed_in(phase: str, job: Path) -> dict[str, Any]:
    """Start the job, kill its driver once it is in the phase, and say what there was.

    Raises:
        SystemExit: it ended before.
    """
    out = job.parent / "out"
    leased, committed = len(events(out, "chunk_leased")), set(committed_parts(out))
    driver = command("submit", job)
    while not STAGES[phase](out) and driver.poll() is None:
        time.sleep(0.02)
    driver.kill()
    _, stderr = driver.communicate()
    if driver.returncode != -signal.SIGKILL:
        raise SystemExit(f"{phase}: the job ended before it could be killed: {stderr[-2000:]}")
    begun = len(events(out, "chunk_leased")) - leased
    return {
        "committed_parts": committed_parts(out),
        "learned": record(out),
        "chunks_begun": begun,
        "chunks_lost": begun - len(set(committed_parts(out)) - committed),
    }


def record(out: Path) -> str | None:
    """What the job has learned, as it is written down."""
    path = out / "_eevp" / "learned.json"
    return path.read_text() if path.exists() else None


def check(phase: str, before: dict[str, Any], out: Path) -> None:
    """What a kill found is still there.

    Raises:
        SystemExit: something was lost.
    """
    _refuse(
        not before["committed_parts"].items() <= committed_parts(out).items(),
        f"{phase}: a committed part was touched",
    )
    again = before["learned"] not in (None, record(out))
    _refuse(again, f"{phase}: what was learned was learned again")


def ended(job: Path, num_rows: int) -> dict[str, Any]:
    """Let the job come to its end, and say what it holds.

    Raises:
        SystemExit: it is not whole.
    """
    out = job.parent / "out"
    driver = command("submit", job)
    _, stderr = driver.communicate()
    _refuse(driver.returncode != 0, f"the last resume: {driver.returncode}: {stderr[-2000:]}")
    rows, store = read_rows(out), Store.open(str(out))
    _refuse(len(rows) != num_rows, f"found {len(rows)} rows")
    _refuse(len({row["row_id"] for row in rows}) != num_rows, "a row is there twice")
    problems = verify(store).problems
    _refuse(bool(problems), f"verify: {problems}")
    audit = summarise(store).audit
    return {
        "rows_by_phase": assert_phases_are_told(out, num_layers=30),
        "learnings_begun": len(events(out, "learning_started")),
        "exits_learned": [
            {name: event[name] for name in ("layers", "thresholds", "risk", "exit_share", "speed")}
            for event in events(out, "exits_learned")
        ],
        "learning_failed": [event["reason"] for event in events(out, "learning_failed")],
        "audit": None if audit is None else audit.to_json(),
        "verify": problems,
    }


def _refuse(is_wrong: bool, what: str) -> None:
    if is_wrong:
        raise SystemExit(what)


def main() -> None:
    """Go through the phases and print what each kill cost."""
    chosen = options()
    kills: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(chosen, Path(folder))
        for phase in STAGES:
            kills[phase] = killed_in(phase, job)
            for earlier, before in kills.items():
                check(earlier, before, job.parent / "out")
            print(phase, _told(kills[phase]), flush=True)
        end = ended(job, chosen.rows)
        for phase, before in kills.items():
            check(phase, before, job.parent / "out")
    print(json.dumps(end, indent=1))
    told = {phase: _told(kill) for phase, kill in kills.items()}
    facts = {"exit": {"delta": chosen.delta, "layers": chosen.layers, "dtype": chosen.dtype}}
    write_json(chosen.out, {"setup": setup() | facts, "kills": told, "end": end})


def _told(kill: dict[str, Any]) -> dict[str, Any]:
    return {
        "chunks_committed": len(kill["committed_parts"]),
        "chunks_begun": kill["chunks_begun"],
        "chunks_lost": kill["chunks_lost"],
        "was_learned": kill["learned"] is not None,
    }


if __name__ == "__main__":
    main()
