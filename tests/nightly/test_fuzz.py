"""A few cases of what the nightly command tries a hundred thousand of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from eevp_batch.engine import templates
from tests.nightly.fuzz import fuzz
from tests.nightly.pieces import Pieces
from tests.nightly.targets import READERS

CASES = int(os.environ.get("EEVP_FUZZ_CASES", "40"))


@pytest.fixture(autouse=True)
def _limits_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target of templates has little patience with them."""
    monkeypatch.setattr(templates, "MAX_CPU_S", templates.MAX_CPU_S)


@pytest.mark.parametrize("name", READERS)
def test_each_case_gives_a_result_or_our_own_error(name: str) -> None:
    outcomes = fuzz(READERS[name].make(), CASES, round_seed=1)
    assert outcomes.total() >= CASES
    print(f"{name}: {outcomes.total()} cases: {dict(outcomes)}")
    assert any(word.endswith("Error") for word in outcomes), "no case was refused"


def test_a_trial_goes_on_where_it_was_left(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "fuzz.jsonl")
    assert pieces.found() == {}
    pieces.keep("a", {"cases": 3})
    with pieces.path.open("a") as file:
        file.write('["b", {"ca')  # it was killed while it wrote
    assert pieces.found() == {"a": {"cases": 3}}
    Pieces(pieces.path).keep("c", {"cases": 4})
    assert pieces.found() == {"a": {"cases": 3}, "c": {"cases": 4}}
