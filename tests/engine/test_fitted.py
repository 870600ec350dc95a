"""The folder of fitted exits: what is written is read back, and damage is noticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from eevp_batch.engine.fitted import MANIFEST, WEIGHTS, Affine, Bridge, FittedExits, unit_state
from eevp_batch.engine.proposals import LowRankProposal
from eevp_batch.errors import FittedExitsError


def affine(width_out: int, width_in: int) -> Affine:
    return Affine(torch.randn(width_out, width_in), torch.randn(width_out))


def some_exits() -> FittedExits:
    torch.manual_seed(0)
    return FittedExits(
        model_hash="abc",
        num_layers=4,
        hidden_size=8,
        exit_layers=(1, 3),
        heads={1: affine(8, 8), 3: affine(8, 8)},
        bridges={
            ("generated", 1): Bridge({2: affine(4, 8), 3: affine(4, 8), 4: affine(4, 8)}),
            ("generated", 3): Bridge({4: affine(4, 2)}, down=torch.randn(2, 8)),
            ("prompt", 1): Bridge({2: affine(4, 8), 3: affine(4, 8), 4: affine(4, 8)}),
        },
        proposal=LowRankProposal(torch.randn(16, 2), torch.randn(2, 8)),
        tail=3,
        facts={"data": {"rows": 5}},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    exits = some_exits()
    exits.save(tmp_path / "fitted")
    found = FittedExits.load(tmp_path / "fitted")
    for field in ("model_hash", "num_layers", "hidden_size", "exit_layers", "tail", "facts"):
        assert getattr(found, field) == getattr(exits, field), field
    assert found.heads.keys() == exits.heads.keys()
    assert found.bridges.keys() == exits.bridges.keys()
    for name, tensor in exits._tensors().items():
        assert torch.equal(found._tensors()[name], tensor), name


def test_without_optional_parts(tmp_path: Path) -> None:
    bare = dataclasses.replace(some_exits(), heads={}, bridges={}, proposal=None)
    bare.save(tmp_path)
    found = FittedExits.load(tmp_path)
    assert (found.heads, found.bridges, found.proposal) == ({}, {}, None)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_missing_file(tmp_path: Path, name: str) -> None:
    some_exits().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FittedExitsError, match=f"{name}: cannot be read"):
        FittedExits.load(tmp_path)


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    some_exits().save(tmp_path)
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(FittedExitsError, match="found sha256"):
        FittedExits.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"format": 2}', "{", "3"])
def test_manifest_of_another_kind(tmp_path: Path, content: str) -> None:
    some_exits().save(tmp_path)
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(FittedExitsError, match=MANIFEST):
        FittedExits.load(tmp_path)


def test_manifest_holds_the_facts(tmp_path: Path) -> None:
    some_exits().save(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["data"] == {"rows": 5}


def test_unit_states_have_one_scale() -> None:
    hidden = torch.randn(5, 8) * torch.tensor([1e-2, 1, 10, 1e3, 1e5])[:, None]
    rms = unit_state(hidden, 1e-9).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(5))
