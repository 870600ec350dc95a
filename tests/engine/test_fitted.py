"""The folder of fitted exits: what is written is read back, and damage is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eevp_batch.engine.fitted import MANIFEST, WEIGHTS, Affine, Bridge, FittedExits, unit_state
from eevp_batch.engine.proposals import LowRankFit
from eevp_batch.errors import FittedExitsError
from tests.engine.test_exit_heads import random_head


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
        proposal=LowRankFit(torch.randn(2, 8), torch.randn(8, 2)),
        tail=3,
        facts={"data": {"rows": 5}},
    )


def without(folder: Path, name: str) -> None:
    """Take a tensor out of a folder, its hash as it should be."""
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


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


def test_heads_of_both_kinds_stand_side_by_side(tmp_path: Path) -> None:
    heads = {1: affine(8, 8), 3: random_head(8, 5)}
    bare = dataclasses.replace(some_exits(), proposal=None)
    dataclasses.replace(bare, heads=heads).save(tmp_path / "mlp")
    bare.save(tmp_path / "affine")
    found, units = FittedExits.load(tmp_path / "mlp").heads, torch.randn(4, 8)
    for layer, head in heads.items():
        assert type(found[layer]) is type(head)
        assert torch.equal(found[layer](units), head(units))
    formats = [
        json.loads((tmp_path / n / MANIFEST).read_text())["format"] for n in ("affine", "mlp")
    ]
    assert formats == [1, 2], "whoever knows affine heads alone refuses the other folder"


def test_a_proposal_takes_no_number_for_each_id_of_the_vocabulary(tmp_path: Path) -> None:
    some_exits().save(tmp_path)
    names = {name for name in load_file(tmp_path / WEIGHTS) if name.startswith("proposal")}
    assert names == {"proposal.right", "proposal.mix"}
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == 3, "older readers refuse it"


def test_a_proposal_of_an_older_folder_is_read(tmp_path: Path) -> None:
    left, right = torch.randn(16, 2), torch.randn(2, 8)
    old = dataclasses.replace(some_exits(), proposal=LowRankFit(right, left, is_whole=True))
    old.save(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == 1, "as it was written then"
    found = FittedExits.load(tmp_path).proposal
    assert found is not None and found.is_whole
    proposal = found.of(torch.randn(16, 8))
    assert torch.equal(proposal.left, left) and torch.equal(proposal.right, right)


def test_half_of_a_proposal_is_refused(tmp_path: Path) -> None:
    some_exits().save(tmp_path)
    without(tmp_path, "proposal.mix")
    with pytest.raises(FittedExitsError, match=r"found no tensor .proposal\.mix."):
        FittedExits.load(tmp_path)


def test_a_folder_from_before_there_were_mlps_is_read(tmp_path: Path) -> None:
    """Byte for byte what was written then: no field that came later."""
    tensors = {"heads.2.weight": torch.randn(8, 8), "heads.2.bias": torch.randn(8)}
    save_file(tensors, tmp_path / WEIGHTS)
    digest = hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    shape = {"num_layers": 4, "hidden_size": 8, "exit_layers": [2], "tail": 1, "lead": 0}
    manifest = {"format": 1, "model_hash": "abc", **shape, "weights_sha256": digest}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    head = FittedExits.load(tmp_path).heads[2]
    assert isinstance(head, Affine) and torch.equal(head.weight, tensors["heads.2.weight"])


def test_half_of_an_mlp_is_refused(tmp_path: Path) -> None:
    dataclasses.replace(some_exits(), heads={1: random_head(8, 5)}).save(tmp_path)
    without(tmp_path, "heads.1.up.bias")
    with pytest.raises(FittedExitsError, match=r"found no tensor .heads\.1\.up\.bias."):
        FittedExits.load(tmp_path)


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


@pytest.mark.parametrize("content", ["[]", '{"format": 4}', "{", "3"])
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
