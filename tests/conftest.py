"""Fixtures that several rooms share: tiny models on disk, and the demo model."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "models" / "smollm2-135m-instruct"

# Nothing that a test needs is on the hub, and nothing it does is to be counted.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# What tests submit is nobody's history.
STATE_HOME = tempfile.mkdtemp(prefix="eevp-state-")
os.environ["XDG_STATE_HOME"] = STATE_HOME
# Threads that spin while they wait make tiny models five times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_unconfigure() -> None:
    """Leave nothing of it behind."""
    shutil.rmtree(STATE_HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]  # keywords hold folders too
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_model_path(family)`: the folder of a tiny random model, written once a run."""
    from tests.tiny_models import save_model

    folders: dict[str, Path] = {}

    def path_of(family: str) -> Path:
        if family not in folders:
            folders[family] = save_model(family, tmp_path_factory.mktemp("models") / family)
        return folders[family]

    return path_of


@pytest.fixture(scope="session", params=["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def any_tiny_model(request: pytest.FixtureRequest, tiny_model_path: Callable[[str], Path]) -> Path:
    """The folder of a tiny model, once for every family; its name is the family's."""
    return tiny_model_path(request.param)


@pytest.fixture(scope="session")
def tiny_llama(tiny_model_path: Callable[[str], Path]) -> Path:
    """The folder of a tiny random Llama with an untied head."""
    return tiny_model_path("llama")


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The folder of the demo model; without it the test is skipped, or fails in infra/test.sh."""
    if (DEMO_MODEL / "SOURCE.json").is_file():
        return DEMO_MODEL
    missing = f"{DEMO_MODEL} is not there; make it with: python infra/fetch_model.py"
    if os.environ.get("EEVP_REQUIRE_DEMO_MODEL") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


Figures = Callable[..., dict[str, Any]]
"""A benchmark and its options, to what it writes."""


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figures:
    """Runs a benchmark here, as its command would; options that hold blanks are given apart."""

    def figures_of(benchmark: ModuleType, options: str, *more: str) -> dict[str, Any]:
        out = tmp_path / "figures.json"
        command = [benchmark.__name__, "--out", str(out), *options.split(), *more]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    return figures_of
