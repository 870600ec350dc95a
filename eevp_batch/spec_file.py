"""Reading a job file: YAML with lines, `--set`, and one clear error for the first problem."""

from __future__ import annotations

import difflib
import json
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from eevp_batch.errors import SpecError
from eevp_batch.job_secrets import refuse_secrets
from eevp_batch.spec import Allowed, JobSpec
from eevp_batch.yaml_lines import Document, Loc, Origin, add_core_resolvers, dotted, read_yaml

MAX_FILE_BYTES = 1 << 20

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLAIN_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class SpecSource:
    """A job and where each of its fields was written.

    Attributes:
        spec: the job, its paths resolved.
        document: what was read, with lines.
    """

    spec: JobSpec
    document: Document

    def origin(self, field: str) -> Origin:
        """Where a field was set; for a default, where the section around it begins.

        Args:
            field: dotted name, such as `exit.threshold`.
        """
        return self.document.origin(_parse_name(field))


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> JobSpec:
    """Read a job file.

    Args:
        path: the YAML file.
        overrides: `a.b=c` each, later ones win; the value is read as YAML.

    Raises:
        SpecError: the first problem: file, line, field, what was found, what is allowed.
    """
    return read_spec(path, overrides).spec


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> SpecSource:
    """As `load_spec`, and keep the lines.

    Args:
        path: the YAML file.
        overrides: `a.b=c` each.

    Raises:
        SpecError: the first problem.
    """
    file, base = str(path), Path(os.path.abspath(path)).parent
    try:
        with open(path, "rb") as source:
            content = source.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        found = (error.strerror or str(error)).lower()
        raise SpecError(file, None, "job file", found, "a readable YAML file") from None
    if len(content) > MAX_FILE_BYTES:
        raise SpecError(file, None, "job file", "more than 1 MiB", "at most 1 MiB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(file, line, "job file", "bytes that are not UTF-8", "UTF-8") from None
    return _read(text, file, base, overrides)


def load_spec_text(
    text: str, file: str, base_dir: str | Path, overrides: Sequence[str] = ()
) -> JobSpec:
    """Read a job from text.

    Args:
        text: YAML.
        file: what errors name as its source.
        base_dir: folder that relative paths start from.
        overrides: `a.b=c` each.

    Raises:
        SpecError: the first problem.
    """
    return _read(text, file, Path(base_dir), overrides).spec


def dump_spec(spec: JobSpec) -> str:
    """The job as YAML, every field but certified thresholds; it reads back as an equal job."""
    fields = spec.model_dump(mode="json")
    if spec.exit.calibration is not None:
        del fields["exit"]["threshold"]
    return yaml.dump(fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or YAML 1.2 would not read back as the same string."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # A reader folds these line breaks into others unless they are escaped.
    style = '"' if any(c in text for c in "\r\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


add_core_resolvers(_Dumper)
_Dumper.add_representer(str, _represent_text)


def _read(text: str, file: str, base: Path, overrides: Sequence[str]) -> SpecSource:
    document = read_yaml(text, file)
    if not isinstance(document.value, dict):
        found = "an empty file" if document.value is None else show(document.value)
        line = document.origin(()).line
        raise SpecError(file, line, "document", found, describe(JobSpec))
    for override in overrides:
        _override(document, override)
    refuse_secrets(document)
    try:
        spec = JobSpec.model_validate(document.value)
    except ValidationError as error:
        raise _spec_error(error, document) from None
    return SpecSource(_resolve_paths(spec, base), document)


# --- overrides -----------------------------------------------------------------------------------


def _override(document: Document, override: str) -> None:
    """Put one `a.b=c` into the document."""
    name, equals, text = override.partition("=")
    loc: Loc = tuple(name.strip().split("."))
    if not equals or "" in loc:
        raise SpecError("--set", None, name, repr(override), "name=value, as exit.threshold=0.8")
    section = document.value
    for depth, part in enumerate(loc[:-1]):
        if section.get(part) is None:
            section[part] = {}
            _replace_origins(document, loc[: depth + 1], {loc[: depth + 1]: Origin("--set", None)})
        section = section[part]
        if not isinstance(section, dict):
            raise SpecError("--set", None, dotted(loc[: depth + 1]), show(section), "a mapping")
    value = read_yaml(text, "--set", None, at=loc)
    section[loc[-1]] = value.value
    _replace_origins(document, loc, value.origins)


def _replace_origins(document: Document, loc: Loc, origins: Mapping[Loc, Origin]) -> None:
    for known in [known for known in document.origins if known[: len(loc)] == loc]:
        del document.origins[known]
    document.origins.update(origins)


# --- paths ---------------------------------------------------------------------------------------


def _resolve_paths(spec: JobSpec, base: Path) -> JobSpec:
    """Make relative paths absolute from the job file's folder; URIs and hub ids stay."""
    path = spec.input.path
    inputs = [_resolve(p, base) for p in path] if isinstance(path, list) else _resolve(path, base)
    model = spec.model.path
    if model.startswith(("./", "../", "~")) or os.path.isdir(base / model):
        model = _resolve(model, base)
    files = {name: getattr(spec.exit, name) for name in ("heads", "calibration")}
    exit = {name: _resolve(path, base) for name, path in files.items() if path is not None}
    return spec.model_copy(
        update={
            "input": spec.input.model_copy(update={"path": inputs}),
            "model": spec.model.model_copy(update={"path": model}),
            "exit": spec.exit.model_copy(update=exit),
            "output": spec.output.model_copy(update={"path": _resolve(spec.output.path, base)}),
        }
    )


def _resolve(path: str, base: Path) -> str:
    return path if _URI.match(path) else os.path.abspath(base / os.path.expanduser(path))


# --- errors --------------------------------------------------------------------------------------


def _spec_error(error: ValidationError, document: Document) -> SpecError:
    """The problem to tell first: a misspelt key, else the first in the file, else a missing key."""
    problems = [(problem, _locate(problem, document.value)) for problem in error.errors()]
    ranks = {"extra_forbidden": 0, "missing": 2}

    def order(item: tuple[Any, Loc]) -> tuple[int, int]:
        return ranks.get(item[0]["type"], 1), document.origin(item[1]).line or 0

    _, around = min(problems, key=order)
    inside = [item for item in problems if item[1][: len(around)] == around]
    # A union complains once per member; the member that fits best complains deepest.
    problem, loc = max(inside, key=lambda item: (-order(item)[0], len(item[1])))
    origin = document.origin(loc)
    found, allowed = _found_and_allowed(problem, loc, document.value)
    return SpecError(origin.file, origin.line, dotted(loc), found, allowed)


def _locate(problem: Any, value: Any) -> Loc:
    """Where a problem is in the document: pydantic's location without its union members."""
    loc: Loc = ()
    for part in problem["loc"]:
        is_key = isinstance(value, dict) and part in value
        is_index = isinstance(value, list) and isinstance(part, int)
        if is_key or is_index:
            value = value[part]
            loc = (*loc, part)
    if problem["type"] == "missing":
        return (*loc, problem["loc"][-1])
    if problem["type"] == "refused":
        return loc + _parse_name(problem["ctx"]["field"])
    return loc


def _found_and_allowed(problem: Any, loc: Loc, value: Any) -> tuple[str, str]:
    if problem["type"] == "refused":
        return str(problem["ctx"]["found"]), str(problem["ctx"]["allowed"])
    if problem["type"] == "extra_forbidden":
        return "an unknown key", _nearest(str(loc[-1]), _model_at(loc[:-1]))
    if problem["type"] == "missing":
        return "nothing", f"{_describe_at(loc)} (required)"
    for part in loc:
        value = value[part]
    return show(value), _describe_at(loc)


def _nearest(key: str, section: type[BaseModel]) -> str:
    """The keys that a section has, and which one was probably meant."""
    keys = list(section.model_fields)
    nearest = difflib.get_close_matches(key, keys, n=1)
    if not nearest:
        nearest = [name for name in _all_names(JobSpec) if name.split(".")[-1] == key][:1]
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return ", ".join(keys) + hint


def _all_names(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = _model_in(field.annotation)
        if inner is not None:
            yield from _all_names(inner, f"{prefix}{name}.")


def _parse_name(name: str) -> Loc:
    parts = re.findall(r"[^.\[\]]+|\[\d+\]", name)
    return tuple(int(part[1:-1]) if part[0] == "[" else part for part in parts)


def show(value: Any) -> str:
    """A value as it may stand in a job file, cut at 80 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# --- what is allowed, in words -------------------------------------------------------------------


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section behind an annotation such as `DecaySpec | None`."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _model_at(loc: Loc) -> type[BaseModel]:
    model: type[BaseModel] = JobSpec
    for part in loc:
        model = _model_in(model.model_fields[str(part)].annotation) or model
    return model


def _describe_at(loc: Loc) -> str:
    """What may stand at a place of the document."""
    names = [part for part in loc if isinstance(part, str)]
    fields = _model_at(tuple(names[:-1])).model_fields
    names = names if names[-1] in fields else names[:-1]  # a mapping's keys may be free
    field = fields[names[-1]]
    if len(names) == len(loc):
        return describe(field.annotation, field.metadata)
    kinds = (field.annotation, *get_args(field.annotation))
    plain = (get_args(k)[0] if get_origin(k) is Annotated else k for k in kinds)
    kind = next(k for k in plain if get_origin(k) in (list, dict))
    return describe(get_args(kind)[-1])


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type allows, in words.

    Args:
        annotation: a type as it stands in the spec.
        metadata: what rides along with it: bounds, `Allowed`.
    """
    for note in metadata:
        if isinstance(note, Allowed):
            return note.words
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        notes = [n for note in args[1:] for n in _unpack(note)]
        return describe(args[0], notes)
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(arg) for arg in args)
    if origin is Literal:
        return ", ".join(str(arg) for arg in args)
    if origin in (list, dict):
        return f"a {'list' if origin is list else 'mapping'}, each item {describe(args[-1])}"
    if annotation is type(None):
        return "null"
    model = _model_in(annotation)
    if model is not None:
        return f"a mapping with keys {', '.join(model.model_fields)}"
    return ", ".join([_PLAIN_WORDS[annotation], *_bounds(metadata)])


def _unpack(note: Any) -> Sequence[Any]:
    return note.metadata if isinstance(note, FieldInfo) else [note]


def _bounds(metadata: Sequence[Any]) -> list[str]:
    words = []
    for note in metadata:
        for name, word in _BOUNDS.items():
            if hasattr(note, name):
                words.append(f"{word} {getattr(note, name)}")
        if getattr(note, "min_length", None):
            words.append("not empty")
    return words
