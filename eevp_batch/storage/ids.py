"""Row ids: their canonical form, the digest of a set of them, and proof that none comes twice.

Uniqueness is proved over 8-byte keys, one per row. Keys are collected in memory up to a bound,
beyond that in temporary files partitioned by their leading bits, and each partition is sorted
alone: 10^9 rows cost 8 GB of temporary disk and a few dozen MB of memory. Integer ids map to keys
one to one. String ids are hashed, so equal keys are only suspects; the caller compares the ids
themselves.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from eevp_batch.records import RowId

Keys = npt.NDArray[np.uint64]

# 2^64 / golden ratio, odd: multiplying is a bijection that spreads small integers over all
# partitions.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_PARTITION_BITS = 8
_SUSPECTS_PER_PASS = 1 << 16


def canonical(row_id: RowId) -> bytes:
    """The bytes that stand for an id in digests: its UTF-8 text, or its decimal digits."""
    return str(row_id).encode()


def ids_digest(ids: Iterable[RowId]) -> str:
    """Hex sha256 over the ids, each with its length, independent of their order; repeats count."""
    digest = hashlib.sha256()
    for text in sorted(canonical(row_id) for row_id in ids):
        digest.update(len(text).to_bytes(8, "big"))
        digest.update(text)
    return digest.hexdigest()


def id_keys(ids: Sequence[RowId]) -> Keys:
    """One 8-byte key per id [rows]; equal ids have equal keys, unequal integers unequal ones."""
    if ids and isinstance(ids[0], int):
        return np.array(ids, dtype=np.int64).view(np.uint64) * _SPREAD
    hashes = b"".join(hashlib.blake2b(canonical(row_id), digest_size=8).digest() for row_id in ids)
    return np.frombuffer(hashes, dtype=np.uint64)


class RepeatedKeys:
    """Collects keys and tells which came more than once.

    Args:
        max_in_memory: keys held before they are moved to temporary files (8 bytes each).
    """

    def __init__(self, max_in_memory: int = 1 << 22) -> None:
        self._max_in_memory = max_in_memory
        self._held: list[Keys] = []
        self._num_held = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RepeatedKeys:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, keys: Keys) -> None:
        """Take the keys of some more rows."""
        self._held.append(keys)
        self._num_held += len(keys)
        if self._num_held > self._max_in_memory:
            self._spill()

    def repeated(self) -> Iterator[set[int]]:
        """Every key that came more than once, in sets of bounded size."""
        for keys in self._partitions():
            ordered = np.sort(keys)
            twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
            for start in range(0, len(twice), _SUSPECTS_PER_PASS):
                yield set(twice[start : start + _SUSPECTS_PER_PASS].tolist())

    def _partitions(self) -> Iterator[Keys]:
        if self._folder is None:
            if self._held:
                yield np.concatenate(self._held)
            return
        self._spill()
        for path in sorted(Path(self._folder.name).iterdir()):
            yield np.fromfile(path, dtype=np.uint64)

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="eevp-ids-")
        if not self._held:
            return
        keys = np.sort(np.concatenate(self._held))
        leading = keys >> np.uint64(64 - _PARTITION_BITS)
        starts = np.searchsorted(leading, np.arange(2**_PARTITION_BITS + 1, dtype=np.uint64))
        for partition, (start, stop) in enumerate(itertools.pairwise(starts)):
            if start < stop:
                with open(Path(self._folder.name) / f"{partition:03d}", "ab") as file:
                    file.write(keys[start:stop].tobytes())
        self._held, self._num_held = [], 0
