"""Cheap scores over the whole vocabulary, from which the ids to keep are chosen.

A proposal only says which K ids are worth scoring and how much mass lies outside them; the kept ids
are scored with the head itself. Knows the head and hidden states, nothing of exits or sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel

from eevp_batch.engine.invariance import to_multiple
from eevp_batch.engine.packed_linear import PackedLinear
from eevp_batch.engine.stored_weights import execution_device, present
from eevp_batch.errors import UsageError
from eevp_batch.spec import VocabSpec

DEFAULT_RANK = 256
_FIT_ROWS, _FIT_POSITIONS, _FIT_SEED = 16, 128, 0
_RIDGE = 1e-3
"""Share of the mean variance that every direction gets, so that unseen ones are not thrown away."""


_READ_ROWS = 8192


class Proposal(Protocol):
    """Approximates the head over C columns; those are the whole vocabulary where `ids` is None."""

    @property
    def ids(self) -> torch.Tensor | None:
        """[C] int64 id of each column, ascending; no other id is ever kept."""

    @property
    def is_exact(self) -> bool:
        """Whether its scores are the head's own."""

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Scores [B, E] -> [B, C]; a row's depend on the row alone."""


class Int8Proposal:
    """The head in 8 bits: a scale per id, and a scale per state that is found when it comes.

    Integers are summed exactly, so a row's scores do not depend on how many rows there are.
    Measured at 64 rows of the demo model on 2 cores with VNNI: 6.7 ms; the bfloat16 head 11.7 ms.

    Args:
        weight: [V, E] the head, on the CPU.

    Attributes:
        ids, is_exact: of every proposal.

    Raises:
        UsageError: not on a CPU whose 8-bit products are exact and fast.
    """

    ids = None
    is_exact = False

    def __init__(self, weight: torch.Tensor) -> None:
        if weight.device.type != "cpu" or not torch.cpu._is_vnni_supported():
            raise UsageError(
                "exit.vocab.proposal: found int8; allowed on this device: full, low_rank; int8 "
                "needs a CPU with VNNI"
            )
        rounded = torch.empty(weight.shape, dtype=torch.int8)
        scales = torch.empty(len(weight))  # [V]
        for start in range(0, len(weight), _READ_ROWS):  # in float32 all of it would be large
            rows = slice(start, start + _READ_ROWS)
            part = weight[rows].float()
            scales[rows] = part.abs().amax(1).clamp(min=1e-12) / 127
            rounded[rows] = (part / scales[rows, None]).round_()
        self._weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._scales, self._dtype = scales, weight.dtype
        self._zeros = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] in the head's type; states are rounded to 8 bits with a scale of each."""
        states = _filled_up(normed.float())
        scales = states.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127  # [B, 1]
        # Unsigned with a zero point of 128: oneDNN has no fast kernel for signed activations.
        rounded = (states / scales).round_().add_(128).to(torch.uint8)
        scores: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            rounded, 1.0, 128, self._weight, self._scales, self._zeros,
            None, 1.0, 0, self._dtype, "none", [], "",
        )  # fmt: skip
        return scores.mul_(scales.to(self._dtype))[: len(normed)]


@dataclass(frozen=True)
class LowRankProposal:
    """The head as a product of two thin matrices, W ~ left @ right.

    Attributes:
        left: [V, r].
        right: [r, E].
        ids, is_exact: of every proposal.
    """

    left: torch.Tensor
    right: torch.Tensor
    ids: ClassVar[None] = None
    is_exact: ClassVar[bool] = False

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] in the factors' type."""
        left, right = self._products
        return left(right(normed))

    @cached_property
    def _products(self) -> tuple[PackedLinear, PackedLinear]:
        return PackedLinear(self.left), PackedLinear(self.right)


@dataclass(frozen=True, slots=True)
class LowRankFit:
    """A low-rank proposal apart from the head that it approximates, W ~ (W mix) right.

    Of 49,152 ids by rank 128 only 576 by 128 numbers have to be kept for it.

    Attributes:
        right: [r, E].
        mix: [E, r]; where it `is_whole` W mix itself, [V, r].
        is_whole: as folders of formats 1 and 2 have it.
    """

    right: torch.Tensor
    mix: torch.Tensor
    is_whole: bool = False

    def of(self, weight: torch.Tensor) -> LowRankProposal:
        """The proposal for the head [V, E] that it was fitted to, in its type, where that lies."""
        left = self.mix
        if not self.is_whole:
            mix = left.to(weight.device, torch.float64)
            parts = torch.split(weight, _READ_ROWS)  # in float64 all of it would be large
            left = torch.cat([(rows.double() @ mix).to(weight.dtype) for rows in parts])
        return LowRankProposal(left.to(weight), self.right.to(weight))


class ShortlistProposal:
    """The head's own rows for the ids that a job's outputs use; all others are out of the question.

    A lexical shortlist of machine translation (Jean et al. 2015, arXiv 1412.2007, section 3.3),
    for all of a job's tokens the same, so that its rows lie together and one product scores them.

    Args:
        weight: [V, E] the head.
        ids: [C] of the shortlist, in any order; ids beyond the vocabulary are refused by torch.
    """

    is_exact = True

    def __init__(self, weight: torch.Tensor, ids: torch.Tensor) -> None:
        self.ids = torch.tensor(sorted(set(ids.tolist())), device=weight.device)
        self._product = PackedLinear(weight[self.ids])

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """Scores [B, C] in the head's type."""
        return self._product(normed)


def likeliest_ids(
    ids: torch.Tensor, probabilities: torch.Tensor, vocab_size: int, size: int
) -> torch.Tensor:
    """The ids that have most of the probability of some tokens, ascending, [min(size, V)] int64.

    Of ids that none of the tokens could have been, the lowest: a tokenizer's first are the most
    frequent ones.

    Args:
        ids: [S, K] each token's likeliest ids.
        probabilities: [S, K] theirs.
        vocab_size: V.
        size: of the shortlist.
    """
    mass = torch.zeros(vocab_size, dtype=torch.float64, device=ids.device)
    mass.index_add_(0, ids.flatten(), probabilities.flatten().double())
    best = mass.argsort(descending=True, stable=True)[:size]
    return best.sort().values


def _filled_up(states: torch.Tensor) -> torch.Tensor:
    """States [B, E] with rows of zeros up to a multiple."""
    return pad(states, (0, 0, 0, to_multiple(len(states)) - len(states)))


def fit_low_rank(weight: torch.Tensor, moment: torch.Tensor, rank: int) -> LowRankFit:
    """The factor of a rank that errs least on the states that occur.

    Minimises E ||W h - left right h||^2, which with the second moment C = E[h h^T] is
    ||(W - left right) C^{1/2}||_F^2: the truncated singular value decomposition of W C^{1/2}
    (Eckart-Young), found through its E x E Gram matrix.

    Args:
        weight: [V, E] W.
        moment: [E, E] float64 C, of the normed states that the head is given.
        rank: 1 to E.

    Returns:
        Float32, on the device of the moment.
    """
    width = len(moment)
    identity = torch.eye(width, dtype=moment.dtype, device=moment.device)
    moment = moment + _RIDGE * moment.trace() / width * identity
    variances, directions = torch.linalg.eigh(moment)
    root = (directions * variances.sqrt()) @ directions.T  # C^{1/2}
    inverse = (directions / variances.sqrt()) @ directions.T
    gram = torch.zeros_like(moment)
    for rows in torch.split(weight, _READ_ROWS):
        gram += rows.double().T @ rows.double()
    best = torch.linalg.eigh(root @ gram @ root).eigenvectors[:, -rank:]  # [E, r]
    return LowRankFit((best.T @ inverse).float(), (root @ best).float())


@torch.inference_mode()
def state_moment(model: PreTrainedModel, layer: int) -> torch.Tensor:
    """Second moment [E, E] float64 of the normed states after a layer, of the model itself.

    From a forward pass over fixed random ids, 2,048 positions: needs no text and no tokenizer and
    gives the same on every replica. Measured on the demo model at layers 6, 10 and 20 the factor
    recalls the exit layer's own best id as well as one fitted to readable text.

    Args:
        model: a `...ForCausalLM` that is not cut into segments yet, or no longer in use as such.
        layer: 1..L.
    """
    generator = torch.Generator().manual_seed(_FIT_SEED)
    shape = (_FIT_ROWS, _FIT_POSITIONS)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    attention, layers = model.config._attn_implementation, model.model.layers
    model.config._attn_implementation = "sdpa"
    model.model.layers = layers[:layer]  # so that its last states, which come normed, are those
    try:
        found = model.model(ids.to(execution_device(model)), use_cache=False)
    finally:
        model.config._attn_implementation, model.model.layers = attention, layers
    states = found.last_hidden_state.reshape(-1, model.config.hidden_size).double()
    moment: torch.Tensor = states.T @ states / len(states)
    return moment


def make_proposal(
    model: PreTrainedModel,
    vocab: VocabSpec,
    prune_layer: int | None,
    fitted: LowRankFit | None = None,
    shortlist: torch.Tensor | None = None,
) -> Proposal | None:
    """The proposal that a job asks for; None where the head itself proposes.

    Args:
        model: a `...ForCausalLM` that is not cut into segments yet.
        vocab: kind and rank.
        prune_layer: the exit layer that cuts the vocabulary; None where nothing is cut.
        fitted: what `fit` made for this model and layer, taken where a `low_rank` one is asked for.
        shortlist: ids that `fit` found, and those that are always kept.

    Raises:
        UsageError: the rank exceeds the model's width, the device cannot do it, or there is no
            shortlist where one is asked for.
    """
    if prune_layer is None or vocab.proposal == "full":
        return None
    width = model.config.hidden_size
    if vocab.proposal == "int8":
        with present(model.lm_head):
            return Int8Proposal(model.lm_head.weight.detach())
    if vocab.proposal == "shortlist":
        if shortlist is None:
            raise UsageError(
                "exit.vocab.proposal: found shortlist; allowed: full, int8, low_rank unless "
                "exit.heads names a folder of `fit` that has one"
            )
        with present(model.lm_head):
            return ShortlistProposal(model.lm_head.weight.detach(), shortlist)
    if fitted is not None and vocab.rank in (None, len(fitted.right)):
        with present(model.lm_head):
            return fitted.of(model.lm_head.weight.detach())
    rank = min(DEFAULT_RANK, width) if vocab.rank is None else vocab.rank
    if rank > width:
        raise UsageError(
            f"exit.vocab.rank: found {rank}; allowed: at most {width}, the model's width"
        )
    moment = state_moment(model, prune_layer)
    with present(model.lm_head):
        weight = model.lm_head.weight.detach()
        return fit_low_rank(weight, moment, rank).of(weight)
