"""Segment runs of decode-only packs, recorded once and repeated on other contents.

A pack in which each sequence brings one row is nothing but tensors of integers, so what a segment
does with it can be recorded for a *bucket* of sizes: packs are filled up to it with rows that read
and write the scratch page. Packs with prompts or several waiting tokens run as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from eevp_batch.engine.kv_store import KvStore
from eevp_batch.engine.packing import Lookup, PackedTokens
from eevp_batch.engine.paged_kernels import look_up
from eevp_batch.engine.segmented_model import SegmentedModel, SegmentOutput
from eevp_batch.engine.sequence import Origin
from eevp_batch.errors import first_line

FEWEST_ROWS = 16
MOST_GRAPHS = 128
"""Buckets that are recorded; each keeps its outputs, and the kernels it launches."""
WARM_UPS = 2
"""Runs before recording, so that libraries have their workspaces and kernels are compiled."""

_log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Turns work on tensors that stay where they are into something that repeats it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do the work, maybe several times, and return what does it again.

        Raises:
            RuntimeError: the work cannot be recorded.
        """


class Again:
    """Repeats work by doing it again: for devices without graphs."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        return work


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`; first on a stream aside, as torch's notes on CUDA graphs ask."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


class Bucket(NamedTuple):
    """What a recording is good for.

    Attributes:
        depth: 0-based segment.
        num_rows: rows of the pack.
        origins: where the tokens that are only projected have stopped, and how many they are.
        num_pages: pages of the longest sequence.
    """

    depth: int
    num_rows: int
    origins: tuple[tuple[Origin, int], ...]
    num_pages: int

    @classmethod
    def of(cls, depth: int, tokens: PackedTokens, lookup: Lookup) -> Bucket:
        """The smallest bucket that holds a pack.

        At most a third of the rows is padding once there are many. The others cost less to pad,
        and vary more: they are powers of two.
        """
        num_rows = tokens.num_rows
        origins = sorted((origin, rows.stop - rows.start) for origin, rows in tokens.origins)
        step = max(FEWEST_ROWS, _power_of_two(num_rows) // 4)
        return cls(
            depth=depth,
            num_rows=-(-num_rows // step) * step,
            origins=tuple((origin, _power_of_two(number)) for origin, number in origins),
            num_pages=_power_of_two(lookup.tables.shape[1]),
        )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


@dataclass
class _Frame:
    """The tensors of a bucket; what is not filled in are rows of the scratch page."""

    tokens: PackedTokens
    lookup: Lookup
    out: SegmentOutput | None = None
    repeat: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, bucket: Bucket, pool: KvStore) -> _Frame:
        device, looks_back = pool.device, pool.first is not None

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows = bucket.num_rows
        origins, num_projected = [], 0
        for origin, number in bucket.origins:
            origins.append((origin, slice(num_projected, num_projected + number)))
            num_projected += number
        lookup = Lookup(
            starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            lengths=zeros(rows, dtype=torch.int32) + 1,
            tables=zeros(rows, bucket.num_pages, dtype=torch.int32),
            longest=1,
        )
        tokens = PackedTokens(
            token_ids=zeros(rows) if bucket.depth == 0 else None,
            positions=zeros(rows),
            slots=zeros(rows),
            scored=[],
            scored_rows=zeros(rows),
            project_positions=zeros(num_projected),
            project_slots=zeros(num_projected),
            project_before=zeros(num_projected if looks_back else 0),
            origins=origins,
            spans=[],
            num_tokens=rows,
            lookup=lookup,
        )
        return cls(tokens, lookup)

    def fill(self, tokens: PackedTokens, lookup: Lookup) -> None:
        """Take the contents of a pack that the bucket holds."""
        for name in ("positions", "slots", "scored_rows"):
            _fill(getattr(self.tokens, name), getattr(tokens, name))
        there = dict(self.tokens.origins)
        for origin, rows in tokens.origins:
            for name in ("project_positions", "project_slots", "project_before"):
                kept: torch.Tensor = getattr(self.tokens, name)
                if len(kept):
                    _fill(kept[there[origin]], getattr(tokens, name)[rows])
        if self.tokens.token_ids is not None and tokens.token_ids is not None:
            _fill(self.tokens.token_ids, tokens.token_ids)
        num_rows, num_pages = lookup.tables.shape
        self.lookup.lengths.fill_(1)
        self.lookup.lengths[:num_rows] = lookup.lengths
        self.lookup.tables.zero_()
        self.lookup.tables[:num_rows, :num_pages] = lookup.tables


def _fill(kept: torch.Tensor, column: torch.Tensor) -> None:
    kept.zero_()
    kept[: len(column)] = column


class SegmentRunner:
    """Runs packs through the segments of a model, repeating recordings where it can.

    Args:
        model: a decoder cut at its exit layers.
        pool: where its sequences live; recordings are bound to it.
        recorder: None runs every pack as it is.
    """

    def __init__(self, model: SegmentedModel, pool: KvStore, recorder: Recorder | None) -> None:
        self._model, self._pool, self._recorder = model, pool, recorder
        self._frames: dict[Bucket, _Frame] = {}

    @property
    def buckets(self) -> list[Bucket]:
        """What is recorded."""
        return list(self._frames)

    def run(self, depth: int, tokens: PackedTokens) -> SegmentOutput:
        """See `SegmentedModel.run_segment`; the output is overwritten by the next run."""
        is_decode = len(tokens.spans[-1].positions) == 1  # sequences with more rows come last
        if self._recorder is None or not is_decode:
            return self._model.run_segment(depth, tokens, self._pool)
        lookup = look_up(tokens, self._pool)
        bucket = Bucket.of(depth, tokens, lookup)
        frame = self._frames.get(bucket) or self._recorded(bucket, self._recorder)
        if frame is None:
            return self._model.run_segment(depth, replace(tokens, lookup=lookup), self._pool)
        frame.fill(tokens, lookup)
        frame.repeat()
        return frame.out.part(slice(len(tokens.scored_rows)))  # type: ignore[union-attr]

    def _recorded(self, bucket: Bucket, recorder: Recorder) -> _Frame | None:
        """A recording, made on rows of the scratch page; None where there can be none."""
        if len(self._frames) >= MOST_GRAPHS:
            return None
        frame = _Frame.of(bucket, self._pool)

        def work() -> None:
            frame.out = self._model.run_segment(bucket.depth, frame.tokens, self._pool)

        try:
            frame.repeat = recorder.record(work)
        except RuntimeError as error:
            reason = first_line(error)
            _log.warning("segments run without graphs, for recording one failed: %s", reason)
            self._recorder = None
            return None
        self._frames[bucket] = frame
        return frame


def recorder_for(model: SegmentedModel) -> Recorder | None:
    """What records this model's segments; None where nothing does."""
    if model.device.type != "cuda" or not model.can_record:
        return None
    return CudaRecorder()
