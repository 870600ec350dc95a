"""Does the audit notice when a job's prompts change in the middle? Fitted exits on the demo model.

The first rows are those that exits were fitted and certified for (a narrow template), then come
prompts of jobs/corpus.yaml. Every third row is audited.

    python -m tests.bench.workloads --workloads extract --steps generate,fit,certify
    python -m tests.bench.drift --workload out/workloads/extract --delta 0.02 --out FILE

An interrupted run goes on where it was, with the same command.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from eevp_batch.records import ChunkStats
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from eevp_batch.tune.audited import audit_figures
from tests.bench.machine import setup, write_json
from tests.bench.workloads_jobs import ROOT
from tests.bench.workloads_steps import EPSILON, STAGES, command, slug
from tests.plain_output import events

AUDITED = 0.33


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=Path, required=True, help="folder of that workload")
    parser.add_argument("--stage", choices=sorted(STAGES), default="heads")
    parser.add_argument("--delta", default="0.02", help="of a certificate that is there")
    parser.add_argument("--narrow-rows", type=int, default=480)
    parser.add_argument("--open-rows", type=int, default=320)
    parser.add_argument("--chunk-rows", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("out/drift"), help="of the job")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_job(chosen: argparse.Namespace, folder: Path) -> Path:
    """The job: its template gives a note its form and leaves other prompts as they are."""
    source = yaml.safe_load((chosen.workload / "judged.yaml").read_text())
    notes = pq.read_table(chosen.workload / "judged.parquet").to_pylist()[: chosen.narrow_rows]
    prompts = pq.read_table(ROOT / "jobs" / "prompts", columns=["id", "prompt"]).to_pylist()
    rows = [{"id": note["id"], "text": note["text"], "prompt": None} for note in notes]
    rows += [row | {"text": None} for row in prompts[: chosen.open_rows]]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    narrow = source["prompt"]["template"]
    template = f"{{% if text %}}{narrow}{{% else %}}{{{{ prompt }}}}{{% endif %}}"
    stage = STAGES[chosen.stage]
    certificate = f"{slug(chosen.stage)}-{chosen.delta}.json"
    here = chosen.workload.resolve()
    job = source | {
        "name": "drift",
        "input": {"path": "prompts.parquet"},
        "prompt": {"chat": False, "template": template},
        "exit": {
            "mode": "on",
            "heads": str(here / slug(str(stage.heads))),
            "calibration": str(here / certificate),
            "kv": "bridge",
            "vocab": {"proposal": "low_rank"},
            "prefill": "bridge" if "exit.prefill=bridge" in stage.exit else "full",
        },
        "run": {"chunk_rows": chosen.chunk_rows},
        "audit": {"full_depth_fraction": AUDITED, "stop_exits": True},
        "output": {"path": "out"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def told(out: Path, first_open: int) -> dict[str, Any]:
    """When the audit warned, and what became of the rows before and after the first open chunk."""
    committed: list[int] = []
    drift: dict[str, Any] | None = None
    for event in events(out):
        if event["event"] == "chunk_committed" and drift is None:
            committed.append(event["chunk_id"])
        elif event["event"] == "audit_drift":
            drift = event
    records = sorted((out / "_eevp" / "commits").glob("*.json"))
    attempts = [json.loads(path.read_text())["attempt"] for path in records]
    parts = {
        name: _part([one for one in attempts if (one["chunk_id"] >= first_open) == later])
        for name, later in (("before", False), ("after", True))
    }
    return {
        "narrow_chunks": first_open,
        "chunks": len(attempts),
        "open_chunks_committed_at_the_warning": sum(c >= first_open for c in committed),
        "warning": drift,
        **parts,
        "verify": verify(Store.open(str(out))).problems,
    }


def _part(attempts: list[dict[str, Any]]) -> dict[str, Any]:
    """How many rows had exits, how deep their tokens went, and what their audit alone says."""
    stats = sum((ChunkStats.from_json(one["stats"]) for one in attempts), ChunkStats())
    audited = audit_figures(stats.audit)
    return {
        "rows_by_phase": {
            phase: sum(one["rows_ok"] for one in attempts if one["phase"] == phase)
            for phase in ("exits", "full")
        },
        "tokens_by_exit_layer": dict(stats.exit_histogram),
        "audit": None if audited is None else audited.to_json(),
    }


def main() -> None:
    """Run the job and print what the audit made of it."""
    chosen = options()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    code, _, _ = command("submit", str(write_job(chosen, chosen.folder)))
    if code:
        raise SystemExit(f"submit: ended with {code}")
    found = told(chosen.folder / "out", chosen.narrow_rows // chosen.chunk_rows)
    found |= {"stage": chosen.stage, "delta": float(chosen.delta), "epsilon": EPSILON}
    print(json.dumps(found, indent=1))
    write_json(chosen.out, {"setup": setup(), **found})


if __name__ == "__main__":
    main()
