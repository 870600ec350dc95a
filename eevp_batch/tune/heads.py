"""Exit heads: affine maps that make the state after a middle layer decodable.

The state that goes into the final norm at an exit is u + A u + b, u the unit state there (a tuned
lens, arXiv 2303.08112, section 3; zeros are the logit lens). A head starts from the ridge solution
for the last layer's unit state and is then fitted to the full model's distribution itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from eevp_batch.engine.fitted import Affine
from eevp_batch.engine.pruned_vocab import exact_best, top_k
from eevp_batch.engine.score_summary import summarise
from eevp_batch.engine.segmented_model import SegmentedModel

SCORED_ROWS = 64
"""States scored at a time: what the engine found fastest on a CPU."""
TAUGHT_IDS = 64
"""Ids of a token whose probabilities the heads are taught one by one; the others share a bucket."""

WHITENING_FLOOR = 0.1
"""Share of the mean variance that every direction gets before it is whitened."""

OnStep = Callable[[int, int], None]
"""Told how many steps are done, and of how many."""


@dataclass(frozen=True, slots=True)
class Taught:
    """Some tokens: the states after an exit layer, and what the last layer makes of them.

    Attributes:
        units: [S, E] float32 unit states.
        best_ids: [S] the full model's choices.
        ids: [S, K] int64 its likeliest ids.
        probabilities: [S, K] float32 theirs.
    """

    units: torch.Tensor
    best_ids: torch.Tensor
    ids: torch.Tensor
    probabilities: torch.Tensor

    def __len__(self) -> int:
        return len(self.units)

    def __add__(self, other: Taught) -> Taught:
        return Taught(
            torch.cat([self.units, other.units]),
            torch.cat([self.best_ids, other.best_ids]),
            torch.cat([self.ids, other.ids]),
            torch.cat([self.probabilities, other.probabilities]),
        )


def identity_head(width: int, device: torch.device) -> Affine:
    """The head that is the logit lens."""
    return Affine(torch.zeros(width, width, device=device), torch.zeros(width, device=device))


def head_output(model: SegmentedModel, head: Affine, units: torch.Tensor) -> torch.Tensor:
    """What the LM head is given at an exit, [S, E] float32 -> [S, E] of the model's type."""
    return model.normed((units + head(units)).to(model.layers.hidden_dtype))


@torch.no_grad()
def teach(
    model: SegmentedModel, hidden: torch.Tensor, k: int = TAUGHT_IDS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the full model makes of states [S, E] after its last layer.

    Returns:
        Its choices [S], its likeliest ids [S, k] and their probabilities [S, k] float32.
    """
    best, ids, probabilities = [], [], []
    for rows in torch.split(hidden, SCORED_ROWS):
        normed = model.normed(rows)
        scores = model.scores(normed)
        found = summarise(scores)
        values, columns = top_k(scores, min(k, scores.shape[1]), found.blocks)
        best.append(exact_best(normed, model.head_weight, scores, None, found))
        ids.append(columns)
        probabilities.append((values.float() - found.lse[:, None]).exp())
    return torch.cat(best), torch.cat(ids), torch.cat(probabilities)


@dataclass(frozen=True, slots=True)
class Choices:
    """What an exit would say; [S] of each.

    Attributes:
        ids: its choices.
        margins: top-1 minus top-2 probability, float32.
    """

    ids: torch.Tensor
    margins: torch.Tensor


@torch.no_grad()
def choices(model: SegmentedModel, head: Affine, units: torch.Tensor) -> Choices:
    """What an exit with this head says of unit states [S, E]."""
    ids, margins = [], []
    for rows in torch.split(units, SCORED_ROWS):
        normed = head_output(model, head, rows)
        scores = model.scores(normed)
        found = summarise(scores)
        ids.append(exact_best(normed, model.head_weight, scores, None, found))
        best = (found.best - found.lse).exp()
        margins.append(best - (found.second - found.lse).exp())
    return Choices(torch.cat(ids), torch.cat(margins))


def agreement(found: Choices, best_ids: torch.Tensor) -> float:
    """Share of tokens for which the exit says what the last layer says."""
    return float((found.ids == best_ids).double().mean())


def share_leaving(found: Choices, best_ids: torch.Tensor, target: float) -> float:
    """The largest share of tokens that leaves with at least `target` of *those* in agreement.

    The most confident leave first: an optimistic figure, for the threshold is chosen on the tokens
    it is judged by.
    """
    order = found.margins.argsort(descending=True, stable=True)
    agrees = (found.ids == best_ids)[order].double()
    numbers = torch.arange(1, len(agrees) + 1, device=agrees.device)
    good = (agrees.cumsum(0) / numbers >= target).nonzero()
    return float(good[-1] + 1) / len(agrees) if len(good) else 0.0


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """How a head is fitted.

    Attributes:
        epochs: most passes over the tokens.
        batch: tokens per step.
        learning_rate: of Adam, at its highest; it warms up and falls to zero by a cosine.
        patience: epochs without a better held-out agreement after which it ends.
        seed: of the order of the tokens.
    """

    epochs: int = 8
    batch: int = 256
    learning_rate: float = 3e-4
    patience: int = 2
    seed: int = 0


@dataclass(frozen=True, slots=True)
class HeadFit:
    """A head and how good it is.

    Attributes:
        head: for the engine, float32.
        start: `ridge` or `lens`, whichever agreed better before the first step.
        curve: before the first step and after each epoch: mean loss in nats, held-out agreement.
        choices: what the head says of the held-out tokens.
    """

    head: Affine
    start: str
    curve: list[dict[str, float]]
    choices: Choices


def fit_head(
    model: SegmentedModel,
    start: Affine,
    tokens: Taught,
    held_out: Taught,
    settings: HeadSettings,
    on_step: OnStep | None = None,
) -> HeadFit:
    """Fit one head to the full model's distribution by Adam.

    Args:
        model: norm and LM head; they are not changed.
        start: the ridge solution.
        tokens: to fit to.
        held_out: choose between the ridge solution and the logit lens, and when to stop.
        settings: how.
        on_step: progress.
    """
    lens = identity_head(start.weight.shape[1], start.weight.device)
    starts = {"ridge": start, "lens": lens}
    said = {name: choices(model, head, held_out.units) for name, head in starts.items()}
    name = max(said, key=lambda name: agreement(said[name], held_out.best_ids))
    head, best = starts[name], said[name]
    curve = [{"epoch": 0.0, "agreement": agreement(best, held_out.best_ids)}]
    trainer = _Trainer(model, head, tokens, settings, on_step)
    most, waited = curve[0]["agreement"], 0
    for epoch in range(1, settings.epochs + 1):
        loss = trainer.epoch()
        current = trainer.head()
        found = choices(model, current, held_out.units)
        share = agreement(found, held_out.best_ids)
        curve.append({"epoch": float(epoch), "loss": loss, "agreement": share})
        if share > most:
            head, best, most, waited = current, found, share, 0
        else:
            waited += 1
            if waited >= settings.patience:
                break
    trainer.finish()
    return HeadFit(head, name, curve, best)


class _Trainer:
    """One head in training.

    The gradient of the scores is written down, so that [B, V] is made once and never kept; only the
    map and the norm go through autograd. What is trained is a change of the head that reads
    whitened inputs, x = (u - mean) S^{-1/2}: a few directions of a state have nearly all of its
    variance, and Adam would hardly move the map along the others.
    """

    def __init__(
        self,
        model: SegmentedModel,
        head: Affine,
        tokens: Taught,
        settings: HeadSettings,
        on_step: OnStep | None,
    ) -> None:
        self._model, self._tokens, self._settings = model, tokens, settings
        self._on_step = on_step
        self._start = head
        self._mean, self._whiten = whitening(tokens.units)
        self._weight = torch.zeros_like(head.weight, dtype=torch.float32).requires_grad_()
        self._bias = torch.zeros_like(head.bias, dtype=torch.float32).requires_grad_()
        self._optimizer = torch.optim.Adam([self._weight, self._bias], betas=(0.9, 0.99))
        self._norm = model.norm_weight.float()
        self._per_epoch = -(-len(tokens) // settings.batch)
        self._total = settings.epochs * self._per_epoch
        self._done = 0
        self._generator = torch.Generator().manual_seed(settings.seed)

    def head(self) -> Affine:
        """The head as it is now."""
        weight = self._weight.detach() @ self._whiten
        bias = self._bias.detach() - weight @ self._mean
        return Affine(self._start.weight + weight, self._start.bias + bias)

    def finish(self) -> None:
        """Say that no step will follow."""
        if self._on_step is not None:
            self._on_step(self._total, self._total)

    def epoch(self) -> float:
        """One pass over the tokens; returns the mean loss in nats."""
        total = 0.0
        for rows in self._batches():
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate()
            total += self._step(rows) * len(rows)
            self._done += 1
            if self._on_step is not None:
                self._on_step(self._done, self._total)
        return total / len(self._tokens)

    def _batches(self) -> Iterator[torch.Tensor]:
        order = torch.randperm(len(self._tokens), generator=self._generator)
        return iter(torch.split(order.to(self._weight.device), self._settings.batch))

    def _learning_rate(self) -> float:
        warm = min(1.0, (self._done + 1) / max(1, self._total // 20))
        falling = 0.5 * (1 + math.cos(math.pi * self._done / self._total))
        return self._settings.learning_rate * warm * falling

    def _step(self, rows: torch.Tensor) -> float:
        units = self._tokens.units[rows]
        inputs = (units - self._mean) @ self._whiten
        change = torch.nn.functional.linear(inputs, self._weight, self._bias)
        state = units + self._start(units) + change
        scale = torch.rsqrt(state.square().mean(-1, keepdim=True) + self._model.norm_eps)
        normed = state * scale * self._norm
        loss, gradient = kl_and_gradient(
            self._model,
            normed.detach(),
            self._tokens.ids[rows],
            self._tokens.probabilities[rows],
        )
        self._optimizer.zero_grad()
        normed.backward(gradient / len(rows))  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss


def whitening(units: torch.Tensor, floor: float = WHITENING_FLOOR) -> tuple[torch.Tensor, ...]:
    """The mean [E] of unit states [S, E], and S^{-1/2} [E, E] of their covariance, symmetric."""
    rows = units.double()
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    variances, axes = torch.linalg.eigh(covariance)
    spread = variances.clamp(min=0.0) + floor * variances.mean().clamp(min=1e-30)
    return mean.float(), ((axes / spread.sqrt()) @ axes.T).float()


@torch.no_grad()
def kl_and_gradient(
    model: SegmentedModel, normed: torch.Tensor, ids: torch.Tensor, probabilities: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """KL from the full model to an exit, over the likeliest ids one by one and all others as one.

    With p the teacher's and q the exit's probabilities, P and Q what they leave to the ids outside,
    KL = sum_k p_k log(p_k / q_k) + P log(P / Q), and its gradient by the scores is q_j - p_j
    inside, q_j (1 - P / Q) outside.

    Args:
        model: the LM head.
        normed: [B, E] float32, what it is given.
        ids: [B, K].
        probabilities: [B, K] float32 p.

    Returns:
        The mean over the rows in nats, and the gradient of their *sum* by `normed` [B, E] float32.
    """
    dtype = model.head_weight.dtype
    scores = model.scores(normed.to(dtype)).float()
    log_q = scores.log_softmax(-1)
    inside = log_q.gather(1, ids)
    left_p = (1 - probabilities.sum(-1)).clamp(min=0.0)
    left_q = (1 - inside.exp().sum(-1)).clamp(min=1e-7)
    terms = torch.xlogy(probabilities, probabilities) - probabilities * inside
    loss = terms.sum(-1) + torch.xlogy(left_p, left_p) - left_p * left_q.log()
    if ids.shape[1] == scores.shape[1]:
        left_p, loss = torch.zeros_like(left_p), terms.sum(-1)
    gradient = log_q.exp_().mul_((1 - left_p / left_q)[:, None])
    gradient.scatter_(1, ids, inside.exp() - probabilities)
    return float(loss.mean()), (gradient.to(dtype) @ model.head_weight).float()


def head_figures(fit: HeadFit, held_out: Taught, num_tokens: int) -> dict[str, Any]:
    """A head's figures on held-out tokens, in plain JSON types."""
    return {
        "tokens": num_tokens,
        "held_out_tokens": len(held_out),
        "start": fit.start,
        "agreement": agreement(fit.choices, held_out.best_ids),
        "share_leaving": {
            str(target): share_leaving(fit.choices, held_out.best_ids, target)
            for target in (0.99, 0.995, 0.999)
        },
        "curve": fit.curve,
    }
