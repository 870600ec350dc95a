"""The plan: which rows make which chunk, and the fingerprint that a resume must match."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

from eevp_batch.errors import JobFailedError, ResumeRefusedError, UsageError
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import JobSpec
from eevp_batch.storage import layout
from eevp_batch.storage.fingerprint import fingerprint_fields, fingerprint_of
from eevp_batch.storage.links import refuse_links
from eevp_batch.storage.listing import list_inputs, refuse_own_output
from eevp_batch.storage.scan import Chunk, InputFile, scan
from eevp_batch.storage.schema import Extras, IdType
from eevp_batch.storage.store import Store
from eevp_batch.storage.typed import check_type, typed

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first row runs.

    Attributes:
        fingerprint: hex sha256 of `fields`.
        fields: each setting and input fact that changes the output, by dotted name.
        id_type: how row ids are stored.
        run_id: names this output for logs and for Ray.
        model: the model as the job names it, and its revision or content hash.
    """

    format_version: int
    fingerprint: str
    fields: dict[str, Any]
    files: list[InputFile]
    chunks: list[Chunk]
    num_rows: int
    id_type: IdType
    run_id: str
    model: str
    model_revision_or_hash: str

    @property
    def id_column(self) -> str:
        return str(self.fields["input.id_column"])

    @property
    def kept_columns(self) -> list[str]:
        """The input columns carried into the output, `all` resolved."""
        return list(self.fields["input.keep_columns"])

    @property
    def num_samples(self) -> int:
        """Generations per row."""
        return int(self.fields["sampling.n"])

    @property
    def extras(self) -> Extras:
        """The columns that not every job has."""
        stops, mode = self.fields.get("audit.stop_exits", False), self.fields["exit.mode"]
        return Extras(
            token_stats=bool(self.fields["output.token_stats"]),
            phase=bool(stops) or mode == "learn",
            audit="audit.full_depth_fraction" in self.fields,
        )

    @property
    def metadata(self) -> dict[str, str]:
        """What every part carries in its footer."""
        policy = {
            name.removeprefix("exit."): value
            for name, value in self.fields.items()
            if name.startswith("exit.")
        }
        return {
            "eevp.format_version": str(self.format_version),
            "eevp.fingerprint": self.fingerprint,
            "eevp.model": self.model,
            "eevp.model_revision_or_hash": self.model_revision_or_hash,
            "eevp.exit_policy": json.dumps(policy, sort_keys=True),
        }

    def to_json(self) -> str:
        """JSON text; files and chunks are one line each, in the order of their attributes."""
        head = {name: getattr(self, name) for name in self.__slots__ if name not in _LISTS}
        lines = json.dumps(head, indent=1, sort_keys=True).removesuffix("\n}")
        for name, kind in _LISTS.items():
            rows = [[getattr(item, key) for key in kind.__slots__] for item in getattr(self, name)]
            body = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            lines += f',\n "{name}": [\n{body}\n ]'
        return lines + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """The inverse of `to_json`.

        Raises:
            JobFailedError: the text is damaged or of another format version.
        """
        try:
            data = json.loads(text)
            version = data["format_version"]
            if version == FORMAT_VERSION:
                for name, kind in _LISTS.items():
                    data[name] = [kind(*row) for row in data[name]]
                return _checked(typed(cls(**data)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise JobFailedError(f"{layout.PLAN} is damaged: {error}") from error
        raise JobFailedError(
            f"{layout.PLAN}: found format version {version}; allowed: {FORMAT_VERSION}"
        )


_LISTS: dict[str, Any] = {"files": InputFile, "chunks": Chunk}
# What is read of a plan's fields, and its type.
_READ_FIELDS: dict[str, Any] = {
    "input.id_column": str,
    "input.prompt_column": str | None,
    "input.messages_column": str | None,
    "input.keep_columns": list[str],
    "sampling.n": int,
    "exit.mode": str,
    "exit.layers": list[int],
    "output.token_stats": bool,
}


def _checked(plan: Plan) -> Plan:
    """A plan whose fields and chunks can be relied on.

    Raises:
        KeyError, TypeError, ValueError: names the first that cannot.
    """
    for name, hint in _READ_FIELDS.items():
        check_type(plan.fields[name], hint, f"fields: {name}")
    if not plan.fields["exit.layers"]:
        raise ValueError("fields: exit.layers: found none")
    for number, chunk in enumerate(plan.chunks):
        places = (chunk.chunk_id == number, 0 <= chunk.file_index < len(plan.files))
        if not all(places) or chunk.num_rows < 1 or chunk.row_start < 0:
            raise ValueError(f"chunk {number}: {chunk}")
    return plan


def make_plan(spec: JobSpec, model: ModelConfig) -> Plan:
    """Read every id of the input once, check it, and cut it into chunks.

    Memory holds the chunks and one batch of ids, never all ids.

    Raises:
        InputError: a file, column, type or id cannot be used.
        UsageError: the exit layers do not fit the model.
    """
    refuse_own_output(spec.input.path, spec.output.path)
    found = scan(list_inputs(spec.input.path), spec)
    fields = fingerprint_fields(spec, model, FORMAT_VERSION, found.files, found.kept_columns)
    return Plan(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint_of(fields),
        fields=fields,
        files=found.files,
        chunks=found.chunks,
        num_rows=sum(chunk.num_rows for chunk in found.chunks),
        id_type=found.id_type,
        run_id=new_run_id(spec.name),
        model=model.id,
        model_revision_or_hash=model.revision or model.content_hash,
    )


def new_run_id(name: str) -> str:
    """An id that no other run has.

    Args:
        name: of the job.
    """
    return f"{name}-{uuid.uuid4().hex[:12]}"


def read_plan(store: Store) -> Plan:
    """The plan of an output folder.

    Raises:
        UsageError: the folder holds none.
        JobFailedError: it is damaged.
    """
    try:
        text = store.read(layout.PLAN)
    except FileNotFoundError as error:
        raise UsageError(f"{store.text}: holds no job: {layout.PLAN} is not there") from error
    return Plan.from_json(text)


def open_plan(store: Store, fresh: Plan, resolved_yaml: str = "") -> Plan:
    """Record a fresh plan in an empty output folder, or take up the one that is there.

    `plan.json` comes last: a folder with a plan has its resolved spec too, that of the last run;
    the runs of a job may differ in what has no influence on its output.

    Raises:
        ResumeRefusedError: the folder was planned by a job with another fingerprint.
        UsageError: the folder holds results, but no plan that accounts for them, or links that
            lead out of it.
    """
    refuse_links(store)
    if not store.exists(layout.PLAN):
        for folder in (layout.DATA_DIR, layout.ERRORS_DIR, layout.COMMITS_DIR):
            if store.list(folder):
                raise UsageError(
                    f"{store.text}: found files in {folder}/ but no {layout.PLAN}; "
                    "allowed: a new folder, or the output of this job"
                )
        store.write(layout.RESOLVED_SPEC, resolved_yaml.encode())
        try:
            store.create_exclusive(layout.PLAN, fresh.to_json().encode())
            return fresh
        except FileExistsError:
            pass  # Another process planned the same folder just now; its plan is compared below.
    stored = read_plan(store)
    store.settle("")
    store.settle(layout.META_DIR)
    if stored.fingerprint != fresh.fingerprint:
        raise ResumeRefusedError(store.text, changed_fields(stored.fields, fresh.fields))
    if resolved_yaml and not _holds(store, layout.RESOLVED_SPEC, resolved_yaml.encode()):
        store.write(layout.RESOLVED_SPEC, resolved_yaml.encode())
    return stored


def _holds(store: Store, rel: str, content: bytes) -> bool:
    try:
        return store.read(rel) == content
    except FileNotFoundError:
        return False


def changed_fields(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Each field that differs: its name, the planned value (None: not there) and the value now."""
    names = [*before, *(name for name in now if name not in before)]
    return [
        (name, before.get(name), now.get(name))
        for name in names
        if before.get(name) != now.get(name) or (name in before) != (name in now)
    ]


__all__ = [
    "FORMAT_VERSION",
    "Chunk",
    "InputFile",
    "Plan",
    "changed_fields",
    "make_plan",
    "new_run_id",
    "open_plan",
    "read_plan",
]
