"""The four workloads: their rows, and the job that each of them is.

Rows to learn from (fit and calibrate) and rows to judge by are different rows, in two files.
Data sets that are not ours come from files that the user names; each line is a JSON object.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
SHOWN_TASKS = 4
"""Tasks that a prompt of Self-Instruct shows."""

JsonRows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sizes:
    """How many rows a workload has.

    Attributes:
        fit: that exits are fitted to.
        calibration: that choose and certify thresholds.
        judged: that nothing is fitted to or chosen by.
        seed: of every choice.
    """

    fit: int
    calibration: int
    judged: int
    seed: int = 0

    @property
    def learned(self) -> int:
        """Rows that are generated at full depth first."""
        return self.fit + self.calibration

    @property
    def total(self) -> int:
        return self.learned + self.judged


@dataclass(frozen=True)
class Workload:
    """A job and its rows.

    Attributes:
        fields: of the job file, without input, model and output paths.
        learned: rows to fit and calibrate with.
        judged: rows to judge by.
        answer: when a text is right, see `ANSWERS`.
        stages: names of the exits that are tried on it, see `workloads_bench.STAGES`.
    """

    fields: dict[str, Any]
    learned: JsonRows
    judged: JsonRows
    answer: str = "start"
    stages: tuple[str, ...] = ("logit lens", "heads")

    def write(self, folder: Path, model: Path, dtype: str) -> None:
        """The job file and both files of rows; `judged.yaml` is the same job over the others."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows, out in (
            ("job", self.learned, "full-depth"),
            ("judged", self.judged, "audited"),
        ):
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
            whole = {
                **self.fields,
                "version": 1,
                "name": f"{folder.name}-{name}",
                "input": {"path": f"{name}.parquet"},
                "model": {"path": str(model.resolve()), "dtype": dtype},
                "output": {"path": out},
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))


def corpus(sizes: Sizes, source: Path | None) -> Workload:
    """The demo: rows of jobs/corpus.yaml are judged, its other prompts learned from, shuffled."""
    demo = yaml.safe_load((ROOT / "jobs" / "corpus.yaml").read_text())
    rows = pq.read_table(ROOT / "jobs" / "prompts", columns=["id", "prompt"]).to_pylist()
    own, others = rows[: demo["input"]["limit"]], rows[demo["input"]["limit"] :]
    chosen = _shuffled(others, sizes.seed)[: sizes.learned] + own[: sizes.judged]
    return _cut(chosen, sizes, _chat_job(demo["sampling"]["max_new_tokens"]))


def extract(sizes: Sizes, source: Path | None) -> Workload:
    """The template job of jobs/extract.yaml, with as many of its rows as are asked for."""
    fields = yaml.safe_load((ROOT / "jobs" / "extract.yaml").read_text())
    fields["exit"] = {"mode": "off"}
    script = str(ROOT / "jobs" / "make_extraction.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script, folder, "--rows", str(sizes.total)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = pq.read_table(Path(folder) / "notes.parquet").to_pylist()
    stages = ("logit lens", "heads", "heads, prompts bridged")
    return _cut(rows, sizes, fields, stages=stages)


def gsm8k(sizes: Sizes, source: Path | None) -> Workload:
    """Questions of GSM8K (question, answer; the result stands behind ####), in random order."""
    lines = _read(source, "--gsm8k")
    rows = [
        {
            "id": f"gsm8k-{number:05}",
            "prompt": line["question"],
            "expected": line["answer"].rpartition("####")[2].strip(),
        }
        for number, line in enumerate(lines)
    ]
    job = _chat_job(max_new_tokens=64)
    return _cut(_shuffled(rows, sizes.seed), sizes, job, answer="number")


def self_instruct(sizes: Sizes, source: Path | None) -> Workload:
    """Self-Instruct's own use of its seed tasks: some are shown, the model writes a new one.

    One half of the tasks is shown in prompts that exits are fitted to, the other half in those that
    certify and judge.
    """
    tasks = [line["instruction"] for line in _read(source, "--self-instruct")]
    rng = random.Random(sizes.seed)
    rng.shuffle(tasks)
    halves = tasks[: len(tasks) // 2], tasks[len(tasks) // 2 :]
    rows = []
    for number in range(sizes.total):
        shown = rng.sample(halves[number >= sizes.fit], SHOWN_TASKS)
        listed = "\n".join(f"{place}. {task}" for place, task in enumerate(shown, start=1))
        text = (
            f"Here are some tasks.\n{listed}\nWrite one more task of another kind, then solve it."
        )
        rows.append({"id": f"tasks-{number:05}", "prompt": text})
    return _cut(rows, sizes, _chat_job(max_new_tokens=48))


WORKLOADS: dict[str, Callable[[Sizes, Path | None], Workload]] = {
    "corpus": corpus,
    "extract": extract,
    "gsm8k": gsm8k,
    "self-instruct": self_instruct,
}


def _chat_job(max_new_tokens: int) -> dict[str, Any]:
    return {
        "exit": {"mode": "off"},
        "sampling": {"max_new_tokens": max_new_tokens},
        "cluster": {"replicas": 2},
        "run": {"chunk_rows": 64},
    }


def _cut(rows: JsonRows, sizes: Sizes, fields: dict[str, Any], **facts: Any) -> Workload:
    if len(rows) < sizes.total:
        raise SystemExit(f"rows: found {len(rows)}; allowed: {sizes.total} or more")
    learned, judged = rows[: sizes.learned], rows[sizes.learned : sizes.total]
    return Workload(fields, learned, judged, **facts)


def _shuffled(rows: JsonRows, seed: int) -> JsonRows:
    return random.Random(seed).sample(rows, len(rows))


def _read(source: Path | None, option: str) -> JsonRows:
    if source is None:
        raise SystemExit(f"{option}: allowed: the file that this workload's rows come from")
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
