"""What crosses a boundary between rooms: plain data, no tensor, no table, no actor."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

from eevp_batch.row_counts import KeptTokens, SlowRow, slowest

RowId = str | int
Phase = Literal["full", "exits"]
"""How a chunk was run: every token through all layers, or with the job's exits."""
_REPLICA = re.compile(r"replica-(\d+)(\.\d+)?$")


def replica_number(name: str) -> int | None:
    """The place in the fleet, from 0, that a replica's name ends with; None for any other name.

    Args:
        name: such as `eevp-replica-0.2`, or what the Ray dashboard calls its actor.
    """
    found = _REPLICA.search(name)
    return None if found is None else int(found[1])


@dataclass(frozen=True, slots=True)
class Prompt:
    """One generation to make: a row's prompt, tokenised.

    Attributes:
        row_id: the value of the input's id column.
        token_ids: [T] prompt tokens, T >= 1.
        sample_index: 0..n-1, which of the row's generations this is.
        tag: opaque to the engine, handed back with the result (a replica keeps the chunk id here).
        phase: whether it may leave early; an engine that knows one phase only does not ask.
        timeout_s: seconds that it may be resident before it is given up; None: any number.
    """

    row_id: RowId
    token_ids: list[int]
    sample_index: int = 0
    tag: Any = None
    phase: Phase = "exits"
    timeout_s: float | None = None


class TokenExit(NamedTuple):
    """One emitted token: its id, the layer it left after, and the confidence it left with."""

    token_id: int
    exit_layer: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Audit:
    """What a generation is beside the one that the whole model makes of the same row.

    Attributes:
        token_ids: of the whole model.
        first_divergence: 0-based position of the first token that differs; None where none does.
        distance: edit distance by the length of the longer one, 0..1.
    """

    token_ids: list[int]
    first_divergence: int | None
    distance: float


@dataclass(frozen=True, slots=True)
class Generation:
    """One finished generation.

    Attributes:
        exits: one entry per generated token, the end token included where it was produced.
        finish_reason: `eos`, `stop` (a stop string) or `length`.
        seed: the 64-bit seed of this (job seed, row id, sample index), unsigned.
        audit: of an audited row.
        kept: whether its deep tokens were among the ids kept.
        seconds: from its first admission to memory until it was finished; None: nobody measured.
    """

    row_id: RowId
    sample_index: int
    prompt_tokens: int
    exits: list[TokenExit]
    text: str
    finish_reason: str
    seed: int
    num_layers: int
    tag: Any = None
    audit: Audit | None = None
    kept: KeptTokens = field(default_factory=KeptTokens)
    seconds: float | None = None

    @property
    def generated_tokens(self) -> int:
        return len(self.exits)

    @property
    def token_ids(self) -> list[int]:
        return [exit.token_id for exit in self.exits]

    @property
    def exit_layers(self) -> list[int]:
        return [exit.exit_layer for exit in self.exits]

    @property
    def exit_confidences(self) -> list[float]:
        return [exit.confidence for exit in self.exits]

    @property
    def mean_exit_layer(self) -> float:
        """Mean over the generated tokens, 1..num_layers."""
        return sum(exit.exit_layer for exit in self.exits) / len(self.exits)

    @property
    def layers_skipped_fraction(self) -> float:
        """Share of (generated tokens x layers) that the exits skipped, 0..1."""
        return 1.0 - self.mean_exit_layer / self.num_layers


MAX_MESSAGE_CHARS = 4000
"""Of an error row: a template may raise its whole prompt, and so for every row of a chunk."""


@dataclass(frozen=True, slots=True)
class RowFailure:
    """One row (all of its samples) that could not be done.

    Attributes:
        error_class: name of the exception class.
        attempts: how often the row was tried.
    """

    row_id: RowId
    error_class: str
    message: str
    attempts: int = 1
    tag: Any = None

    @classmethod
    def of(cls, row_id: RowId, error: Exception, tag: Any = None) -> RowFailure:
        """The failure of a row for which an error was raised."""
        return cls(row_id, type(error).__name__, _at_most(str(error), MAX_MESSAGE_CHARS), tag=tag)


def _at_most(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


DISTANCE_STEPS = 1000
"""Text distances are counted in so many steps from 0 to 1."""


@dataclass(frozen=True, slots=True)
class AuditCounts:
    """All that is kept of audited rows; they merge by `+` and do not grow with the rows.

    Attributes:
        equal: rows that came out as at full depth, by their number of tokens.
        diverged: the others, by the 0-based position of the first difference and the number of
            tokens at full depth.
        distances: all of them, by text distance in `DISTANCE_STEPS`.
    """

    equal: Counter[int] = field(default_factory=Counter)
    diverged: Counter[tuple[int, int]] = field(default_factory=Counter)
    distances: Counter[int] = field(default_factory=Counter)

    def __add__(self, other: AuditCounts) -> AuditCounts:
        return AuditCounts(
            equal=self.equal + other.equal,
            diverged=self.diverged + other.diverged,
            distances=self.distances + other.distances,
        )

    @property
    def rows(self) -> int:
        """Audited rows."""
        return self.distances.total()

    @classmethod
    def of(cls, generations: list[Generation]) -> AuditCounts:
        """Count the audited ones."""
        counts = cls()
        for generation in generations:
            audit = generation.audit
            if audit is None:
                continue
            if audit.first_divergence is None:
                counts.equal[generation.generated_tokens] += 1
            else:
                counts.diverged[audit.first_divergence, len(audit.token_ids)] += 1
            counts.distances[round(audit.distance * DISTANCE_STEPS)] += 1
        return counts

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; a pair of numbers becomes `4/50`."""
        diverged = {f"{place}/{length}": n for (place, length), n in sorted(self.diverged.items())}
        return {
            "equal": _sorted_counts(self.equal),
            "diverged": diverged,
            "distances": _sorted_counts(self.distances),
        }

    @classmethod
    def from_json(cls, data: dict[str, dict[str, int]]) -> AuditCounts:
        """The inverse of `to_json`."""
        pairs = {tuple(map(int, key.split("/"))): n for key, n in data.get("diverged", {}).items()}
        return cls(
            equal=_int_counts(data.get("equal", {})),
            diverged=Counter({(place, length): n for (place, length), n in pairs.items()}),
            distances=_int_counts(data.get("distances", {})),
        )


@dataclass(frozen=True, slots=True)
class ChunkStats:
    """Counters of one or more chunks; they merge by `+`.

    Attributes:
        rows_ok, rows_error: input rows.
        generations: output rows (rows_ok x samples).
        exit_histogram: generated tokens by exit layer.
        busy_s: seconds between the start of the chunk on its replica and its attempt file; chunks
            overlap on a replica, so this is not machine time.
        audit: of the audited rows.
        kept: of the deep tokens.
        slowest: the generations that took longest, slowest first.
    """

    rows_ok: int = 0
    rows_error: int = 0
    generations: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
    exit_histogram: Counter[int] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    error_classes: Counter[str] = field(default_factory=Counter)
    audit: AuditCounts = field(default_factory=AuditCounts)
    kept: KeptTokens = field(default_factory=KeptTokens)
    slowest: tuple[SlowRow, ...] = ()

    def __add__(self, other: ChunkStats) -> ChunkStats:
        return ChunkStats(
            rows_ok=self.rows_ok + other.rows_ok,
            rows_error=self.rows_error + other.rows_error,
            generations=self.generations + other.generations,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            generated_tokens=self.generated_tokens + other.generated_tokens,
            busy_s=self.busy_s + other.busy_s,
            exit_histogram=self.exit_histogram + other.exit_histogram,
            finish_reasons=self.finish_reasons + other.finish_reasons,
            error_classes=self.error_classes + other.error_classes,
            audit=self.audit + other.audit,
            kept=self.kept + other.kept,
            slowest=slowest((*self.slowest, *other.slowest)),
        )

    def without_errors(self, error_classes: Counter[str]) -> ChunkStats:
        """These counters without so many error rows, which something else accounts for."""
        return replace(
            self,
            rows_error=self.rows_error - error_classes.total(),
            error_classes=self.error_classes - error_classes,
        )

    @property
    def rows(self) -> int:
        return self.rows_ok + self.rows_error

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean over all generated tokens; None before the first one."""
        total = sum(self.exit_histogram.values())
        if not total:
            return None
        return sum(layer * count for layer, count in self.exit_histogram.items()) / total

    @classmethod
    def of(
        cls, generations: list[Generation], failures: list[RowFailure], busy_s: float
    ) -> ChunkStats:
        """Count one chunk's results."""
        histogram: Counter[int] = Counter()
        for generation in generations:
            histogram.update(generation.exit_layers)
        return cls(
            rows_ok=len({generation.row_id for generation in generations}),
            rows_error=len(failures),
            generations=len(generations),
            prompt_tokens=sum(g.prompt_tokens for g in generations if g.sample_index == 0),
            generated_tokens=sum(g.generated_tokens for g in generations),
            busy_s=busy_s,
            exit_histogram=histogram,
            finish_reasons=Counter(g.finish_reason for g in generations),
            error_classes=Counter(f.error_class for f in failures),
            audit=AuditCounts.of(generations),
            kept=sum((g.kept for g in generations), start=KeptTokens()),
            slowest=slowest(
                SlowRow(round(g.seconds, 3), g.row_id, g.sample_index, g.generated_tokens)
                for g in generations
                if g.seconds is not None
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; counters become objects with sorted keys. Nothing of what is empty."""
        out: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        for name in ("exit_histogram", "finish_reasons", "error_classes"):
            out[name] = _sorted_counts(out[name])
        audit, kept, slow = out.pop("audit"), out.pop("kept"), out.pop("slowest")
        if audit.rows:
            out["audit"] = audit.to_json()
        if kept.tokens:
            out["kept"] = {"tokens": kept.tokens, "kept": kept.kept}
        if slow:
            out["slowest"] = [asdict(row) for row in slow]
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ChunkStats:
        """The inverse of `to_json`."""
        stats = cls(**data)
        return replace(
            stats,
            exit_histogram=_int_counts(data["exit_histogram"]),
            finish_reasons=Counter(data["finish_reasons"]),
            error_classes=Counter(data["error_classes"]),
            audit=AuditCounts.from_json(data.get("audit", {})),
            kept=KeptTokens(**data.get("kept", {})),
            slowest=tuple(SlowRow(**row) for row in data.get("slowest", ())),
        )


def _sorted_counts(counts: Counter[Any]) -> dict[str, int]:
    return {str(key): count for key, count in sorted(counts.items())}


def _int_counts(counts: dict[str, int]) -> Counter[int]:
    return Counter({int(key): count for key, count in counts.items()})
