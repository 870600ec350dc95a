"""Proposals: near the head, the same for a row in every batch, and good enough to keep by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.proposals import (
    Int8Proposal,
    Proposal,
    ShortlistProposal,
    fit_low_rank,
    likeliest_ids,
    make_proposal,
    state_moment,
)
from eevp_batch.engine.pruned_vocab import prune, pruned_scores
from eevp_batch.errors import SpecError, UsageError
from eevp_batch.spec import VocabSpec
from eevp_batch.spec_file import load_spec_text
from tests.bench.prompts import throughput_prompts
from tests.engine.conftest import load_model, make_engine, needs_vnni

V, E = 1024, 64


def head(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(V, E, generator=torch.Generator().manual_seed(1)).to(dtype)


def states(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """States in a subspace of 16 dimensions, plus a little of everything."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(16, E, generator=generator)
    low = torch.randn(rows, 16, generator=generator) @ mix
    return (low + 0.01 * torch.randn(rows, E, generator=generator)).to(dtype)


def proposals(dtype: torch.dtype) -> list[Proposal]:
    many = states(500).double()
    factor = fit_low_rank(head(dtype), many.T @ many / len(many), 16).of(head(dtype))
    listed = ShortlistProposal(head(dtype), torch.arange(V))
    return [
        factor,
        listed,
        *([Int8Proposal(head(dtype))] if torch.cpu._is_vnni_supported() else []),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proposed_scores_are_near_the_heads(dtype: torch.dtype) -> None:
    exact = states(30, dtype).float() @ head(dtype).float().T
    for proposal in proposals(dtype):
        error = proposal(states(30, dtype)).float() - exact
        assert error.std() < 0.02 * exact.std(), f"{type(proposal).__name__} is far off"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shortlist_scores_its_ids_as_the_head_does(dtype: torch.dtype) -> None:
    listed = ShortlistProposal(head(dtype), torch.tensor([900, 3, 3, 41]))
    assert listed.ids.tolist() == [3, 41, 900] and listed.is_exact
    whole = PackedLinear(head(dtype))(states(30, dtype))
    torch.testing.assert_close(listed(states(30, dtype)), whole[:, [3, 41, 900]])


def test_the_likeliest_ids_are_those_with_most_of_the_probability() -> None:
    ids = torch.tensor([[5, 2], [5, 7], [2, 9]])
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert likeliest_ids(ids, shares, 12, 3).tolist() == [5, 7, 9]
    assert likeliest_ids(ids, shares, 12, 6).tolist() == [0, 1, 2, 5, 7, 9], "the lowest beside"
    assert likeliest_ids(ids, shares, 12, 99).tolist() == list(range(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_proposed_scores_do_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    many = states(64, dtype)
    many[5:] *= 50  # a scale shared by the batch would show
    for proposal in proposals(dtype):
        together = proposal(many)
        for rows in (1, 2, 15, 16, 17, 40):
            fewer = proposal(many[:rows])
            if dtype == torch.bfloat16 or isinstance(proposal, Int8Proposal):
                assert torch.equal(fewer, together[:rows]), f"{rows} rows differ from 64"
            else:
                torch.testing.assert_close(fewer, together[:rows])


def test_knowing_the_states_makes_a_better_factor() -> None:
    many, fresh = states(500).double(), states(40)
    exact = fresh @ head(torch.float32).T

    def error(moment: torch.Tensor) -> float:
        weight = head(torch.float32)
        return float((fit_low_rank(weight, moment, 16).of(weight)(fresh) - exact).norm())

    aware = error(many.T @ many / len(many))
    assert aware < 0.1 * error(torch.eye(E, dtype=torch.float64))


def test_a_factor_of_full_rank_is_the_head() -> None:
    weight = head(torch.float32)
    factor = fit_low_rank(weight, torch.eye(E, dtype=torch.float64), E)
    assert factor.mix.shape == (E, E) and not factor.is_whole
    exact = states(8) @ weight.T
    torch.testing.assert_close(factor.of(weight)(states(8)), exact, rtol=1e-4, atol=1e-3)


def test_factors_are_of_the_head_s_type() -> None:
    weight = head(torch.bfloat16)
    found = fit_low_rank(weight, torch.eye(E, dtype=torch.float64), 8).of(weight)
    assert (found.left.dtype, found.right.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (found.left.shape, found.right.shape) == ((V, 8), (8, E))


def test_the_moment_is_that_of_the_normed_states(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    last = state_moment(model, model.config.num_hidden_layers)
    weight = model.model.norm.weight.detach().double()
    # A normed state has a mean square of one in every position before the norm's own weight.
    torch.testing.assert_close((last.diag() / weight**2).mean(), torch.tensor(1.0).double())
    assert torch.equal(last, state_moment(model, model.config.num_hidden_layers)), "repeatable"


def test_the_moment_is_that_of_the_layer(tiny_llama: Path) -> None:
    model = load_model(tiny_llama)
    caught: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda *call: caught.append(call[-1]))
    found = state_moment(model, 2)
    assert len(model.model.layers) == model.config.num_hidden_layers, "as it was"
    with torch.inference_mode():
        states = model.model.norm(caught[0]).flatten(0, 1).double()
    torch.testing.assert_close(found, states.T @ states / len(states))


@pytest.mark.parametrize(
    ("vocab", "line"),
    [
        ("{proposal: int4}", r'exit\.vocab\.proposal: found "int4"; allowed: full, int8, low_rank'),
        ("{rank: 9}", r"exit\.vocab\.rank: found 9; allowed: null unless exit\.vocab\.proposal is"),
        ("{proposal: shortlist}", r"found \S*shortlist\S*; allowed: full, int8, low_rank without"),
        ("{top_k: null, proposal: int8}", r"exit\.vocab\.proposal: found \S*int8.*; allowed: full"),
    ],
)
def test_a_job_file_that_proposes_nonsense_is_refused(vocab: str, line: str) -> None:
    text = "input: {path: a}\nmodel: {path: b}\noutput: {path: c}\n"
    with pytest.raises(SpecError, match=line):
        load_spec_text(f"{text}exit: {{vocab: {vocab}}}", "job.yaml", "/jobs", ())


def test_a_rank_beyond_the_width_is_refused(tiny_llama: Path) -> None:
    vocab = {"proposal": "low_rank", "rank": 4096}
    with pytest.raises(UsageError, match=r"exit\.vocab\.rank: found 4096; allowed: at most"):
        make_engine(tiny_llama, layers=[2, 4], vocab=vocab)


def test_rescoring_that_costs_more_than_the_head_is_logged(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vocab = {"proposal": "low_rank"}
    make_engine(tiny_llama, layers=[2, 4], top_k=8, max_batch=1, vocab=vocab)
    assert not caplog.records, "8 ids of one row are cheap"
    make_engine(tiny_llama, layers=[2, 4], top_k=64, max_batch=64, vocab=vocab)
    assert "exit.vocab.proposal saves nothing" in caplog.text


def demo_states(model: PreTrainedModel, path: Path, layer: int) -> torch.Tensor:
    """Normed states after a layer at the prompt tokens of 24 chats."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for text in throughput_prompts()[::8]:
        chat = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=False)
        hidden = model.model(ids, output_hidden_states=True).hidden_states[layer]
        found.append(model.model.norm(hidden)[0])
    return torch.cat(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocab", "least"),
    [
        (VocabSpec(top_k=64, proposal="low_rank", rank=128), 0.98),
        (VocabSpec(top_k=256, proposal="low_rank"), 0.99),
        pytest.param(VocabSpec(top_k=64, proposal="int8"), 0.99, marks=needs_vnni),
    ],
)
@torch.inference_mode()
def test_the_demo_models_best_id_is_kept(
    demo_model_path: Path, vocab: VocabSpec, least: float
) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_path, dtype=torch.float32).eval()
    normed = demo_states(model, demo_model_path, 10)
    proposal = make_proposal(model, vocab, 10)
    assert proposal is not None and vocab.top_k is not None
    ids = prune(proposal(normed), vocab.top_k, torch.tensor([2]))[0].ids
    weight = model.lm_head.weight
    exact = (normed @ weight.T).float()
    kept = (ids == exact.argmax(-1, keepdim=True)).any(-1).float().mean()
    assert kept >= least, f"only {kept:.2%} of the best ids were kept"
    expected = exact.gather(1, ids.long())
    torch.testing.assert_close(pruned_scores(normed, weight, ids), expected, rtol=0.02, atol=0.1)
