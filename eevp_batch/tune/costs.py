"""How long each part of a token takes here, for the search of exit layers.

What is measured moves the choice of exits, never a result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from eevp_batch.engine.exit_heads import LaidOutHead
from eevp_batch.engine.fitted import Affine, ExitHead, MlpHead
from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.proposals import LowRankProposal, ShortlistProposal
from eevp_batch.engine.pruned_vocab import prune, pruned_scores
from eevp_batch.engine.score_summary import summarise
from eevp_batch.engine.segment_times import layer_time
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.spec import ExitSpec
from eevp_batch.tune.beginnings import num_shared
from eevp_batch.tune.bridges import lift_size, usual_rank
from eevp_batch.tune.heads import SCORED_ROWS
from eevp_batch.tune.search import Costs
from eevp_batch.tune.states import Row

REPEATS = 5
DIFFERENT = 0.45
"""Of the ids that the tokens of a batch keep, how many differ: 6,800 to 7,400 of 64 times 256 on
text of the demo model. Were they drawn from the whole vocabulary, more of their rows of the head
would come from memory: 71 in place of 22 us for a token."""


@torch.inference_mode()
def measured_costs(
    model: SegmentedModel,
    num_rows: int,
    top_k: int | None = 256,
    proposal_rank: int | None = None,
    bridge_rank: int | None = None,
    shortlist: int | None = None,
    mlp_width: int | None = None,
) -> Costs:
    """Seconds per token of each part, in a batch; reading keys and values is left out.

    Args:
        model: cut anywhere.
        num_rows: tokens of the batch.
        top_k: K, kept ids; None: no pruning, every exit pays the whole head.
        proposal_rank: of a low-rank proposal, if there is one.
        bridge_rank: of the bridges; None: the usual one.
        shortlist: ids of a shortlist, if there is one; the cheapest proposal counts.
        mlp_width: hidden units of the exit heads' MLPs; None: they are affine.
    """
    weight = model.head_weight
    vocab, width = weight.shape
    rows = torch.randn(min(num_rows, SCORED_ROWS), width, device=weight.device).to(weight.dtype)
    always = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def per_row(run: Callable[[], object]) -> float:
        return _seconds(run, weight.device) / len(rows)

    head = per_row(lambda: summarise(model.scores(rows)))
    proposal = rescoring = head
    if top_k is not None:
        k = min(top_k, vocab)
        ids = _kept_alike(len(rows), k, vocab).to(weight.device)
        rescoring = per_row(lambda: summarise(pruned_scores(rows, weight, ids)))
        if proposal_rank is not None:
            size = min(proposal_rank, width)
            right = torch.randn(size, width, device=weight.device).to(weight.dtype)
            factors = LowRankProposal(weight[:, :size].contiguous(), right)
            proposal = min(head, per_row(lambda: prune(factors(rows), k, always)) + rescoring)
        if shortlist is not None:
            listed = ShortlistProposal(weight, torch.arange(min(shortlist, vocab)))
            proposal = min(proposal, per_row(lambda: prune(listed(rows), k, always)))
    kv_width = 2 * model.num_kv_heads * model.head_size
    rank, num_inputs = bridge_rank or usual_rank(width), 2 * width + lift_size(width)
    up = torch.randn(kv_width, rank, device=weight.device).to(weight.dtype)
    down = torch.randn(rank, num_inputs, device=weight.device).to(weight.dtype)
    write, read = PackedLinear(up), PackedLinear(down)
    inputs = torch.randn(len(rows), num_inputs, device=weight.device).to(weight.dtype)
    middle = inputs[:, :rank].contiguous()
    reading = per_row(lambda: read(inputs))  # once for all layers
    exit_head = _random_head(width, mlp_width, weight)
    return Costs(
        num_layers=model.num_layers,
        layer=layer_time(model, num_rows) / num_rows,
        head=head,
        proposal=proposal,
        rescoring=rescoring,
        exit_head=per_row(lambda: exit_head(rows)),
        bridge=per_row(lambda: write(middle)) + reading / model.num_layers,
    )


def for_job(costs: Costs, exit: ExitSpec, rows: Sequence[Row]) -> Costs:
    """The same costs as a job has them: with its prompts, and what its last layer scores.

    Args:
        costs: of generated tokens, each scored over the whole vocabulary in the end.
        exit: of the job.
        rows: of the job; what all of their prompts begin with is computed once, and costs nothing.
    """
    prompts = [row.prompt_ids for row in rows]
    computed = sum(map(len, prompts)) - len(prompts) * num_shared(prompts)
    generated = sum(len(row.generated_ids) for row in rows)
    vocab = exit.vocab
    return replace(
        costs,
        prompts=computed / generated,
        bridges_prompts=exit.prefill == "bridge",
        final_k=vocab.top_k if vocab.final_head == "pruned" else None,
    )


def _kept_alike(num_rows: int, k: int, vocab: int) -> torch.Tensor:
    """Ids [num_rows, k] int32 that tokens might keep: a batch's often are the same ones."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randperm(vocab, generator=generator)
    pool = pool[: max(k, round(DIFFERENT * num_rows * k))]
    drawn = torch.randint(len(pool), (num_rows, k), generator=generator)
    return pool[drawn].to(torch.int32)


def _random_head(width: int, mlp_width: int | None, like: torch.Tensor) -> LaidOutHead:
    """An exit head of a shape, on the device and in the type of a tensor."""

    def affine(num_out: int) -> Affine:
        return Affine(torch.randn(num_out, width), torch.randn(num_out))

    head: ExitHead
    if mlp_width is None:
        head = affine(width)
    else:
        head = MlpHead(affine(width), affine(mlp_width), torch.randn(width, mlp_width))
    return LaidOutHead(head, like.dtype, like.device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the best of a few runs."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
