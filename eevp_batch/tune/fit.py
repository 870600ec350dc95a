"""Everything that is fitted for a job, from rows that the model made at full depth.

One pass over the rows gives the sums of the bridges, the states for the heads and the moments of
the proposal; all that follows is algebra and, for the heads, some epochs of Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from eevp_batch.engine.fitted import Affine, Bridge, ExitHead, FittedExits
from eevp_batch.engine.proposals import (
    LowRankFit,
    LowRankProposal,
    fit_low_rank,
    likeliest_ids,
)
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind
from eevp_batch.errors import UsageError
from eevp_batch.tune.beginnings import Beginning
from eevp_batch.tune.bridges import fit_bridge, lift_size, usual_rank
from eevp_batch.tune.collect import Collected, collect
from eevp_batch.tune.head_training import HeadSettings, fit_head, head_figures
from eevp_batch.tune.heads import Taught, head_output
from eevp_batch.tune.regression import NormalEquations, affine, fit_ridge
from eevp_batch.tune.states import Row, prompt_key

OnProgress = Callable[[str, int, int], None]
"""Told what is going on, how many parts of it are done, and of how many."""
SHORTLIST = 4096
"""Ids of a shortlist: on the demo model their scores cost a twelfth of the whole head's."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What is fitted, and how.

    Attributes:
        exit_layers: increasing, the last layer apart.
        held_out_share: of the rows; they choose regularisation and when to stop.
        prompt_bridge: whether tokens of prompts get a bridge of their own at the first exit.
        bridge_rank: of the bridges; None: two thirds of the model's width, or full maps where they
            read the state alone.
        bridge_looks_back: whether bridges have a lift, see `Bridge`; else they read states alone.
        proposal_rank: of the low-rank proposal for the pruned vocabulary; None: no such proposal.
        shortlist: ids of the shortlist; None: no shortlist.
        tail: prompt tokens that always run at full depth where prompts are bridged.
        lead: tokens at the beginning of prompts that do; None: what all the rows' prompts share.
        heads: how the heads are fitted.
        seed: of the choice of the held-out rows.
    """

    exit_layers: Sequence[int]
    held_out_share: float = 0.2
    prompt_bridge: bool = True
    bridge_rank: int | None = None
    bridge_looks_back: bool = True
    proposal_rank: int | None = 128
    shortlist: int | None = SHORTLIST
    tail: int = 1
    lead: int | None = None
    heads: HeadSettings = field(default_factory=HeadSettings)
    seed: int = 0


def split_rows(
    rows: Sequence[Row], held_out_share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Rows to fit to, and rows held out; by seed.

    Raises:
        UsageError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UsageError(f"rows to fit to: found {len(rows)}; allowed: two or more")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(len(rows) - 1, max(1, round(held_out_share * len(rows))))
    return [rows[n] for n in order[held_out:]], [rows[n] for n in order[:held_out]]


@dataclass(frozen=True, slots=True)
class Gathered:
    """What passes over a job's rows leave for everything that is fitted.

    Attributes:
        seen: of the rows to fit to.
        judged: of held-out rows.
        fitting: the rows to fit to, by number.
        settings: with the lead that was found.
        facts: where the rows are from, how many they are, how long the passes took.
    """

    seen: Collected
    judged: Collected
    fitting: Sequence[Row]
    settings: FitSettings
    facts: dict[str, Any]


def gather(
    model: SegmentedModel,
    rows: Sequence[Row],
    settings: FitSettings,
    data: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    before: Gathered | None = None,
) -> Gathered:
    """Run rows through all layers, once those to fit to and once those held out.

    Args:
        model: cut anywhere.
        rows: full-depth generations.
        settings: what is to be fitted.
        data: where the rows are from.
        on_progress: progress.
        before: what the original left of the same rows, where this model is adapted from it; its
            targets stay what everything is held to.

    Raises:
        UsageError: too few rows, or exit layers that the model does not have.
    """
    model.recut([*settings.exit_layers, model.num_layers])
    fitting, held_out = split_rows(rows, settings.held_out_share, settings.seed)
    steps = Steps(on_progress)
    started = time.perf_counter()
    lead = settings.lead
    if lead is None:
        lead = Beginning([row.prompt_ids for row in rows], settings.tail).length
        settings = replace(settings, lead=lead)
    wanted = (settings.exit_layers, settings.prompt_bridge, lead)
    lift = lift_size(model.hidden_size) if settings.bridge_looks_back else 0
    targets = (before.seen.targets, before.judged.targets) if before else (None, None)
    seen = collect(model, fitting, *wanted, steps.of("states"), lift, targets[0])
    judged = collect(model, held_out, *wanted, steps.of("held-out states"), lift, targets[1])
    states_s = time.perf_counter() - started + (before.facts["states_s"] if before else 0.0)
    counts = {"rows": len(fitting), "held_out_rows": len(held_out)}
    keys = " ".join(sorted({prompt_key(row.prompt_ids) for row in rows}))
    facts = {**(data or {}), **counts, "states_s": round(states_s, 2), "prompt_keys": keys}
    return Gathered(seen, judged, fitting, settings, facts)


def fit_exits(
    model: SegmentedModel,
    model_hash: str,
    rows: Sequence[Row],
    settings: FitSettings,
    data: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> FittedExits:
    """Fit heads, bridges and the proposal.

    Args:
        model: cut anywhere.
        model_hash: content hash of its folder.
        rows: what it generated at full depth.
        settings: what, and how.
        data: where the rows are from; written into the manifest.
        on_progress: progress.

    Raises:
        UsageError: too few rows, or exit layers that the model does not have.
    """
    found = gather(model, rows, settings, data, on_progress)
    parts = (found.seen, found.judged, found.settings, found.facts)
    return fit_collected(model, model_hash, *parts, on_progress)


def fit_collected(
    model: SegmentedModel,
    model_hash: str,
    seen: Collected,
    judged: Collected,
    settings: FitSettings,
    data: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> FittedExits:
    """As `fit_exits`, from what passes over the rows have left; they may have been summed.

    Args:
        model: cut anywhere.
        model_hash: content hash of its folder.
        seen: of the rows to fit to.
        judged: of held-out rows.
        settings: what, and how.
        data: where the rows are from; written into the manifest.
        on_progress: progress.

    Raises:
        UsageError: too few tokens of a kind.
    """
    steps, started = Steps(on_progress), time.perf_counter()
    bridges, bridge_figures = fit_bridges(model, seen, judged, settings, steps)
    heads, head_facts = _fit_heads(model, seen, judged, settings, steps)
    first = settings.exit_layers[0]
    proposal, shortlist = None, None
    recall: dict[str, float] = {}
    coverage: dict[str, float] = {}
    if settings.proposal_rank is not None:
        proposal = _fit_proposal(model, heads[first], seen.taught[first], settings.proposal_rank)
        factors = proposal.of(model.head_weight)
        recall = proposal_recall(model, factors, heads[first], judged.taught[first])
    if settings.shortlist is not None:
        taught = (seen.taught[first], judged.taught[first])
        shortlist, coverage = _fit_shortlist(model, *taught, settings.shortlist)
    figures = {
        "heads": head_facts,
        "bridges": bridge_figures,
        "proposal_recall": recall,
        "shortlist_recall": coverage,
        "fit_s": round(time.perf_counter() - started, 2),
    }
    return FittedExits(
        model_hash=model_hash,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        exit_layers=tuple(settings.exit_layers),
        heads=heads,
        bridges=bridges,
        proposal=proposal,
        shortlist=shortlist,
        tail=settings.tail,
        lead=settings.lead or 0,
        facts={"data": dict(data or {}), "settings": asdict(settings), "figures": figures},
    )


class Steps:
    """Names the parts of a fit to whoever listens."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress

    def of(self, stage: str) -> Callable[[int, int], None]:
        """Progress of one stage."""

        def tell(done: int, total: int) -> None:
            if self._on_progress is not None:
                self._on_progress(stage, done, total)

        return tell


def fit_bridges(
    model: SegmentedModel,
    seen: Collected,
    judged: Collected,
    settings: FitSettings,
    steps: Steps,
) -> tuple[dict[tuple[Kind, int], Bridge], dict[str, Any]]:
    """The bridges of every kind of token and exit, and their figures; see `fit_collected`."""
    bridges, figures = {}, {}
    tell = steps.of("bridges")
    for done, (origin, sums) in enumerate(seen.bridges.items(), 1):
        counts = (sums.count, judged.bridges[origin].count)
        if not all(counts):
            raise UsageError(
                f"{origin[0]} tokens to fit a bridge to: found {counts[0]}, held out {counts[1]}; "
                "allowed: one or more of each"
            )
        held_out, rank = judged.bridges[origin], settings.bridge_rank
        if rank is None and seen.lift is not None:
            rank = usual_rank(model.hidden_size)
        fit = fit_bridge(sums, held_out, rank, model.dtype, seen.lift)
        bridges[origin] = fit.bridge
        figures[f"{origin[0]}.{origin[1]}"] = fit.to_json()
        tell(done, len(seen.bridges))
    return bridges, figures


def _fit_heads(
    model: SegmentedModel,
    seen: Collected,
    judged: Collected,
    settings: FitSettings,
    steps: Steps,
) -> tuple[dict[int, ExitHead], dict[str, Any]]:
    heads: dict[int, ExitHead] = {}
    figures = {}
    for e in settings.exit_layers:
        start = ridge_head(model, seen.heads[e], judged.heads[e])
        tell = steps.of(f"head after layer {e}")
        fit = fit_head(model, start, seen.taught[e], judged.taught[e], settings.heads, tell)
        heads[e] = fit.head
        figures[str(e)] = head_figures(fit, judged.taught[e], len(seen.taught[e]))
    return heads, figures


def ridge_head(model: SegmentedModel, sums: NormalEquations, held_out: NormalEquations) -> Affine:
    """The closed-form head: the least-squares change of the unit state up to the last layer."""
    last = model.num_layers
    return affine(fit_ridge(sums, held_out)[last], torch.float32)


def _fit_proposal(model: SegmentedModel, head: ExitHead, tokens: Taught, rank: int) -> LowRankFit:
    """The factor of the LM head that errs least on what this head gives it."""
    normed = head_output(model, head, tokens.units).double()
    moment = normed.T @ normed / len(normed)
    return fit_low_rank(model.head_weight, moment, min(rank, model.hidden_size))


def _fit_shortlist(
    model: SegmentedModel, tokens: Taught, judged: Taught, size: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """The ids that the job's tokens mostly are, and the share of held-out tokens that it holds."""
    ids = likeliest_ids(tokens.ids, tokens.probabilities, model.vocab_size, size)
    found = torch.isin(judged.best_ids, ids).double().mean()
    return ids.to(torch.int32), {str(len(ids)): float(found)}


@torch.no_grad()
def proposal_recall(
    model: SegmentedModel,
    proposal: LowRankProposal,
    head: ExitHead,
    tokens: Taught,
    sizes: Sequence[int] = (64, 256, 1024),
) -> dict[str, float]:
    """Share of tokens whose full-depth choice is among the K ids that are proposed, by K."""
    normed = head_output(model, head, tokens.units)
    ranks = []
    for rows, best in zip(torch.split(normed, 64), torch.split(tokens.best_ids, 64), strict=True):
        scores = proposal(rows).float()
        ranks.append((scores > scores.gather(1, best[:, None])).sum(-1))
    found = torch.cat(ranks)
    return {str(k): float((found < k).double().mean()) for k in sizes}
