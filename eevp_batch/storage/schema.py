"""The columns of the output, fixed at plan time from the input's schema, never from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from eevp_batch.errors import InputError
from eevp_batch.spec import JobSpec

IdType = Literal["string", "int64"]

_SHOWN_NAMES, _SHOWN_CHARS = 20, 80

LEADING = ("row_id", "sample_index")
TOKEN_STATS = ("exit_layers", "exit_confidences")

# Written after the kept input columns, in this order.
_GENERATED: dict[str, Any] = {
    "prompt_tokens": pa.int32(),
    "generated_tokens": pa.int32(),
    "text": pa.string(),
    "finish_reason": pa.string(),
    "token_ids": pa.list_(pa.int32()),
    "exit_layers": pa.list_(pa.uint16()),
    "exit_confidences": pa.list_(pa.float32()),
    "mean_exit_layer": pa.float32(),
    "layers_skipped_fraction": pa.float32(),
    "seed": pa.uint64(),
    "chunk_id": pa.int32(),
    "attempt": pa.int32(),
}
_PHASE: dict[str, Any] = {"phase": pa.string()}
_AUDIT: dict[str, Any] = {
    "audit_token_ids": pa.list_(pa.int32()),
    "audit_first_divergence": pa.int32(),
    "audit_distance": pa.float32(),
}


class Extras(NamedTuple):
    """Which columns a job has that others do not have.

    Attributes:
        token_stats: exit layer and confidence of every token.
        phase: how the row's chunk was run, where chunks of one job may differ.
        audit: what audited rows are beside the whole model's; null in every other row.
    """

    token_stats: bool = True
    phase: bool = False
    audit: bool = False

    @classmethod
    def of(cls, spec: JobSpec) -> Extras:
        """Those of a job."""
        return cls(
            token_stats=spec.output.token_stats,
            phase=spec.audit.stop_exits or spec.exit.mode == "learn",
            audit=spec.audit.full_depth_fraction > 0,
        )

    def columns(self) -> dict[str, Any]:
        """Type by name of what is written after the kept input columns."""
        own = {k: v for k, v in _GENERATED.items() if self.token_stats or k not in TOKEN_STATS}
        return own | (_PHASE if self.phase else {}) | (_AUDIT if self.audit else {})


def output_schema(
    input_schema: Any, spec: JobSpec, id_type: IdType, metadata: Mapping[str, str]
) -> Any:
    """The schema of a data part.

    `input_schema` holds at least the kept columns; `metadata` is `Plan.metadata`.
    """
    kept = [
        pa.field(name, plain_type(input_schema.field(name).type))
        for name in kept_columns(input_schema, spec)
    ]
    return _data_schema(kept, id_type, Extras.of(spec), metadata)


def _data_schema(
    kept: Sequence[Any], id_type: IdType, extras: Extras, metadata: Mapping[str, str]
) -> Any:
    generated = [pa.field(name, kind) for name, kind in extras.columns().items()]
    leading = [
        pa.field("row_id", _id_arrow_type(id_type), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
    ]
    return pa.schema([*leading, *kept, *generated], metadata=dict(metadata))


def error_schema(id_type: IdType, metadata: Mapping[str, str]) -> Any:
    """The schema of an errors part: one row per input row that could not be done."""
    fields = [
        pa.field("row_id", _id_arrow_type(id_type), nullable=False),
        pa.field("error_class", pa.string()),
        pa.field("message", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("chunk_id", pa.int32()),
    ]
    return pa.schema(fields, metadata=dict(metadata))


def part_differences(
    found: Any, kept: Sequence[str], id_type: IdType, extras: Extras, metadata: Mapping[str, str]
) -> list[str]:
    """What tells a published data part's schema from the planned one; empty when nothing does.

    The kept columns' types are taken from the part itself: the plan knows only their names.
    """
    own = [found.field(name) for name in kept if found.names.count(name) == 1]
    return schema_differences(found, _data_schema(own, id_type, extras, metadata))


def schema_differences(found: Any, expected: Any) -> list[str]:
    """What tells a schema from the expected one, in sentences."""
    differences = []
    if not found.equals(expected, check_metadata=False):
        text = ", ".join(f"{field.name} {field.type}" for field in expected)
        differences.append(f"the columns are not the planned ones: {text}")
    recorded = found.metadata or {}
    differences += [
        f"the metadata {key.decode()} is {recorded.get(key)!r}, expected {value!r}"
        for key, value in expected.metadata.items()
        if recorded.get(key) != value
    ]
    return differences


def kept_columns(input_schema: Any, spec: JobSpec) -> list[str]:
    """The input columns to carry along; `all` leaves out the id column, which is `row_id`."""
    if spec.input.keep_columns == "all":
        return [name for name in input_schema.names if name != spec.input.id_column]
    return list(spec.input.keep_columns)


def plain_type(kind: Any) -> Any:
    """The type without its encoding: a dictionary's values, strings whatever their offsets."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def is_text(kind: Any) -> bool:
    """Whether the values are strings or bytes, of whatever encoding."""
    plain = plain_type(kind)
    return bool(pa.types.is_string(plain) or pa.types.is_binary(plain))


def id_type_of(kind: Any) -> IdType | None:
    """How ids of an arrow type are stored; None where it cannot be an id."""
    kind = plain_type(kind)
    if pa.types.is_string(kind):
        return "string"
    return "int64" if pa.types.is_integer(kind) else None


def check_columns(file: str, schema: Any, spec: JobSpec) -> IdType:
    """Check that a file has the columns that the job names, of types that it can use.

    Returns:
        The type of its ids.

    Raises:
        InputError: a column is missing, comes twice, has the wrong type or a name of ours.
    """
    id_field = _field(file, schema, spec.input.id_column, "input.id_column")
    id_type = id_type_of(id_field.type)
    if id_type is None:
        found = f"column {id_field.name!r} of type {id_field.type}"
        raise InputError(file, "input.id_column", found, "a string or integer column")
    _check_prompt(file, schema, spec)
    ours = {*LEADING, *Extras.of(spec).columns(), *TOKEN_STATS}
    for name in kept_columns(schema, spec):
        _field(file, schema, name, "input.keep_columns")
        if name in ours:
            allowed = (
                "columns whose names the output does not use itself; rename it, or list others"
            )
            raise InputError(file, "input.keep_columns", f"column {name!r}", allowed)
    return id_type


def check_kept_types(file: str, schema: Any, first_file: str, first: Any, spec: JobSpec) -> None:
    """Check that a file's kept columns have the types that they have in the first file.

    Raises:
        InputError: a type differs, or `all` keeps other columns.
    """
    kept, expected = kept_columns(schema, spec), kept_columns(first, spec)
    if sorted(kept) != sorted(expected):
        different = sorted(set(kept) ^ set(expected))
        found = f"columns {different} in only one of this file and {first_file}"
        raise InputError(file, "input.keep_columns", found, "the same columns in every file")
    for name in kept:
        here, there = plain_type(schema.field(name).type), plain_type(first.field(name).type)
        if here != there:
            found = f"column {name!r} of type {here}"
            raise InputError(file, "input.keep_columns", found, f"{there}, as in {first_file}")


def _check_prompt(file: str, schema: Any, spec: JobSpec) -> None:
    if spec.input.messages_column is not None:
        field = _field(file, schema, spec.input.messages_column, "input.messages_column")
        if not _is_messages(field.type):
            found = f"column {field.name!r} of type {field.type}"
            allowed = "a list of structs {role: string, content: string}"
            raise InputError(file, "input.messages_column", found, allowed)
    elif spec.prompt.template is None and spec.input.prompt_column is not None:
        field = _field(file, schema, spec.input.prompt_column, "input.prompt_column")
        if not pa.types.is_string(plain_type(field.type)):
            found = f"column {field.name!r} of type {field.type}"
            raise InputError(file, "input.prompt_column", found, "a string column")


def _is_messages(kind: Any) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type):
        return False
    types = {field.name: plain_type(field.type) for field in kind.value_type}
    return all(name in types and pa.types.is_string(types[name]) for name in ("role", "content"))


def _field(file: str, schema: Any, name: str, setting: str) -> Any:
    """The only field of that name."""
    count = schema.names.count(name)
    if count == 1:
        return schema.field(name)
    if count > 1:
        raise InputError(
            file, setting, f"{count} columns named {name!r}", "one column of that name"
        )
    raise InputError(file, setting, f"no column {name!r}", f"one of {listed(schema.names)}")


def listed(names: Sequence[str]) -> str:
    """Names of columns for a message: the first of them, none longer than a line."""
    shown = [name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}..." for name in names]
    more = f" and {len(names) - _SHOWN_NAMES:,} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(shown[:_SHOWN_NAMES]) + more


def _id_arrow_type(id_type: IdType) -> Any:
    return pa.string() if id_type == "string" else pa.int64()
