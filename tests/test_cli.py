from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from eevp_batch import errors
from eevp_batch.cli import _Commands, main
from eevp_batch.cli_output import sum_up
from eevp_batch.storage.status import read_events
from eevp_batch.storage.store import Store
from tests.storage.jobs import make_spec, run_job, write_input

JOB = """\
name: tiny
input:
  path: in.parquet
  keep_columns: [task]
model:
  path: {model}
  dtype: float32
sampling: {{max_new_tokens: 6}}
exit: {{threshold: 0.2}}
run: {{chunk_rows: 8, max_error_rate: 0.2}}
output:
  path: out
"""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def write_prompts(path: Path, num_rows: int = 20) -> Path:
    """Prompts of growing length; one is empty, one is longer than the model's context."""
    prompts = ["the fox " * (row + 1) for row in range(num_rows)]
    prompts[3], prompts[5] = "", "the quick brown fox " * 300
    columns = {"id": [f"q{row}" for row in range(num_rows)], "prompt": prompts}
    pq.write_table(pa.table(columns | {"task": ["t"] * num_rows}), path, row_group_size=6)
    return path


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    """A job file over twenty rows and a tiny model."""
    write_prompts(tmp_path / "in.parquet")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(model=tiny_llama))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The output folder of a finished scripted job."""
    source = write_input(tmp_path / "in.parquet", [f"row-{number}" for number in range(20)])
    run_job(Store.open(tmp_path / "out"), make_spec(source))
    return tmp_path / "out"


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- imports -----------------------------------------------------------------------------------

ONLY_CLICK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("click", "eevp_batch"):
            raise ImportError(f"--help imports {name}")
sys.meta_path.insert(0, Refuse())
from eevp_batch.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "--help"], ["--version"]])
def test_help_needs_only_click(arguments: list[str]) -> None:
    command = [sys.executable, "-c", ONLY_CLICK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "help goes to stdout"


# --- errors ------------------------------------------------------------------------------------

RAISED: dict[type[errors.EevpError], errors.EevpError] = {
    errors.EevpError: errors.EevpError("no"),
    errors.SpecError: errors.SpecError("job.yaml", 3, "exit.threshold", -1, "at least 0"),
    errors.TooManyErrorsError: errors.TooManyErrorsError("no"),
    errors.ResumeRefusedError: errors.ResumeRefusedError("out", [("exit.threshold", 0.9, 0.8)]),
    errors.ClusterError: errors.ClusterError("no"),
    errors.VerifyFailedError: errors.VerifyFailedError("out", ["data/part-00000.parquet: gone"]),
    errors.JobFailedError: errors.JobFailedError("no"),
    errors.JobInterruptedError: errors.JobInterruptedError("no"),
    errors.EngineStalledError: errors.EngineStalledError("no"),
}


@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_every_error_ends_with_its_exit_code_and_one_message(kind: type[errors.EevpError]) -> None:
    error = RAISED[kind]

    @click.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(_Commands(commands={"fail": fail}), ["fail"])
    assert result.exit_code == kind.exit_code
    assert result.stdout == "", "an error is no data"
    assert result.stderr == f"eevp-batch: {error}\n", "the message, and no traceback"


def test_an_interrupt_ends_with_130() -> None:
    @click.command()
    def fail() -> None:
        raise KeyboardInterrupt

    assert CliRunner().invoke(_Commands(commands={"fail": fail}), ["fail"]).exit_code == 130


def test_a_bug_is_not_hidden() -> None:
    @click.command()
    def fail() -> None:
        raise ZeroDivisionError

    result = CliRunner().invoke(_Commands(commands={"fail": fail}), ["fail"])
    assert isinstance(result.exception, ZeroDivisionError), "a bug keeps its traceback"


BAD_JOBS: dict[str, tuple[str, str]] = {
    "exit.threshold=-1": ("--set", "exit.threshold: found -1"),
    "exit.layers=[9]": ("--set", "exit.layers: found 9; allowed: 1 to 6"),
    "exit.vocab.prune_layer=3": ("--set", "exit.vocab.prune_layer: found 3"),
    "sampling.max_new_tokens=256": ("--set", "sampling.max_new_tokens: found 256"),
    "input.path=none.parquet": ("none.parquet", "no such file"),
    "input.id_column=task": ("in.parquet", "'t'"),
    "input.id_column=idd": ("in.parquet", "no column 'idd'"),
    "input.prompt_column=none": ("in.parquet", "no column 'none'"),
    "input.keep_columns=[none]": ("in.parquet", "no column 'none'"),
    "model.path=/none": ("/none", "no such folder"),
    "prompt.template='{{ absent }}'": ("in.parquet", "no column 'absent'"),
    "prompt.template='{{'": ("prompt.template", "allowed: a jinja template"),
    "output.path=nonsense://x": ("nonsense", "URI"),
}


@pytest.mark.parametrize("override", BAD_JOBS)
@pytest.mark.parametrize("command", ["validate", "plan", "submit"])
def test_a_bad_job_ends_with_2_before_anything_starts(
    job: Path, command: str, override: str
) -> None:
    before = files(job.parent)
    result = invoke(command, job, "--set", override)
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    for part in BAD_JOBS[override]:
        assert part in result.stderr
    assert files(job.parent) == before, "nothing was written"


def test_an_output_that_cannot_be_made_is_refused_by_its_field(job: Path) -> None:
    (job.parent / "file").touch()
    result = invoke("submit", job, "--set", "output.path=file/out")
    assert result.exit_code == 2, result.stderr
    for part in ("--set: output.path: found", "file/out", "Not a directory", "can be made"):
        assert part in result.stderr


@pytest.mark.parametrize("override", ["exit.threshold=-1", "input.id_column=task"])
def test_a_bad_job_is_refused_without_ray_and_torch(job: Path, override: str) -> None:
    code = (
        "import sys\n"
        "from eevp_batch.cli import main\n"
        "code = main(sys.argv[1:], standalone_mode=False)\n"
        "heavy = {'ray', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", code, "submit", str(job), "--set", override]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr


def test_an_error_in_the_data_names_the_line_of_the_job(job: Path) -> None:
    text = job.read_text()
    job.write_text(text.replace("in.parquet", "none.parquet"))
    result = invoke("validate", job)
    assert f"input.path is set at {job}:3" in result.stderr
    job.write_text(text + "engine: {max_batch: 0}\n")
    line = text.count("\n") + 1
    assert f"{job}:{line}: engine.max_batch: found 0" in invoke("validate", job).stderr
    job.write_text(text.replace("0.2}\nrun", "[0.2]}\nrun"))
    assert f"{job}:9: exit.threshold: found 1 thresholds" in invoke("validate", job).stderr


def test_an_empty_input_is_refused(job: Path) -> None:
    table = pq.read_table(job.parent / "in.parquet").slice(0, 0)
    pq.write_table(table, job.parent / "in.parquet")
    result = invoke("validate", job)
    assert result.exit_code == 2 and "found no rows" in result.stderr


# --- validate and plan ---------------------------------------------------------------------------


def test_validate_says_what_would_run_and_writes_nothing(job: Path) -> None:
    before = files(job.parent)
    result = invoke("validate", job)
    assert result.exit_code == 0, result.stderr
    assert "20 rows in 3 chunks" in result.stdout and "is new" in result.stdout
    data = json.loads(invoke("validate", job, "--json", "--set", "input.limit=9").stdout)
    assert (data["rows"], data["chunks"], data["resumes"]) == (9, 2, False)
    assert files(job.parent) == before


def test_plan_counts_prompts_as_the_job_will(job: Path) -> None:
    before = files(job.parent)
    data = json.loads(invoke("plan", job, "--json").stdout)
    counts = data["counts"]
    assert counts["rows"] == data["rows"] == 20
    assert counts["failures"] == {"EmptyPromptError": 1}
    assert counts["overlong"] == 1 and counts["max_tokens"] == 256 - 6
    assert sum(counts["buckets"].values()) == 19
    assert data["max_generated_tokens"] == 18 * 6, "one row is empty and one too long"
    text = invoke("plan", job).stdout
    assert "rows by prompt tokens" in text and "█" in text
    assert files(job.parent) == before


def test_plan_estimates_from_some_rows(job: Path) -> None:
    data = json.loads(invoke("plan", job, "--json", "--rows", 8).stdout)
    assert data["counts"]["rows"] == 8, "one chunk is looked at"
    assert data["rows"] == 20


# --- status, verify, report ----------------------------------------------------------------------

ABORTS_LATER = """
import atexit, os
atexit.register(os.abort)  # as a thread of Arrow's pool does now and then
from eevp_batch.cli import start
start()
"""


@pytest.mark.parametrize(("is_whole", "code"), [(True, 0), (False, 6)])
def test_what_threads_do_after_a_command_does_not_change_its_exit_code(
    out: Path, is_whole: bool, code: int
) -> None:
    if not is_whole:
        next((out / "data").iterdir()).unlink()
    command = [sys.executable, "-c", ABORTS_LATER, "verify", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["rows_in"] == 20
    assert ("part-0000" in done.stderr) is not is_whole, "what was said has been written out"


def test_reading_commands_read_a_finished_job(out: Path) -> None:
    before = files(out)
    for command in ("status", "verify", "report"):
        text, data = invoke(command, out), invoke(command, out, "--json")
        assert (text.exit_code, data.exit_code) == (0, 0), text.stderr + data.stderr
        assert text.stdout and json.loads(data.stdout)
        assert text.stderr == "", "data goes to stdout"
    written = {str(out / "report.html"), str(out / "README.md")}
    assert {path for path in files(out) if path not in before} == written
    kept = {path: at for path, at in files(out).items() if path in before and path != str(out)}
    assert kept.items() <= before.items(), "nothing else is written"


def test_a_report_goes_elsewhere_where_it_is_told_to(out: Path, tmp_path: Path) -> None:
    before = files(out)
    result = invoke("report", out, "--out", tmp_path / "page.html")
    assert result.exit_code == 0 and str(tmp_path / "page.html") in result.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    result = invoke("report", out, "--json")
    assert json.loads(result.stdout)["sampled"]["rows"] > 0
    assert invoke("report", out, "--json", "--out", tmp_path / "page.html").exit_code == 2
    result = invoke("report", out, "--out", tmp_path / "none" / "page.html")
    assert result.exit_code == 1 and "--out FILE" not in result.stderr, result.stderr
    assert files(out) == before


def test_a_report_that_cannot_be_written_fails_its_command_but_not_a_job(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "report.html").mkdir()
    result = invoke("report", out)
    assert result.exit_code == 1 and "--out FILE writes it elsewhere" in result.stderr
    sum_up(str(out))  # what a job does in the end
    told = capsys.readouterr()
    assert "20 in, " in told.out, "the summary is shown all the same"
    assert "the report could not be written" in told.err


def test_watching_a_finished_job_shows_it_once(out: Path) -> None:
    result = invoke("status", out, "--watch")
    assert result.exit_code == 0 and result.stdout.endswith("done, 20 of 20 rows (100.0 %)\n")
    assert invoke("status", out, "--watch", "--json").exit_code == 2


def test_verify_ends_with_6_and_names_the_missing_part(out: Path) -> None:
    part = sorted((out / "data").iterdir())[1]
    part.unlink()
    result = invoke("verify", out)
    assert result.exit_code == 6 and f"data/{part.name}" in result.stderr
    assert "submit --repair" in result.stderr, "what mends it"
    result = invoke("verify", out, "--json")
    assert result.exit_code == 6
    assert any(part.name in problem for problem in json.loads(result.stdout)["problems"])


def test_a_repair_is_not_advised_where_nothing_is_damaged(out: Path) -> None:
    (out / "data" / "stray.parquet").write_bytes(b"")
    result = invoke("verify", out)
    assert result.exit_code == 6 and "--repair" not in result.stderr, result.stderr


def test_what_is_not_there_to_be_listed_is_said(out: Path) -> None:
    for address, code, words in (
        ("127.0.0.1:9", 2, "--address: found 127.0.0.1:9; allowed: auto, ray://"),
        ("http://127.0.0.1:9", 5, "the Ray cluster cannot be reached"),
    ):
        result = invoke("list", "--address", address)
        assert result.exit_code == code and words in result.stderr, result.stderr
    result = invoke("logs", out, "--replica", 9)
    assert result.exit_code == 2 and "found 9, which no event of the job names" in result.stderr


@pytest.mark.parametrize("command", ["status", "verify", "report"])
def test_a_folder_without_a_job_ends_with_2(tmp_path: Path, command: str) -> None:
    result = invoke(command, tmp_path / "none")
    assert result.exit_code == 2 and "holds no job" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("target", ["none", "job.yaml"])
def test_there_has_to_be_something_to_retry(job: Path, target: str) -> None:
    before = files(job.parent)
    result = invoke("retry-errors", job.parent / target)
    assert result.exit_code == 2 and target.replace("job.yaml", "out") in result.stderr
    assert files(job.parent) == before, "nothing is written"


# --- the whole way -------------------------------------------------------------------------------


@pytest.fixture
def submitted(job: Path) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """A job that `eevp-batch submit` ran in a process of its own."""
    command = [sys.executable, "-m", "eevp_batch", "submit", str(job)]
    yield job, subprocess.run(command, capture_output=True, text=True, timeout=110)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_from_submit_to_report(
    submitted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    job, done = submitted
    out = job.parent / "out"
    assert done.returncode == 0, done.stderr
    assert "20 in, 18 ok, 2 in error (10.0 %)" in done.stdout
    assert "tokens by exit layer" in done.stdout and "sample generations" in done.stdout
    assert "Traceback" not in done.stderr and "\x1b" not in done.stdout
    assert "20/20 rows (100%)" in done.stderr, "plain progress lines go to stderr"
    assert "word start" in (out / "report.html").read_text(), "a job leaves its report"
    assert (out / "README.md").read_text().startswith("---\n")
    (ready,) = (e for e in read_events(Store.open(out)) if e["event"] == "replica_ready")
    assert ready["machine"]["cores"] >= 1 and ready["machine"]["torch"], "what it ran on"
    assert invoke("verify", out).exit_code == 0
    assert json.loads(invoke("validate", job, "--json").stdout)["resumes"] is True
    before = files(out / "data")
    result = invoke("validate", job, "--set", "exit.threshold=0.3")
    assert result.exit_code == 4 and "exit.threshold: planned 0.2, now 0.3" in result.stderr
    assert invoke("submit", job, "--set", "exit.threshold=0.3").exit_code == 4
    again = invoke("submit", job)
    assert again.exit_code == 0 and "18 ok" in again.stdout, again.stderr
    assert files(out / "data") == before, "a finished job is not run again"


@pytest.mark.ray
@pytest.mark.slow
def test_too_many_errors_end_with_3(job: Path) -> None:
    options = ["--set", "run.max_error_rate=0.05"]
    command = [sys.executable, "-m", "eevp_batch", "run", str(job), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 3, done.stderr
    assert "in error" in done.stdout, "what was done is summed up"
    assert "a higher limit" in done.stderr, "the user is not told how to go on"
    retry = ("retry-errors", job.parent / "out", "--class", "NoSuchError")
    assert invoke(*retry, "--set", "run.max_error_rate=0.05").exit_code == 3
    again = invoke(*retry, "--set", "run.max_error_rate=0.2")
    assert again.exit_code == 0 and "2 in error" in again.stdout, again.stderr
    assert "no row in error of class NoSuchError" in again.stderr
    assert invoke(*retry, "--set", "sampling.seed=1").exit_code == 4
