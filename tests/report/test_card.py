from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from eevp_batch.report.card import MARK, SNIPPETS, render_card
from eevp_batch.report.figures import JobFigures, gather
from eevp_batch.report.write import write_report
from eevp_batch.storage.store import Store
from eevp_batch.storage.verify import verify
from tests.report.outputs import EVIL
from tests.storage.jobs import make_spec, run_job, write_input


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scripted job's output, with its report and card."""
    folder = tmp_path_factory.mktemp("card")
    source = write_input(folder / "in.parquet", [f"row-{number}" for number in range(20)])
    store = Store.open(folder / "out")
    run_job(store, make_spec(source))
    write_report(store, gather(store))
    return folder / "out"


def test_the_front_matter_is_what_the_hub_reads(out: Path) -> None:
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["size_categories"] == ["n<1K"] and "license" not in data
    paths = {config["config_name"]: config["data_files"][0]["path"] for config in data["configs"]}
    assert paths == {"default": "data/*.parquet", "errors": "errors/*.parquet"}
    assert all(list(out.glob(path)) for path in paths.values())
    assert body.startswith("\n# test\n")


def test_the_card_says_how_the_data_came_about(out: Path) -> None:
    text = (out / "README.md").read_text()
    rows = pq.read_table(out / "data").num_rows
    assert f"{rows} generations" in text and "EmptyPromptError" in text
    assert "KV policy**: `propagate`" in text and "the job audited no row" in text
    for name in pq.read_schema(next((out / "data").iterdir())).names:
        assert f"| `{name}` |" in text


def test_the_card_names_no_path_of_this_machine(evil_figures: JobFigures, tmp_path: Path) -> None:
    card = render_card(evil_figures, [("a|b`c", "int32")])
    assert str(Path(evil_figures.summary.out).parent) not in card
    assert evil_figures.summary.model not in card, "a folder's name alone"
    assert EVIL not in card and "| `a\\|b'c` | `int32` |" in card
    assert "rows were run at full depth too" in card


def test_report_and_card_do_not_disturb_the_proof(out: Path) -> None:
    assert verify(Store.open(out)).problems == []


def test_a_readme_of_somebody_else_is_left_alone(out: Path) -> None:
    store = Store.open(out)
    own = (out / "README.md").read_text()
    (out / "README.md").write_text("mine\n")
    written = write_report(store, gather(store))
    assert [Path(path).name for path in written] == ["report.html"]
    assert (out / "README.md").read_text() == "mine\n"
    (out / "README.md").write_text(f"old\n{MARK}\n")
    write_report(store, gather(store))
    assert (out / "README.md").read_text() == own


@pytest.mark.parametrize("library", SNIPPETS)
def test_the_snippets_load_the_data(out: Path, tmp_path: Path, library: str) -> None:
    assert f"```python\n{SNIPPETS[library]}```" in (out / "README.md").read_text()
    pytest.importorskip(library, exc_type=ImportError)
    assert importlib.util.find_spec(library) is not None
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS[library]],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(out / "data")
    expected = table.num_rows if library != "duckdb" else table["finish_reason"][0].as_py()
    assert str(expected) in done.stdout
