"""Rows generated with exits by the real engine: sequence risks, and the last check of all.

A replay follows the full-depth text; here an exit's choice is what the next token continues.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from eevp_batch.calibration_file import RiskKind
from eevp_batch.engine.cut import CutModel
from eevp_batch.engine.engine import Engine
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.stops import StopStrings
from eevp_batch.errors import CalibrationError, UsageError
from eevp_batch.records import Generation, Prompt
from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec
from eevp_batch.tune.bounds import clopper_pearson, share_interval
from eevp_batch.tune.replay import Thresholds
from eevp_batch.tune.states import Row
from eevp_batch.tune.text_distance import diverged_loss, edit_loss, first_divergence

ROUNDS = 2
"""How often exits on and off take turns when their speed is measured."""
DISTANCES: dict[str, Callable[[Sequence[int], Sequence[int]], float]] = {
    "edit": edit_loss,
    "diverged": diverged_loss,
}
"""Distances of two outputs' token ids that have a name here."""
Metric = Callable[[str, str], float]
"""Distance in [0, 1] of the full-depth text and the text with exits."""


class FreeRuns:
    """Generates for the prompts of rows, with exits or at full depth.

    Args:
        cut: the model, cut at the exit layers of the job.
        tokenizer: its tokenizer.
        exit: of the job; its thresholds are not used.
        sampling: of the job.
        limits: batch and memory.
        original: the model without its adapter, where it has one; full depth is what this says.
    """

    def __init__(
        self,
        cut: CutModel,
        tokenizer: Any,
        exit: ExitSpec,
        sampling: SamplingSpec,
        limits: EngineSpec,
        original: SegmentedModel | None = None,
    ) -> None:
        self._cut, self._tokenizer, self._original = cut, tokenizer, original
        self._exit, self._sampling, self._limits = exit, sampling, limits
        self._stops = StopStrings(sampling.stop, self._decode)
        self.max_new_tokens = sampling.max_new_tokens

    def engine(self, thresholds: Thresholds | None) -> Engine:
        """An engine with these thresholds; None: full depth. Its model is not copied."""
        if thresholds is not None:
            exit = self._exit.model_copy(update={"threshold": list(thresholds)})
            return self._cut.engine(self._tokenizer, exit, self._sampling, self._limits)
        off = ExitSpec(mode="off")
        return self._cut.whole(self._original).engine(
            self._tokenizer, off, self._sampling, self._limits
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text of a generation, as the engine would give it."""
        return self._stops.cut(self._decode(list(token_ids)))

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))


def generations(engine: Engine, rows: Sequence[Row]) -> list[Generation | None]:
    """What the engine makes of each row's prompt; None where it fails."""
    prompts = [Prompt(number, list(row.prompt_ids)) for number, row in enumerate(rows)]
    found: list[Generation | None] = [None] * len(rows)
    for result in engine.generate(prompts):
        if isinstance(result, Generation):
            found[int(result.row_id)] = result
    return found


class SequenceRisk:
    """Distance of a row's whole output from the full-depth one; a row that fails loses all.

    Args:
        runs: of the job.
        metric: a name in `DISTANCES`, or `module:function` of two texts.

    Raises:
        UsageError: there is no such distance.
    """

    kind: RiskKind = "sequence"

    def __init__(self, runs: FreeRuns, metric: str) -> None:
        self._runs = runs
        self.metric: str | None = metric
        self._function = None if metric in DISTANCES else load_metric(metric)

    def losses(self, rows: Sequence[Row], grid: Sequence[Thresholds]) -> list[list[float]]:
        """See `calibrate.Risk`."""
        out = []
        for thresholds in grid:
            found = generations(self._runs.engine(thresholds), rows)
            out.append([self._loss(row, one) for row, one in zip(rows, found, strict=True)])
        return out

    def _loss(self, row: Row, found: Generation | None) -> float:
        if found is None:
            return 1.0
        if self._function is None:
            return DISTANCES[str(self.metric)](found.token_ids, row.generated_ids)
        full = self._runs.text_of(row.generated_ids)
        loss = float(self._function(full, found.text))
        if not 0 <= loss <= 1:
            raise CalibrationError(f"metric {self.metric}: found {loss}; allowed: 0 to 1")
        return loss


def load_metric(name: str) -> Metric:
    """A user's function `(full_text, exit_text) -> [0, 1]`, by `module:function`.

    Raises:
        UsageError: it cannot be imported.
    """
    module, colon, function = name.partition(":")
    allowed = f"{', '.join(DISTANCES)}, or module:function"
    if not (module and colon and function):
        raise UsageError(f"metric: found {name!r}; allowed: {allowed}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"metric: found {name!r}: {error}; allowed: {allowed}") from error
    if not callable(found):
        raise UsageError(f"metric: found {name!r}, no function; allowed: {allowed}")
    metric: Metric = found
    return metric


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What exits did to rows that nothing was chosen by; intervals hold with 95 % each.

    Attributes:
        rows: rows, those that failed left out.
        tokens: generated with exits.
        identical: share of rows with the same tokens as at full depth.
        before_divergence: share of the full-depth tokens before the first difference of their row.
        edit_distance: mean over rows, by the length of the longer output.
        exit_share: of the tokens, who left before the last layer.
        mean_layer: mean number of layers of a token.
        tokens_per_s_off: generated tokens per second without exits, prompts included.
        tokens_per_s_on: with exits, in turns with those without.
    """

    rows: int
    tokens: int
    identical: float
    identical_interval: tuple[float, float]
    before_divergence: float
    before_divergence_interval: tuple[float, float]
    edit_distance: float
    edit_distance_interval: tuple[float, float]
    exit_share: float
    mean_layer: float
    tokens_per_s_off: float
    tokens_per_s_on: float

    @property
    def speed(self) -> float:
        """Measured, as a multiple of exits off."""
        return self.tokens_per_s_on / self.tokens_per_s_off


def confirm(
    runs: FreeRuns, rows: Sequence[Row], thresholds: Thresholds, rounds: int = ROUNDS
) -> Confirmation:
    """Generate with exits for rows whose full-depth output is known, and compare.

    Args:
        runs: of the job.
        rows: one or more, used for nothing before.
        thresholds: what was certified.
        rounds: how often exits on and off take turns.

    Raises:
        CalibrationError: every row failed.
    """
    off, on = runs.engine(None), runs.engine(thresholds)
    rates: dict[bool, list[float]] = {False: [], True: []}
    found: list[Generation | None] = []
    for _ in range(rounds):
        for has_exits, engine in ((False, off), (True, on)):
            started = time.perf_counter()
            some = generations(engine, rows)
            seconds = time.perf_counter() - started
            tokens = sum(one.generated_tokens for one in some if one is not None)
            rates[has_exits].append(tokens / seconds)
            found = some if has_exits else found
    pairs = [(row, one) for row, one in zip(rows, found, strict=True) if one is not None]
    if not pairs:
        raise CalibrationError("confirmation: found no row that could be generated with exits")
    return _compared(pairs, rates, runs.max_new_tokens)


def _compared(
    pairs: Sequence[tuple[Row, Generation]], rates: dict[bool, list[float]], max_new_tokens: int
) -> Confirmation:
    count = len(pairs)
    wholes = [float(len(row.generated_ids)) for row, _ in pairs]
    same = []
    for row, one in pairs:
        place = first_divergence(one.token_ids, row.generated_ids)
        same.append(float(len(row.generated_ids) if place is None else place))
    edits = [edit_loss(one.token_ids, row.generated_ids) for row, one in pairs]
    equal = sum(one.token_ids == list(row.generated_ids) for row, one in pairs)
    layers = [exit.exit_layer for _, one in pairs for exit in one.exits]
    last = pairs[0][1].num_layers
    return Confirmation(
        rows=count,
        tokens=len(layers),
        identical=equal / count,
        identical_interval=clopper_pearson(equal, count),
        before_divergence=sum(same) / sum(wholes),
        before_divergence_interval=share_interval(same, wholes, largest=max_new_tokens),
        edit_distance=sum(edits) / count,
        edit_distance_interval=share_interval(edits, [1.0] * count, largest=1.0),
        exit_share=sum(layer < last for layer in layers) / len(layers),
        mean_layer=sum(layers) / len(layers),
        tokens_per_s_off=sum(rates[False]) / len(rates[False]),
        tokens_per_s_on=sum(rates[True]) / len(rates[True]),
    )
