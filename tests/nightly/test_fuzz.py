"""A few cases of what the nightly command tries a hundred thousand of."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from eevp_batch.engine import templates
from tests.nightly.fuzz import fuzz
from tests.nightly.targets import Target, all_targets

CASES = int(os.environ.get("EEVP_FUZZ_CASES", "40"))


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    cpu_s = templates.MAX_CPU_S
    yield {target.name: target for target in all_targets()}
    templates.MAX_CPU_S = cpu_s


@pytest.mark.parametrize(
    "name",
    [
        "job file and --set",
        "input Parquet",
        "output folder",
        "calibration file",
        "fitted.json",
        "model folder",
        "templates and rows",
    ],
)
def test_each_case_gives_a_result_or_our_own_error(targets: dict[str, Target], name: str) -> None:
    outcomes = fuzz(targets[name], CASES, round_seed=1)
    assert outcomes.total() >= CASES
    print(f"{name}: {outcomes.total()} cases: {dict(outcomes)}")
    assert any(word.endswith("Error") for word in outcomes), "no case was refused"


def test_every_target_is_here(targets: dict[str, Target]) -> None:
    assert len(targets) == 7
