"""The file of a calibration: what is written is read back, damage and other jobs are refused."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from eevp_batch.calibration_file import BINDING_NAMES, Binding, Calibration
from eevp_batch.errors import CalibrationError
from eevp_batch.spec import DecaySpec


def some_binding(**changes: Any) -> Binding:
    return Binding(
        **{
            "model_hash": "a" * 64,
            "weights_sha256": "b" * 64,
            "exit_layers": (6, 12, 30),
            "top_k": 256,
            "prune_layer": 6,
            "proposal": "low_rank",
            "rank": 64,
            "final_head": "full",
            "confidence": "margin",
            "decay": DecaySpec(temperature=4.0),
            "kv": "recompute",
            "max_waiting": 8,
            "prefill": "full",
            "dtype": "bfloat16",
            "max_new_tokens": 256,
            **changes,
        }
    )


def some_calibration(**changes: Any) -> Calibration:
    return Calibration(
        **{
            "created": datetime(2026, 11, 24, 12, 30, tzinfo=UTC),
            "delta": 0.01,
            "epsilon": 0.05,
            "p_value_kind": "betting",
            "num_rows": 800,
            "risk": "token",
            "thresholds": (0.75, 1.25),
            "observed_risk": 0.004,
            "p_value": 0.031,
            "exit_share": 0.7,
            "mean_layer": 12.5,
            "binding": some_binding(),
            "facts": {"rows": "train-0.parquet[:800]"},
            **changes,
        }
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "calibration.json"
    for wanted in (
        some_calibration(),
        some_calibration(risk="sequence", metric="edit"),
        some_calibration(binding=some_binding(weights_sha256=None, decay=None, rank=None)),
    ):
        wanted.save(path)
        assert Calibration.load(path) == wanted
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]
    assert json.loads(path.read_text())["created"] == "2026-11-24T12:30:00Z"


CHANGES: dict[str, Any] = {
    "model_hash": "c" * 64,
    "weights_sha256": None,
    "exit_layers": (6, 30),
    "top_k": 128,
    "prune_layer": 12,
    "proposal": "full",
    "rank": 32,
    "final_head": "pruned",
    "confidence": "max_prob",
    "decay": DecaySpec(temperature=4.0, scaled=True),
    "kv": "propagate",
    "max_waiting": 4,
    "prefill": "bridge",
    "dtype": "float32",
    "max_new_tokens": 128,
}


def test_every_field_of_a_binding_has_a_name_and_is_compared() -> None:
    assert set(BINDING_NAMES) == set(CHANGES) == set(Binding.model_fields)


@pytest.mark.parametrize("field", CHANGES)
def test_a_job_that_differs_in_one_field_is_refused(field: str) -> None:
    calibration = some_calibration()
    found = some_binding(**{field: CHANGES[field]})
    mismatch, *more = calibration.mismatches(found)
    assert mismatch.field == BINDING_NAMES[field]
    assert mismatch.certified == some_binding().model_dump(mode="json")[field]
    assert mismatch.found == found.model_dump(mode="json")[field]
    assert [other.field for other in more] == (["exit.max_waiting"] if field == "kv" else [])
    with pytest.raises(CalibrationError, match=f"(?s)here.json.*{mismatch.field}: certified"):
        calibration.refuse_others(found, "here.json")


def test_the_certified_job_is_not_refused() -> None:
    calibration = Calibration.from_json(some_calibration().to_json(), "here")
    assert calibration.mismatches(some_binding()) == []
    calibration.refuse_others(some_binding(), "here")


def test_settings_that_change_nothing_are_not_compared() -> None:
    bare = {"top_k": None, "prune_layer": None, "proposal": "full", "rank": None}
    calibration = some_calibration(binding=some_binding(**bare, kv="propagate"))
    other = some_binding(**{**bare, "final_head": "pruned", "max_waiting": 1}, kv="propagate")
    assert calibration.mismatches(other) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"p_value": 0.06}, "p_value: found 0.06; allowed: at most epsilon, 0.05"),
        ({"thresholds": (0.5,)}, "thresholds: found 1; allowed: 2"),
        ({"risk": "sequence"}, "metric: found None"),
        ({"metric": "edit"}, "metric: found edit"),
        ({"delta": 1.0}, "delta"),
        ({"observed_risk": -0.1}, "observed_risk"),
        ({"created": datetime(2026, 11, 24)}, "created"),
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_certificate_that_certifies_nothing_is_refused(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        some_calibration(**changes)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"p_value": 0.5}, "p_value: found 0.5"),
        ({"num_rows": "800"}, "num_rows"),
        ({"binding": {}}, "binding.model_hash: Field required"),
    ],
)
def test_an_edited_file_is_refused(tmp_path: Path, edit: dict[str, Any], complaint: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(json.loads(some_calibration().to_json()) | edit))
    with pytest.raises(CalibrationError, match=f"c.json: {complaint}"):
        Calibration.load(path)


def test_a_file_that_is_not_there_or_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(some_calibration().to_json()[:100])
    with pytest.raises(CalibrationError, match=r"cut\.json: Invalid JSON"):
        Calibration.load(tmp_path / "cut.json")
