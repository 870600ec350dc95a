"""One published file, read whole for `verify`: a part holds one chunk, or some rows of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eevp_batch.storage.inputs import UNREADABLE
from eevp_batch.storage.plan import Plan
from eevp_batch.storage.schema import error_schema, part_differences, schema_differences
from eevp_batch.storage.store import Store


@dataclass
class PartFile:
    """One published file, read whole: a part holds one chunk."""

    rel: str
    content: bytes | None = None
    table: Any = None
    problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, store: Store, rel: str, sha256: str | None) -> PartFile:
        """Read, check and decode one file; what is wrong with it goes into `problems`."""
        part = cls(rel)
        try:
            part.content = store.read(rel)
        except FileNotFoundError:
            part.problems.append(f"{rel}: the file is missing")
            return part
        except OSError as error:
            part.problems.append(f"{rel}: cannot be read: {error}")
            return part
        if hashlib.sha256(part.content).hexdigest() != sha256:
            part.problems.append(
                f"{rel}: the checksum is not the recorded one; the file was altered"
            )
        try:
            part.table = pq.read_table(pa.BufferReader(part.content))
            part.table.validate(full=True)
        except UNREADABLE as error:
            part.problems.append(f"{rel}: not a readable Parquet file: {error}")
            part.table = None
        return part

    @property
    def checksum_line(self) -> bytes:
        if self.content is None:
            return b""
        return f"{hashlib.sha256(self.content).hexdigest()}  {self.rel}\n".encode()

    @property
    def has_columns(self) -> bool:
        return self.table is not None and "row_id" in self.table.column_names

    def column(self, name: str) -> list[Any]:
        """A column's values; empty where the file is unreadable or has no such column."""
        if self.table is None or name not in self.table.column_names:
            return []
        values: list[Any] = self.table.column(name).to_pylist()
        return values

    def schema_problems(self, plan: Plan, first: Any, is_data: bool) -> Iterator[str]:
        """What tells the columns and metadata from the planned ones and from the first part's."""
        found = self.table.schema
        if is_data:
            differences = part_differences(
                found, plan.kept_columns, plan.id_type, plan.extras, plan.metadata
            )
        else:
            differences = schema_differences(found, error_schema(plan.id_type, plan.metadata))
        for difference in differences:
            yield f"{self.rel}: {difference}"
        if not found.equals(first, check_metadata=False):
            yield f"{self.rel}: the columns differ from those of the first part"
