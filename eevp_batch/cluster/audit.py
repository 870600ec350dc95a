"""Audited rows: some rows of a job are also generated at full depth, to see what the exits change.

Which rows those are is in their ids: the same ones in every attempt, on every replica. The second
engine works on the same layers; it waits until it has a batch, for nobody waits for one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from hashlib import blake2b

from eevp_batch.cluster.engine_loop import EngineCounters, RowEngine
from eevp_batch.records import Audit, Generation, Prompt, RowFailure, RowId
from eevp_batch.tune.text_distance import edit_loss, first_divergence
from eevp_batch.vitals import EngineVitals, vitals_of

AUDIT_BATCH = 32
"""Rows that the second engine holds, and those that it waits for before it begins."""

Result = Generation | RowFailure
_Key = tuple[object, RowId]


def is_audited(job_seed: int, row_id: RowId, fraction: float) -> bool:
    """Whether a row is in the random share that is audited.

    Args:
        job_seed: `sampling.seed`.
        row_id: integer and string ids never meet.
        fraction: share of rows, 0..1.
    """
    key = f"audit/{job_seed}/{type(row_id).__name__}/{row_id}"
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2.0**64


def compare(found: Generation, whole: Generation) -> Audit:
    """What a generation is beside the whole model's."""
    return Audit(
        token_ids=whole.token_ids,
        first_divergence=first_divergence(found.token_ids, whole.token_ids),
        distance=edit_loss(found.token_ids, whole.token_ids),
    )


class AuditedEngine:
    """An engine whose audited rows come back with their audit; of a row's samples the first.

    A row that the whole model cannot do comes back without one; nothing that happens to an audit
    makes an error row.

    Args:
        engine: generates every row.
        whole: the same model at full depth.
        job_seed: `sampling.seed`.
        fraction: share of rows, 0..1.
    """

    def __init__(self, engine: RowEngine, whole: RowEngine, job_seed: int, fraction: float) -> None:
        self._engine, self._whole = engine, whole
        self._job_seed, self._fraction = job_seed, fraction
        self._open: set[_Key] = set()
        self._found: dict[_Key, Result] = {}
        self._wholes: dict[_Key, Result] = {}
        self._num_unfinished = 0  # in the second engine
        self._is_auditing = False

    @property
    def has_room(self) -> bool:
        return self._engine.has_room

    @property
    def is_idle(self) -> bool:
        return self._engine.is_idle and self._whole.is_idle

    @property
    def max_resident(self) -> int:
        return self._engine.max_resident

    @property
    def stats(self) -> EngineCounters:
        return self._engine.stats

    @property
    def vitals(self) -> EngineVitals:
        """Of the engine that generates every row."""
        return vitals_of(self._engine)

    def add(self, prompt: Prompt) -> None:
        """Make a prompt resident; an audited one is queued a second time."""
        self._engine.add(prompt)
        if prompt.sample_index == 0 and is_audited(self._job_seed, prompt.row_id, self._fraction):
            self._whole.add(prompt)
            self._open.add((prompt.tag, prompt.row_id))
            self._num_unfinished += 1

    def step(self) -> Sequence[Result]:
        """Run one batch of one of the engines; what is finished, its audit included."""
        if self._turn_is_audit():
            done = [(self._wholes, result) for result in self._whole.step()]
            self._num_unfinished -= len(done)
        else:
            done = [(self._found, result) for result in self._engine.step()]
        finished = [back for results, result in done for back in self._settle(results, result)]
        if self.is_idle:  # what is still open are audits of rows that failed
            for kept in (self._open, self._found, self._wholes):
                kept.clear()
        return finished

    def give_up(self, tag: int) -> int:
        """Drop the prompts with this tag and their audits; how many prompts there were."""
        self._num_unfinished -= self._whole.give_up(tag)
        num_halves = sum(key[0] == tag for key in self._found)
        self._open = {key for key in self._open if key[0] != tag}
        for kept in (self._found, self._wholes):
            for key in [key for key in kept if key[0] == tag]:
                del kept[key]
        return num_halves + self._engine.give_up(tag)

    def _settle(self, results: dict[_Key, Result], result: Result) -> list[Result]:
        """Keep what waits for its other half; what goes back now."""
        key, is_whole = (result.tag, result.row_id), results is self._wholes
        is_first = isinstance(result, Generation) and result.sample_index == 0
        if not is_whole and (key not in self._open or not is_first):
            return [result]
        results[key] = result
        if key not in self._found or key not in self._wholes:
            return []
        self._open.remove(key)
        return [_audited(self._found.pop(key), self._wholes.pop(key))]

    def _turn_is_audit(self) -> bool:
        """Whole batches, one after the other; less than one only when nothing else is to do."""
        if self._whole.is_idle:
            self._is_auditing = False
        elif self._engine.is_idle or self._num_unfinished >= AUDIT_BATCH:
            self._is_auditing = True
        return self._is_auditing


def _audited(found: Result, whole: Result) -> Result:
    if isinstance(found, Generation) and isinstance(whole, Generation):
        return replace(found, audit=compare(found, whole))
    return found
