"""Ray's checkpoint benchmark, small: what is redone is what was deleted, row for row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import resume


@pytest.mark.parametrize("share", resume.SHARES)
def test_deleted_records_cost_their_own_rows_and_no_others(tmp_path: Path, share: float) -> None:
    found = resume.redo(tmp_path, share, chunks=20, seed=int(share * 100))
    assert len(found.deleted) == round(share * 20) > 0
    assert found.leased == found.deleted, "chunks leased = chunks whose record is gone"
    assert found.rewritten == found.deleted, "no other part was touched"
    assert found.rows == found.rows_deleted


def test_the_start_of_a_large_resume_is_measured(tmp_path: Path) -> None:
    resume.make_large(tmp_path, 200)
    found = resume.measure(tmp_path)
    assert found["rows"] == 200, "every record was read"
    assert found["of_it_totals_s"] > 0 and 0 < found["to_first_lease_s"] < found["all_s"]
    assert found["peak_mib"] >= found["imports_mib"] > 0
