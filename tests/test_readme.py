"""What the README shows is true: its job is valid, its program runs, its tables are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eevp_batch import errors
from eevp_batch.cli import main
from eevp_batch.spec import JobSpec
from eevp_batch.spec_file import load_spec_text

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no {language} block"
    return found[1]


def test_the_smallest_job_is_valid_and_shows_exactly_the_required_fields(tmp_path: Path) -> None:
    spec = load_spec_text(block("yaml"), "README.md", tmp_path)
    assert spec.name == "first"
    required = {name for name, field in JobSpec.model_fields.items() if field.is_required()}
    assert required == {"input", "model", "output"}


def test_every_command_and_exit_code_has_its_line() -> None:
    for command in main.commands:
        assert re.search(rf"^\| `{command}[ `]", README, re.M), (
            f"the README does not list the command {command}"
        )
    codes = {value.exit_code for value in vars(errors).values() if hasattr(value, "exit_code")}
    for code in sorted(codes):
        assert f"\n| {code} |" in README, f"the README does not explain exit code {code}"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_library_program_runs(demo_model_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", block("python")],
        cwd=demo_model_path.parent.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "What is the capital of France?" in result.stdout
