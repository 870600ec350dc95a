"""A job's tokens looked at one by one, in a random part of the output: memory and time are bounded.

Whole parts are read in an order that a fixed seed draws, until enough rows or tokens have been
seen; totals over all rows are in the commit records, not here.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eevp_batch.report.summary import unreadable
from eevp_batch.report.vocabulary import CLASSES, Vocabulary
from eevp_batch.storage.store import Store

SEED = 0
MAX_ROWS = 20_000
MAX_TOKENS = 4_000_000
MAX_POSITIONS = 4096
MAX_VALUES = 12
NUM_SHOWN, NUM_LONGEST = 48, 10
MAX_AUDITED = 5_000

Counts = npt.NDArray[np.int64]

_PLAIN = (
    "row_id", "sample_index", "text", "prompt_tokens", "generated_tokens", "finish_reason",
    "mean_exit_layer", "token_ids", "exit_layers", "exit_confidences", "chunk_id", "audit_distance",
    "audit_first_divergence", "audit_token_ids",
)  # fmt: skip


@dataclass
class Group:
    """Rows that have something in common.

    Attributes:
        layer_sum: exit layers summed over the tokens.
        exits: tokens by exit layer, in the order of the layers; None without token statistics.
    """

    rows: int = 0
    tokens: int = 0
    layer_sum: float = 0.0
    exits: Counts | None = None

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean over the tokens; None without any."""
        return self.layer_sum / self.tokens if self.tokens else None


@dataclass
class RowSample:
    """What the rows that were looked at hold.

    Attributes:
        exit_layers: the columns of every count, increasing.
        rows, tokens: generations and tokens looked at.
        parts, parts_total: files read, and files there are.
        by_position: [MAX_POSITIONS + 1, layers] tokens by position from 0; the last is all above.
        by_class: [classes, layers]; None where tokens could not be told apart.
        by_column: groups by value of each kept column that has few values.
        many_valued: kept columns with more values than are shown, or of a type that is not shown.
        confidences, agrees, layers: of each token of an audited row up to its first difference:
            its confidence, whether it is full depth's, the index of its exit layer.
        audited: rows among them.
        longest: rows with the most generated tokens, longest first.
        shown: rows to look at, drawn at random.
    """

    exit_layers: list[int]
    has_exits: bool = False
    rows: int = 0
    tokens: int = 0
    parts: int = 0
    parts_total: int = 0
    by_position: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    by_class: Counts | None = None
    by_column: dict[str, dict[str, Group]] = field(default_factory=dict)
    many_valued: list[str] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    audited: int = 0
    longest: list[dict[str, Any]] = field(default_factory=list)
    shown: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types: the counts, not the rows."""
        by_class = None if self.by_class is None else self.by_class.tolist()
        used = int(np.flatnonzero(self.by_position.sum(axis=1)).max(initial=-1)) + 1
        return {
            "seed": SEED,
            "rows": self.rows,
            "tokens": self.tokens,
            "parts": self.parts,
            "parts_total": self.parts_total,
            "exit_layers": self.exit_layers,
            "exits_by_position": self.by_position[:used].tolist() if self.has_exits else None,
            "exits_by_token_class": by_class and dict(zip(CLASSES, by_class, strict=True)),
            "by_column": {
                column: {
                    value: {
                        "rows": group.rows,
                        "tokens": group.tokens,
                        "mean_exit_layer": group.mean_exit_layer,
                        "exits": None if group.exits is None else group.exits.tolist(),
                    }
                    for value, group in groups.items()
                }
                for column, groups in self.by_column.items()
            },
        }


def sample_rows(
    store: Store,
    parts: list[str],
    kept_columns: list[str],
    exit_layers: list[int],
    vocabulary: Vocabulary | None,
    max_rows: int = MAX_ROWS,
) -> RowSample:
    """Read parts until `max_rows` rows or `MAX_TOKENS` tokens have been seen.

    Args:
        store: output folder.
        parts: data parts of committed chunks.
        kept_columns: the columns to group by where they have few values.
        exit_layers: every layer after which a token left.
        vocabulary: tells token classes.
        max_rows: generations; a part is read whole.

    Raises:
        JobFailedError: a part cannot be read.
    """
    reader = _Reader(exit_layers, kept_columns, vocabulary)
    order = sorted(parts)
    random.Random(SEED).shuffle(order)
    found = reader.found
    found.parts_total = len(order)
    for rel in order:
        if found.rows >= max_rows or found.tokens >= MAX_TOKENS:
            break
        reader.take(_read(store, rel, reader.grouped_columns))
    return reader.finish()


def _read(store: Store, rel: str, grouped: list[str]) -> Any:
    """The columns of ours that are used, and those kept ones that rows may be grouped by."""
    try:
        with store.open_input(rel) as source:
            file = pq.ParquetFile(source)
            schema = file.schema_arrow
            names = [
                name
                for name in schema.names
                if name in _PLAIN or (name in grouped and _is_groupable(schema.field(name).type))
            ]
            return file.read(columns=names)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(store, rel, error) from error


class _Reader:
    """Takes tables one by one."""

    def __init__(
        self, exit_layers: list[int], kept: list[str], vocabulary: Vocabulary | None
    ) -> None:
        self.found = RowSample(exit_layers)
        self._layers = np.asarray(exit_layers)
        self._vocabulary = vocabulary
        self._random = random.Random(SEED)
        self._drawn: list[tuple[float, int, dict[str, Any]]] = []
        self._longest: list[tuple[int, int, dict[str, Any]]] = []
        self._groups: dict[str, dict[str, Group] | None] = {name: {} for name in kept}
        self._num_taken = 0
        shape = (MAX_POSITIONS + 1, len(exit_layers))
        self.found.by_position = np.zeros(shape, np.int64)

    @property
    def grouped_columns(self) -> list[str]:
        return [name for name, groups in self._groups.items() if groups is not None]

    def take(self, table: Any) -> None:
        """Count one part in."""
        found = self.found
        lengths = _ints(table["generated_tokens"])
        found.parts += 1
        found.rows += table.num_rows
        found.tokens += int(lengths.sum())
        exits = None
        if "exit_layers" in table.column_names:
            found.has_exits = True
            lengths = _ints(pc.list_value_length(table["exit_layers"]))
            exits = np.searchsorted(self._layers, _flat(table["exit_layers"]))
            self._count_exits(table, lengths, exits)
        for name in self._groups:
            self._group(table, name, lengths, exits)
        self._draw(table, lengths)
        self._audit(table)

    def finish(self) -> RowSample:
        """What was found."""
        found = self.found
        for name, groups in self._groups.items():
            if groups is None:
                found.many_valued.append(name)
            elif groups:
                found.by_column[name] = dict(sorted(groups.items()))
        found.longest = [row for _, _, row in sorted(self._longest, key=lambda e: (-e[0], e[1]))]
        found.shown = [row for _, _, row in sorted(self._drawn, key=lambda entry: -entry[0])]
        return found

    def _count_exits(self, table: Any, lengths: Counts, exits: Counts) -> None:
        found, width = self.found, len(self._layers)
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(len(exits)) - np.repeat(starts, lengths)
        found.by_position += _cross(
            np.minimum(positions, MAX_POSITIONS), exits, MAX_POSITIONS + 1, width
        )
        if self._vocabulary is not None and len(exits):
            kinds = self._vocabulary.classes(_flat(table["token_ids"]), starts)
            counts = _cross(kinds, exits, len(CLASSES), width)
            found.by_class = counts if found.by_class is None else found.by_class + counts

    def _group(self, table: Any, name: str, lengths: Counts, exits: Counts | None) -> None:
        groups = self._groups[name]
        if groups is None:
            return
        encoded = _values(table[name]) if name in table.column_names else None
        if encoded is None or len({*groups, *encoded[1]}) > MAX_VALUES:
            self._groups[name] = None
            return
        places, values = encoded
        layer_sums = lengths * np.nan_to_num(_floats(table["mean_exit_layer"]))
        size = len(values)
        rows, tokens, sums = (
            np.bincount(places, weights, minlength=size) for weights in (None, lengths, layer_sums)
        )
        table_of = None
        if exits is not None:
            table_of = _cross(np.repeat(places, lengths), exits, size, len(self._layers))
        for number, value in enumerate(values):
            group = groups.setdefault(value, Group())
            group.rows += int(rows[number])
            group.tokens += int(tokens[number])
            group.layer_sum += float(sums[number])
            if table_of is not None:
                own = table_of[number]
                group.exits = own if group.exits is None else group.exits + own

    def _draw(self, table: Any, lengths: Counts) -> None:
        """Keep the longest rows, and those whose random numbers are smallest."""
        ours = table.select([name for name in _PLAIN if name in table.column_names])
        for row in range(table.num_rows):
            self._num_taken += 1
            drawn, length = -self._random.random(), int(lengths[row])
            is_shown = len(self._drawn) < NUM_SHOWN or drawn > self._drawn[0][0]
            is_long = len(self._longest) < NUM_LONGEST or length > self._longest[0][0]
            if not is_shown and not is_long:
                continue
            (values,) = ours.slice(row, 1).to_pylist()
            if is_shown:
                _keep(self._drawn, (drawn, self._num_taken, values), NUM_SHOWN)
            if is_long:
                _keep(self._longest, (length, -self._num_taken, values), NUM_LONGEST)

    def _audit(self, table: Any) -> None:
        found = self.found
        if not {"audit_token_ids", "exit_confidences"} <= set(table.column_names):
            return
        audited = table.filter(pc.is_valid(table["audit_token_ids"]))
        names = ["exit_layers", "exit_confidences", "audit_first_divergence"]
        for row in _rows(audited.select(names)):
            if found.audited >= MAX_AUDITED:
                return
            found.audited += 1
            first, length = row["audit_first_divergence"], len(row["exit_layers"])
            seen = length if first is None else min(first + 1, length)
            found.confidences += row["exit_confidences"][:seen]
            found.layers += np.searchsorted(self._layers, row["exit_layers"][:seen]).tolist()
            found.agrees += [place != first for place in range(seen)]


def _keep(heap: list[tuple[Any, int, dict[str, Any]]], entry: Any, size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _cross(rows: Counts, columns: Counts, num_rows: int, num_columns: int) -> Counts:
    """How often each pair occurs, [num_rows, num_columns]."""
    counts = np.bincount(rows * num_columns + columns, minlength=num_rows * num_columns)
    return counts.reshape(num_rows, num_columns)


def _is_groupable(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_string(kind) or types.is_integer(kind) or types.is_boolean(kind))


def _values(column: Any) -> tuple[Counts, list[str]] | None:
    """Each row's value as an index into the values' texts; None where there are too many."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    values = ["(null)" if value is None else str(value) for value in encoded.dictionary.to_pylist()]
    if len(values) > MAX_VALUES:
        return None
    return _ints(encoded.indices), values


def _flat(column: Any) -> Counts:
    """A column of lists, one after the other."""
    return _ints(pc.list_flatten(column))


def _ints(column: Any) -> Counts:
    values: Counts = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return values


def _floats(column: Any) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = column.to_numpy().astype(np.float64)
    return values


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()
