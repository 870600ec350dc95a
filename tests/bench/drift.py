"""Does the audit notice when a job's prompts change in the middle? Fitted exits on the demo model.

The first rows are those that exits were fitted and certified for (a narrow template). Then come
others: prompts of jobs/corpus.yaml, or more notes with the form's fields in reverse order. Every
third row is audited.

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
from tests.bench.workloads_bench import STAGES, slug
from tests.bench.workloads_jobs import ROOT
from tests.bench.workloads_steps import EPSILON, command
from tests.plain_output import events

AUDITED = 0.33


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=Path, required=True, help="folder of that workload")
    parser.add_argument("--stage", choices=sorted(STAGES), default="heads")
    parser.add_argument("--delta", default="0.02", help="of a certificate that is there")
    parser.add_argument("--narrow-rows", type=int, default=480)
    parser.add_argument("--change", choices=("prompts", "fields"), default="prompts")
    parser.add_argument("--changed-rows", type=int, default=320)
    parser.add_argument("--chunk-rows", type=int, default=32)
    parser.add_argument("--folder", type=Path, default=Path("out/drift"), help="of the job")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def reversed_fields(template: str) -> str:
    """The template with its examples' fields in reverse order."""
    label = "JSON: "
    lines = template.splitlines()
    for number, line in enumerate(lines):
        if line.startswith(label + "{"):
            fields = json.loads(line.removeprefix(label))
            lines[number] = label + json.dumps(dict(reversed(fields.items())))
    return "\n".join(lines)


def changed_rows(chosen: argparse.Namespace, notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What comes after the notes that the exits are for; other notes where there are some."""
    if chosen.change == "fields":
        later = notes[chosen.narrow_rows :][: chosen.changed_rows]
        return [{"id": row["id"], "text": row["text"], "form": "reversed"} for row in later]
    prompts = pq.read_table(ROOT / "jobs" / "prompts", columns=["id", "prompt"]).to_pylist()
    return [
        {"id": row["id"], "text": row["prompt"], "form": "none"}
        for row in prompts[: chosen.changed_rows]
    ]


def write_job(chosen: argparse.Namespace, folder: Path) -> Path:
    """The job: its template has another form for the rows after the change, or none."""
    source = yaml.safe_load((chosen.workload / "judged.yaml").read_text())
    notes = pq.read_table(chosen.workload / "judged.parquet").to_pylist()
    first = notes[: chosen.narrow_rows]
    rows = [{"id": note["id"], "text": note["text"], "form": "fitted"} for note in first]
    rows += changed_rows(chosen, notes)
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")
    fitted = source["prompt"]["template"]
    template = (
        f'{{% if form == "fitted" %}}{fitted}{{% elif form == "reversed" %}}'
        f"{reversed_fields(fitted)}{{% else %}}{{{{ text }}}}{{% endif %}}"
    )
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
        # A small job would have begun all of its rows before the first of them is done.
        "engine": {"max_resident": chosen.chunk_rows},
        "audit": {"full_depth_fraction": AUDITED, "stop_exits": True},
        "output": {"path": "out"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def told(out: Path, first_changed: int) -> dict[str, Any]:
    """When the audit warned, and what became of the rows of the chunks before and after."""
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
        name: _part([one for one in attempts if (one["chunk_id"] >= first_changed) == later])
        for name, later in (("before", False), ("after", True))
    }
    return {
        "narrow_chunks": first_changed,
        "chunks": len(attempts),
        "changed_chunks_committed_at_the_warning": sum(c >= first_changed for c in committed),
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
    found |= {
        "change": chosen.change,
        "stage": chosen.stage,
        "delta": float(chosen.delta),
        "epsilon": EPSILON,
    }
    print(json.dumps(found, indent=1))
    write_json(chosen.out, {"setup": setup(), **found})


if __name__ == "__main__":
    main()
