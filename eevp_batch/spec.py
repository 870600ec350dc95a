"""The job spec: what a job file may say, as strict and frozen pydantic models.

Knows names, types, ranges and defaults, and which fields exclude each other. Reading a file, lines
and `--set` are `spec_file`'s; whether a model or a column exists is found out by whoever opens it.
Every field's docstring is one line: meaning, unit, default rule.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from eevp_batch.spec_parts import (
    MAX_SEED,
    Allowed,
    AuditSpec,
    Auto,
    ClusterSpec,
    Confidence,
    Count,
    Dtype,
    EngineSpec,
    InputSpec,
    KvPolicy,
    OutputSpec,
    Proposing,
    PValueKind,
    RunSpec,
    SamplingSpec,
    Section,
    Text,
    on_off,
    refused,
)

__all__ = [
    "MAX_SEED",
    "Allowed",
    "AuditSpec",
    "Auto",
    "ClusterSpec",
    "Confidence",
    "Count",
    "DecaySpec",
    "Dtype",
    "EngineSpec",
    "ExitSpec",
    "InputSpec",
    "JobSpec",
    "KvPolicy",
    "ModelSpec",
    "OutputSpec",
    "PValueKind",
    "PromptSpec",
    "Proposing",
    "RunSpec",
    "SamplingSpec",
    "Text",
    "VocabSpec",
    "refused",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")


class PromptSpec(Section):
    """How a row becomes prompt tokens."""

    chat: Auto | bool = "auto"
    """Whether the tokenizer's chat template is applied; `auto`: if it has one."""
    system: Text | None = None
    """System message before every prompt; needs a chat template; none."""
    template: Text | None = None
    """Jinja template (sandboxed) over the row's columns, instead of prompt_column; none."""
    max_prompt_tokens: Count | None = None
    """Most tokens of a prompt; what the model's context leaves after max_new_tokens."""
    on_overlong: Literal["error", "truncate_left", "skip"] = "error"
    """A longer prompt: an error row, its last max_prompt_tokens tokens, or a row set aside."""


class ModelSpec(Section):
    """Which model runs, and how its weights are read."""

    path: Text
    """Local folder (relative to the job file) or hub id; required."""
    revision: Text | None = None
    """Commit, tag or branch of a hub id; the hub's main branch."""
    dtype: Dtype = "bfloat16"
    """Number type of weights and activations."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run; true demands a revision of 40 hex digits."""

    @model_validator(mode="after")
    def _pins_the_code_it_trusts(self) -> ModelSpec:
        if self.trust_remote_code and not _COMMIT.fullmatch(self.revision or ""):
            found = "null" if self.revision is None else repr(self.revision)
            raise refused("revision", found, "a commit of 40 hex digits with trust_remote_code")
        return self


class DecaySpec(Section):
    """A threshold that falls as a generation grows (CALM, arXiv 2207.07061, section 3.4)."""

    temperature: Annotated[float, Field(gt=0)]
    """tau in exp(-tau t / T): how fast it falls; required."""
    scaled: bool = False
    """Whether both terms are scaled by the threshold, as in the code of arXiv 2410.18952."""


class VocabSpec(Section):
    """Dynamic vocabulary pruning (arXiv 2410.18952)."""

    top_k: Count | None = 256
    """Ids kept per token at prune_layer; null turns pruning off."""
    prune_layer: Literal["first"] | Count = "first"
    """Exit layer where the vocabulary is cut; the first."""
    proposal: Proposing = "full"
    """What proposes the kept ids: the head, 8 bits of it (CPU only), a factor, or `fit`'s list."""
    rank: Count | None = None
    """Rank of the low_rank proposal, at most the model's width; 256."""
    final_head: Literal["full", "pruned"] = "full"
    """Ids that the last layer scores: the whole vocabulary, or the kept ones."""

    @model_validator(mode="after")
    def _proposes_what_is_cut(self) -> VocabSpec:
        if self.top_k is None and self.proposal != "full":
            raise refused("proposal", self.proposal, "full where exit.vocab.top_k is null")
        if self.rank is not None and self.proposal != "low_rank":
            raise refused("rank", self.rank, "null unless exit.vocab.proposal is low_rank")
        return self


class ExitSpec(Section):
    """When a token may leave the model early."""

    mode: Annotated[Literal["on", "off", "learn"], BeforeValidator(on_off)] = "on"
    """`off` runs every token through all layers; `learn` until it has fitted exits."""
    layers: Auto | Annotated[list[Count], Field(min_length=1)] = "auto"
    """Layers after which a token may leave, increasing; `auto`: those of heads, else thirds."""
    heads: Text | None = None
    """Folder that `fit` wrote, relative to the job file; none: the model's own head is read."""
    calibration: Text | None = None
    """File that `calibrate` wrote, relative to the job file; its thresholds are used; none."""
    confidence: Confidence = "margin"
    """What is compared with the threshold."""
    threshold: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = 0.9
    """A token leaves when its confidence is greater; a list: one per exit layer before the last."""
    decay: DecaySpec | None = None
    """How the threshold falls with the token's position; it does not."""
    kv: KvPolicy = "propagate"
    """What fills keys and values of the layers that a token skipped; bridge needs heads."""
    prefill: Literal["full", "bridge"] = "full"
    """`bridge`: prompts, but for their end, run to the first exit only; needs exit.kv: bridge."""
    max_waiting: Count = 8
    """With recompute or verify: once so many tokens wait, the next takes all layers, they too."""
    vocab: VocabSpec = VocabSpec()
    """Vocabulary pruning."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """With learn: share of a row's tokens that exits may change, on average."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """With learn: probability with which the rows that certify this may mislead."""
    learn_rows: Auto | Annotated[int, Field(ge=10)] = "auto"
    """With learn: rows that exits are learned from; what delta and epsilon need."""
    learn_gain: Annotated[float, Field(ge=0)] = 1.0
    """With learn: seconds that exits have to save, as predicted, for each that learning takes."""

    @model_validator(mode="before")
    @classmethod
    def _learns_what_a_learning_job_does_not_say(cls, data: Any) -> Any:
        """Bridges and a cheap proposal are fitted anyway, so that they are the default there."""
        if not isinstance(data, dict) or data.get("mode") != "learn":
            return data
        for name in ("heads", "calibration", "threshold"):
            if data.get(name) is not None:
                raise refused(name, data[name], "nothing where exit.mode is learn")
        return {"kv": "bridge", "vocab": {"proposal": "low_rank"}} | data

    @model_validator(mode="before")
    @classmethod
    def _takes_thresholds_from_one_place(cls, data: Any) -> Any:
        is_given = isinstance(data, dict) and data.get("calibration") is not None
        if is_given and "threshold" in data:
            raise refused("threshold", data["threshold"], "nothing beside exit.calibration")
        return data

    @model_validator(mode="after")
    def _layers_increase(self) -> ExitSpec:
        if self.layers != "auto" and self.layers != sorted(set(self.layers)):
            raise refused("layers", self.layers, "strictly increasing layers")
        return self

    @model_validator(mode="after")
    def _bridges_what_was_fitted(self) -> ExitSpec:
        # A job at full depth uses none of it, so that it may say what is yet to be fitted for.
        has_fitted = self.heads is not None or self.mode != "on"
        if self.vocab.proposal == "shortlist" and not has_fitted:
            allowed = "full, int8, low_rank without exit.heads"
            raise refused("vocab.proposal", '"shortlist"', allowed)
        if self.kv == "bridge" and not has_fitted:
            raise refused("kv", '"bridge"', "propagate, recompute, verify without exit.heads")
        if self.prefill == "bridge" and self.kv != "bridge":
            raise refused("prefill", '"bridge"', "full unless exit.kv is bridge")
        return self

    @model_validator(mode="after")
    def _verifies_against_the_whole_vocabulary(self) -> ExitSpec:
        is_pruned = self.vocab.top_k is not None and self.vocab.final_head == "pruned"
        if self.kv == "verify" and is_pruned:
            raise refused("vocab.final_head", '"pruned"', "full with exit.kv: verify")
        return self


class JobSpec(Section):
    """One job file."""

    version: Annotated[int, Field(ge=1, le=1), Allowed("1")] = 1
    """Version of the job file's format."""
    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9._-]+$"),
        Allowed("a string of letters, digits, `.`, `_` and `-`"),
    ] = "job"
    """Names the job in messages and ids."""
    input: InputSpec
    """Which rows are read."""
    prompt: PromptSpec = PromptSpec()
    """How a row becomes prompt tokens."""
    model: ModelSpec
    """Which model runs."""
    exit: ExitSpec = ExitSpec()
    """When a token may leave the model early."""
    sampling: SamplingSpec = SamplingSpec()
    """How a token is chosen."""
    engine: EngineSpec = EngineSpec()
    """How much one replica works on at a time."""
    cluster: ClusterSpec = ClusterSpec()
    """How many replicas run."""
    run: RunSpec = RunSpec()
    """How work is cut, retried and judged."""
    audit: AuditSpec = AuditSpec()
    """Which rows are also generated at full depth."""
    output: OutputSpec
    """Where the output goes."""

    @model_validator(mode="before")
    @classmethod
    def _template_replaces_the_prompt(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        source, prompt = data.get("input"), data.get("prompt")
        template = prompt.get("template") if isinstance(prompt, dict) else None
        if template is not None and isinstance(source, dict):
            for name in ("prompt_column", "messages_column"):
                if source.get(name) is not None:
                    raise refused(f"input.{name}", source[name], "null beside prompt.template")
            return data | {"input": source | {"prompt_column": None}}
        return data

    @model_validator(mode="after")
    def _has_one_source_of_prompts(self) -> JobSpec:
        given = [self.input.prompt_column, self.input.messages_column, self.prompt.template]
        if not any(given):
            allowed = "a column, where neither input.messages_column nor prompt.template is given"
            raise refused("input.prompt_column", "null", allowed)
        return self

    @model_validator(mode="after")
    def _audits_exits(self) -> JobSpec:
        fraction = self.audit.full_depth_fraction
        if fraction and self.exit.mode == "off":
            raise refused("audit.full_depth_fraction", fraction, "0 where exit.mode is off")
        if fraction and self.exit.kv == "verify" and self.sampling.temperature:
            # Its samples have the whole model's distribution, not its tokens: nothing to compare.
            allowed = "0 where exit.kv is verify and sampling.temperature is not 0"
            raise refused("audit.full_depth_fraction", fraction, allowed)
        has_bound = self.exit.mode == "learn" or self.exit.calibration or self.audit.delta
        if self.audit.stop_exits and not has_bound:
            raise refused("audit.delta", "null", "a share of tokens with audit.stop_exits")
        return self

    @model_validator(mode="after")
    def _learns_on_one_gpu(self) -> JobSpec:
        gpus = self.cluster.gpus_per_replica
        if self.exit.mode == "learn" and gpus != "auto" and gpus > 1:
            raise refused("cluster.gpus_per_replica", gpus, "at most 1 where exit.mode is learn")
        return self
