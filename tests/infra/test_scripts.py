"""The Dockerfile and the shell scripts: linted by hadolint and shellcheck."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "docker" / "Dockerfile"
SCRIPTS = sorted([*INFRA.rglob("*.sh"), *INFRA.rglob("*.sbatch")])


def tool(name: str) -> str:
    """A program that the `test` extra installs, whether or not its folder is on the path."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is not installed; it comes with the extra `test`"
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_dockerfile_is_clean() -> None:
    assert run(tool("hadolint"), str(DOCKERFILE)) == ""


def test_what_is_wrong_in_a_dockerfile_is_found(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install gcc\n")
    assert "DL3006" in run(tool("hadolint"), str(tmp_path / "Dockerfile"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_clean(path: Path) -> None:
    options = ("--shell=bash", "--external-sources", f"--source-path={path.parent}")
    assert run(tool("shellcheck"), *options, "--exclude=SC1091", str(path)) == ""


def test_the_steps_of_the_dockerfile_are_a_shell_script(tmp_path: Path) -> None:
    command = [sys.executable, str(INFRA / "docker" / "steps.py"), str(DOCKERFILE)]
    steps = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (tmp_path / "steps.sh").write_text(steps)
    assert run(tool("shellcheck"), "--shell=bash", "--severity=error", f"{tmp_path}/steps.sh") == ""
    assert len(re.findall(r"^run ", steps, re.MULTILINE)) == len(
        re.findall(r"^RUN ", DOCKERFILE.read_text(), re.MULTILINE)
    )


def test_a_step_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nADD https://example.org/x /x\n")
    command = [sys.executable, str(INFRA / "docker" / "steps.py"), str(tmp_path / "Dockerfile")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode != 0
    assert "found ADD" in done.stderr


def test_the_image_gets_what_its_dockerfile_copies() -> None:
    allowed = {
        line[1:]
        for line in DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
