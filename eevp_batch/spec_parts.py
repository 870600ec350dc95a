"""The parts of a job file that know nothing of each other, and what every part is made of."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Auto = Literal["auto"]
Confidence = Literal["margin", "max_prob", "entropy", "hidden_cosine"]
Dtype = Literal["bfloat16", "float32", "float16"]
Proposing = Literal["full", "int8", "low_rank", "shortlist"]
KvPolicy = Literal["propagate", "bridge", "recompute", "verify"]
PValueKind = Literal["hoeffding_bentkus", "betting"]
MAX_SEED = 2**63 - 1

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB|TiB)")
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Allowed:
    """What may stand in a field, in words; rides in its annotation where the type cannot say it."""

    def __init__(self, words: str) -> None:
        self.words = words


def refused(field: str, found: Any, allowed: str) -> PydanticCustomError:
    """The error of a check that a type cannot express.

    Args:
        field: dotted name relative to the model that checks.
        found: what stands there.
        allowed: what may stand there.
    """
    context = {"field": field, "found": found, "allowed": allowed}
    return PydanticCustomError("refused", "{field}: found {found}; allowed: {allowed}", context)


def on_off(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` or `off` as a boolean; take it as what was written."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def _size(value: Any) -> Any:
    """Bytes of a size such as `2GiB`; anything else is left to the type."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    return int(float(match[1]) * _UNITS[match[2]]) if match else value


class Section(BaseModel):
    """Strict and frozen; a field's docstring is its description."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class InputSpec(Section):
    """Which rows a job reads."""

    path: Text | Annotated[list[Text], Field(min_length=1)]
    """Parquet file, folder, glob, list of them, or URI; relative to the job file; required."""
    id_column: Text = "id"
    """Column of unique strings or integers that name the rows."""
    prompt_column: Text | None = "prompt"
    """Column of prompt strings; `prompt`, null where messages_column or template is given."""
    messages_column: Text | None = None
    """Column of lists of {role, content}, instead of prompt_column; none."""
    keep_columns: list[Text] | Literal["all"] = []
    """Input columns carried into the output, or `all`; none."""
    limit: Count | None = None
    """Number of rows to read, counted over all files in order; all of them."""

    @model_validator(mode="before")
    @classmethod
    def _messages_replace_the_prompt(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("messages_column") is not None:
            if data.get("prompt_column") is not None:
                allowed = "null beside input.messages_column"
                raise refused("prompt_column", data["prompt_column"], allowed)
            return data | {"prompt_column": None}
        return data

    @model_validator(mode="after")
    def _keeps_each_column_once(self) -> InputSpec:
        for position, name in enumerate(self.keep_columns):
            if name in self.keep_columns[:position] and self.keep_columns != "all":
                raise refused(f"keep_columns[{position}]", repr(name), "each column once")
        return self


class SamplingSpec(Section):
    """How a token is chosen and when a generation ends."""

    n: Count = 1
    """Generations per row."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Divides the scores before sampling; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Samples among the likeliest tokens that together have this probability."""
    top_k: Count | None = None
    """Samples among so many likeliest tokens; all."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides positive and multiplies negative scores of tokens already in the text; 1: none."""
    max_new_tokens: Count = 256
    """Most tokens of a generation."""
    stop: list[Text] = []
    """Strings that end a generation and are left out of its text; none."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Together with row id and sample index it fixes every random choice."""


class EngineSpec(Section):
    """How much one replica works on at a time; changes speed and memory, never the output."""

    max_batch: Auto | Count = "auto"
    """Sequences per forward pass; what suits the device."""
    max_resident: Auto | Count = "auto"
    """Sequences held in memory; a batch, and a full one for each depth but the first."""
    kv_memory: Annotated[
        Auto | Count, BeforeValidator(_size), Allowed("auto, or a size such as 2GiB or 512MiB")
    ] = "auto"
    """Memory for keys and values, in bytes or as `2GiB`; a share of what is free."""
    prefix_sharing: bool = True
    """Whether a beginning that many prompts share is computed once."""


class ReplicaRange(Section):
    """From how few to how many replicas a job runs on."""

    min: Count = 1
    """Fewest that have to find a place within cluster.placement_timeout_s."""
    max: Count
    """Most that it asks Ray for, as long as there is work for them; required."""

    @model_validator(mode="after")
    def _is_a_range(self) -> ReplicaRange:
        if self.max < self.min:
            raise refused("max", self.max, f"at least {self.min}, which is cluster.replicas.min")
        return self


class EntryPointSpec(Section):
    """What the process that coordinates a job asks of the cluster that it is submitted to."""

    cpus: Annotated[float, Field(ge=0)] = 0.0
    """CPU cores; none, which places it on the head node."""
    memory: Annotated[
        Count | None, BeforeValidator(_size), Allowed("null, or a size such as 2GiB or 512MiB")
    ] = None
    """Memory, in bytes or as `2GiB`; none asked for."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Custom resources of Ray by name, such as those of nodes that are not taken away; none."""


class ClusterSpec(Section):
    """How many replicas run, and on what; changes speed, never the output."""

    address: Annotated[
        Text | None,
        Field(pattern=r"^(auto|(ray|https?)://.+|[^/]+:\d+)$"),
        Allowed("auto, ray://host:port, http(s)://host:port, host:port, or null"),
    ] = None
    """Ray cluster: `auto`, ray://, http(s):// to submit to, host:port to join; one of its own."""
    shared_paths: list[Annotated[str, Field(pattern="^/"), Allowed("an absolute path")]] = []
    """Folders that all nodes see under the same path, such as NFS; none, with auto: all."""
    env: list[Text] = []
    """Environment variables, by name, that a submitted job takes along from `submit`; none."""
    pip: list[Text] = []
    """Packages that Ray installs on the nodes for a submitted job; none: they are there."""
    entry_point: EntryPointSpec = EntryPointSpec()
    """What the coordinating process of a submitted job asks of the cluster."""
    replicas: Count | ReplicaRange = 1
    """Copies of the model that work side by side; a number n is {min: 1, max: n}."""
    gpus_per_replica: Auto | Annotated[float, Field(ge=0)] = "auto"
    """GPUs of one replica: 0, a share of one, or several, which share out its layers; 1 if any."""
    cpus_per_replica: Auto | Annotated[float, Field(gt=0)] = "auto"
    """CPU cores of one replica; an equal share of the machine's."""
    placement_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds that fewer replicas than the job needs may be without a place before it fails."""

    @model_validator(mode="after")
    def _shares_no_two_gpus(self) -> ClusterSpec:
        gpus = self.gpus_per_replica
        if gpus != "auto" and gpus > 1 and gpus != int(gpus):
            allowed = "auto, 0, a share of one GPU such as 0.5, or a whole number"
            raise refused("gpus_per_replica", gpus, allowed)
        return self

    @property
    def min_replicas(self) -> int:
        """Replicas that the job cannot do without."""
        return 1 if isinstance(self.replicas, int) else self.replicas.min

    @property
    def max_replicas(self) -> int:
        """Most replicas that the job has at a time."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max


class RunSpec(Section):
    """How work is cut, retried and judged."""

    chunk_rows: Count = 256
    """Rows that are leased, retried and committed together."""
    max_attempts: Count = 3
    """Deaths of replicas that hold one row alone until it becomes an error row; at least two."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of error rows above which the job ends with exit code 3."""
    max_errors: Annotated[int, Field(ge=0)] | None = None
    """Number of error rows above which the job ends with exit code 3; none."""
    row_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a generation may be in the engine before its row becomes an error row; none."""
    no_progress_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds without a commit or a token after which the job fails; a step may take a third."""


class AuditSpec(Section):
    """Which rows are also generated at full depth, to see what the exits change."""

    full_depth_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rows, chosen by sampling.seed and row id, that all layers generate too; none."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of differing tokens above which it warns; what was certified, else never."""
    stop_exits: bool = False
    """Whether chunks that start after the warning run at full depth."""

    @model_validator(mode="after")
    def _stops_on_what_it_sees(self) -> AuditSpec:
        if self.stop_exits and not self.full_depth_fraction:
            raise refused("stop_exits", "true", "false where audit.full_depth_fraction is 0")
        return self


class OutputSpec(Section):
    """Where the output goes."""

    path: Text
    """Folder or URI, relative to the job file; required."""
    compression: Literal["zstd", "snappy", "gzip", "none"] = "zstd"
    """Parquet compression."""
    token_stats: bool = True
    """Whether exit layer and confidence of every token are written."""
