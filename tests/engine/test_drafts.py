"""Sampled drafts: whatever they were drawn from, what comes out is distributed as at full depth."""

from __future__ import annotations

import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from eevp_batch.engine.drafts import DraftChoices, judge
from eevp_batch.engine.sampling import Choices, choices, penalise
from eevp_batch.records import Prompt
from eevp_batch.spec import SamplingSpec
from tests.engine.conftest import load_model, make_engine, run
from tests.tiny_models import save_model

V = 8
END_ID = 1


def random_choices(seed: int, sampling: SamplingSpec) -> Choices:
    """What a token is drawn from by random scores."""
    return choices(torch.randn(1, V, generator=torch.Generator().manual_seed(seed)) * 1.5, sampling)


def dense(found: Choices) -> torch.Tensor:
    return torch.zeros(1, V).scatter_add_(1, found.columns, found.probabilities)[0]


@pytest.mark.parametrize(
    ("full", "drafted"),
    [
        (SamplingSpec(temperature=1.0), SamplingSpec(temperature=1.0)),
        (SamplingSpec(temperature=0.8, top_p=0.7), SamplingSpec(temperature=0.8, top_p=0.7)),
        (SamplingSpec(temperature=1.0), SamplingSpec(temperature=1.0, top_k=2)),
        (SamplingSpec(temperature=1.0, top_k=1), SamplingSpec(temperature=1.3)),
    ],
)
@pytest.mark.parametrize("seeds", [(0, 1), (2, 2)])
def test_a_judged_draft_is_distributed_as_the_full_model(
    full: SamplingSpec, drafted: SamplingSpec, seeds: tuple[int, int]
) -> None:
    """An even grid of both numbers, for every draft, weighted by how often it is drawn."""
    p, q = random_choices(seeds[0], full), random_choices(seeds[1], drafted)
    side = 128
    grid = (torch.arange(side) + 0.5) / side
    accept, redraw = grid.repeat_interleave(side), grid.repeat(side)
    found = torch.zeros(V)
    for draft, weight in enumerate(dense(q).tolist()):
        if weight:
            rows = side * side
            judged = judge(
                *(Choices(*(part.expand(rows, -1) for part in both)) for both in (p, q)),
                torch.full((rows,), draft),
                accept,
                redraw,
                V,
            )
            found += weight * torch.bincount(judged, minlength=V) / rows
    torch.testing.assert_close(found, dense(p), rtol=0, atol=2 / side)


def test_a_draft_of_the_full_model_itself_always_stands() -> None:
    found = random_choices(3, SamplingSpec(temperature=1.0))
    for draft in range(V):
        ones = torch.ones(1)  # what a number just below 1 is rounded to
        judged = judge(found, found, torch.tensor([draft]), ones - 2**-24, ones, V)
        assert judged.item() == draft


def test_choices_come_back_as_they_were_kept() -> None:
    store = DraftChoices(3, 2, 5, torch.device("cpu"))
    wide = Choices(torch.full((2, 5), 0.2), torch.arange(10).view(2, 5))
    narrow = Choices(torch.tensor([[0.5, 0.5]]), torch.tensor([[7, 9]]))
    first = (torch.tensor([0, 2]), torch.tensor([4, 4]))
    second = (torch.tensor([2]), torch.tensor([5]))
    store.store(*first, wide)
    store.store(*second, narrow)
    assert all(torch.equal(*pair) for pair in zip(store.load(*first), wide, strict=True))
    found = store.load(*second)
    assert found.columns.tolist() == [[7, 9, 0, 0, 0]]
    assert found.probabilities.tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]]
    store.store(torch.tensor([2]), torch.tensor([6]), narrow)
    assert store.load(torch.tensor([2]), torch.tensor([4])).columns[0, 0] == 7, "places are reused"


# --- whole generations ---------------------------------------------------------------------------

NEW_TOKENS = 3
NUM_SAMPLES = 4000


@pytest.fixture(scope="module")
def tiny_vocab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of 8 ids."""
    return save_model("llama", tmp_path_factory.mktemp("models") / "v8", seed=3, vocab_size=V)


def exact(path: Path, prompt: list[int], sampling: SamplingSpec) -> dict[tuple[int, ...], float]:
    """Probability of every generation, by plain forwards of the whole model."""
    model, found = load_model(path), {}
    open_ends: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            rows = torch.tensor([[*prompt, *ids] for ids in open_ends])
            scores = model(rows).logits[:, -1]
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, rows, True)
        scores = penalise(scores, seen, sampling.repetition_penalty)
        drawn = choices(scores, sampling)
        probabilities = torch.zeros_like(scores).scatter_add_(1, drawn.columns, drawn.probabilities)
        grown = {
            (*ids, token_id): mass * probabilities[row, token_id].item()
            for (row, (ids, mass)), token_id in product(enumerate(open_ends.items()), range(V))
        }
        found |= {ids: mass for ids, mass in grown.items() if ids[-1] == END_ID}
        open_ends = {ids: mass for ids, mass in grown.items() if ids[-1] != END_ID}
    return found | open_ends


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """How many deviations the statistic lies above its mean (Wilson and Hilferty, 1931).

    Outcomes that are expected less than five times are counted as one.
    """
    observed, masses = [0], [0.0]
    for outcome, probability in expected.items():
        mass = probability * NUM_SAMPLES
        if mass < 5:
            observed[0] += counts[outcome]
            masses[0] += mass
        else:
            observed.append(counts[outcome])
            masses.append(mass)
    pairs = [(seen, mass) for seen, mass in zip(observed, masses, strict=True) if mass > 0]
    statistic = sum((seen - mass) ** 2 / mass for seen, mass in pairs)
    degrees = len(pairs) - 1
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def drawn(path: Path, sampling: SamplingSpec, **exit: Any) -> tuple[Counter[Any], Any]:
    """Generations of one prompt with so many seeds, and the engine that made them."""
    engine = make_engine(
        path, max_batch=128, limits={"max_resident": 400}, sampling=sampling, **exit
    )
    found = run(engine, [Prompt(0, PROMPT, sample) for sample in range(NUM_SAMPLES)])
    return Counter(tuple(generation.token_ids) for generation in found.values()), engine


PROMPT = [3, 5, 2, 7]
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"layers": [3], "top_k": None}),
    ({}, {"layers": [1, 2, 4], "threshold": [0.2, 0.1, 0.1], "top_k": 3, "max_waiting": 2}),
    ({"top_p": 0.85}, {"layers": [2, 4], "threshold": 0.1, "vocab": {"prune_layer": 4}}),
    ({"top_k": 5, "repetition_penalty": 1.2}, {"layers": [2, 4], "top_k": 4}),
]


@pytest.mark.parametrize(("sampling", "exit"), SETTINGS, ids=["whole", "pruned", "top-p", "top-k"])
def test_verified_samples_are_those_of_full_depth(
    tiny_vocab: Path, sampling: dict[str, Any], exit: dict[str, Any]
) -> None:
    """Chi-square over whole generations, early ends included; 4 deviations: once in 30,000."""
    spec = SamplingSpec(temperature=1.2, max_new_tokens=NEW_TOKENS, **sampling)
    counts, engine = drawn(tiny_vocab, spec, **{"threshold": 0.15, "top_k": 4, **exit}, kv="verify")
    assert chi_square(counts, exact(tiny_vocab, PROMPT, spec)) < 4
    for judged in (engine.stats.accepted_drafts, engine.stats.rejected_drafts):
        assert judged.total() > 300, "drafts are judged both ways"


def test_the_statistic_tells_samples_that_nobody_judged(tiny_vocab: Path) -> None:
    spec = SamplingSpec(temperature=1.2, max_new_tokens=NEW_TOKENS)
    counts, _ = drawn(tiny_vocab, spec, layers=[3], threshold=0.15, top_k=None, kv="recompute")
    assert chi_square(counts, exact(tiny_vocab, PROMPT, spec)) > 20
