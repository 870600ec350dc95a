"""The example jobs: their prompts can be made again, and their job files are valid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eevp_batch.spec_file import load_spec

JOBS = Path(__file__).resolve().parent.parent / "jobs"
PARTS = sorted(path.relative_to(JOBS) for path in JOBS.glob("*/*.parquet"))


@pytest.fixture(scope="module")
def made_again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    for script, target in (("make_prompts.py", folder), ("make_extraction.py", folder / "notes")):
        command = [sys.executable, str(JOBS / script), str(target)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_making_the_prompts_again_gives_the_same_rows(made_again: Path) -> None:
    made = sorted(path.relative_to(made_again) for path in made_again.glob("*/*.parquet"))
    assert made == PARTS, "the script writes other files than the ones that are here"
    for part in PARTS:
        here, again = pq.read_table(JOBS / part), pq.read_table(made_again / part)
        assert here.equals(again), f"{part} is not what its script in jobs/ writes"


def test_there_are_a_thousand_different_prompts_in_several_row_groups() -> None:
    files = [pq.ParquetFile(path) for path in sorted((JOBS / "prompts").glob("*.parquet"))]
    assert len(files) >= 2
    assert all(file.num_row_groups >= 3 for file in files), "a file has too few row groups"
    rows = [row for file in files for row in file.read().to_pylist()]
    assert len(rows) >= 1000
    for column in ("id", "prompt"):
        assert len({row[column] for row in rows}) == len(rows), f"column {column} repeats itself"
    first_tasks = {row["task"] for row in rows[:16]}
    assert first_tasks == {row["task"] for row in rows}, "the first rows are no sample of the tasks"
    words = [len(row["prompt"].split()) for row in rows]
    assert min(words) < 8 and max(words) > 120, "the prompts are all of one length"


@pytest.mark.parametrize("name", ["corpus.yaml", "messages.yaml", "extract.yaml"])
def test_the_job_file_is_valid_and_names_columns_that_exist(name: str) -> None:
    spec = load_spec(JOBS / name)
    pattern = Path(spec.input.path)
    first = next(pattern.parent.glob(pattern.name if pattern.suffix else f"{pattern.name}/*"))
    columns = {spec.input.id_column, *spec.input.keep_columns}
    columns |= {spec.input.prompt_column, spec.input.messages_column} - {None}
    assert columns <= set(pq.read_schema(first).names), f"{name} names a column that is not there"
