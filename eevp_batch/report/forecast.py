"""What a job will read, hold and compute at most, from its prompts' lengths and its model's shape.

Counts only the matrix products and attention, a multiply and an add each; norms, softmax and
sampling are small beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eevp_batch.model_config import ModelConfig, resolve_exit_layers, resolve_prune_layer
from eevp_batch.spec import JobSpec


@dataclass(frozen=True, slots=True)
class PromptCounts:
    """Lengths of the prompts that were looked at.

    Attributes:
        rows: how many rows were looked at.
        lengths: rows by number of prompt tokens, before any limit.
        failures: rows that make no prompt, by error class.
        max_tokens: longest prompt that the job allows.
    """

    rows: int
    lengths: Counter[int]
    failures: Counter[str]
    max_tokens: int

    @property
    def overlong(self) -> int:
        """Rows whose prompt is longer than allowed."""
        return sum(count for length, count in self.lengths.items() if length > self.max_tokens)

    @property
    def buckets(self) -> dict[str, int]:
        """Rows by length, in buckets whose bounds double."""
        counts: Counter[int] = Counter()
        for length, count in self.lengths.items():
            counts[(length - 1).bit_length()] += count
        powers = range(min(counts), max(counts) + 1) if counts else range(0)
        return {_bucket(power): counts[power] for power in powers}


def _bucket(power: int) -> str:
    low, high = (1 << power >> 1) + 1, 1 << power
    return str(high) if low >= high else f"{low}-{high}"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a job will cost.

    Attributes:
        rows, chunks, files: of the plan.
        counts: prompt lengths of the rows that were looked at, all of them or a sample.
        prompt_tokens: of all rows that run; scaled up from the sample where there is one.
        max_generated_tokens: if every generation runs to `sampling.max_new_tokens`.
        kv_bytes_per_token: keys and values of one token.
        kv_bytes_per_sequence: of the longest prompt that runs and its whole generation.
        flops_prompts: floating-point operations over all prompts.
        flops_least: over all generated tokens at most so many, if each leaves at the first exit.
        flops_most: the same, if each goes through all layers.
    """

    rows: int
    chunks: int
    files: int
    counts: PromptCounts
    prompt_tokens: int
    max_generated_tokens: int
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int
    flops_per_token_least: int
    flops_per_token_most: int
    flops_prompts: float
    flops_least: float
    flops_most: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        counts = self.counts
        return {
            **values,
            "counts": {
                "rows": counts.rows,
                "buckets": counts.buckets,
                "longest": max(counts.lengths, default=0),
                "failures": dict(sorted(counts.failures.items())),
                "max_tokens": counts.max_tokens,
                "overlong": counts.overlong,
            },
        }


def forecast(
    spec: JobSpec, model: ModelConfig, counts: PromptCounts, rows: int, chunks: int, files: int
) -> Forecast:
    """Work out the cost of a job.

    Args:
        spec: the job.
        model: its model.
        counts: lengths of all of its prompts, or of a sample.
        rows: planned rows.
        chunks: planned chunks.
        files: input files.
    """
    lengths = _running_lengths(spec, counts)
    scale = rows / counts.rows if counts.rows else 0.0
    tokens = sum(length * count for length, count in lengths.items())
    squares = sum(length * length * count for length, count in lengths.items())
    generations = lengths.total() * scale * spec.sampling.n
    new_tokens, longest = spec.sampling.max_new_tokens, max(lengths, default=0)
    mean_context = (tokens / lengths.total() if lengths else 0.0) + new_tokens / 2
    least, most = flops_per_token(spec, model)
    attention = 4 * model.num_heads * model.head_size  # scores and their weighted sum
    first_exit = resolve_exit_layers(spec.exit, model.num_layers)[0]
    # Every sample of a row runs its prompt; a prompt token sees half of the prompt on average.
    prompt_work = 2 * model.layer_weights * tokens + attention * squares / 2
    return Forecast(
        rows=rows,
        chunks=chunks,
        files=files,
        counts=counts,
        prompt_tokens=round(tokens * scale),
        max_generated_tokens=round(generations * new_tokens),
        kv_bytes_per_token=model.kv_bytes_per_token(spec.model.dtype),
        kv_bytes_per_sequence=model.kv_bytes_per_token(spec.model.dtype) * (longest + new_tokens),
        flops_per_token_least=least,
        flops_per_token_most=most,
        flops_prompts=scale * spec.sampling.n * model.num_layers * prompt_work,
        flops_least=generations * new_tokens * (least + first_exit * attention * mean_context),
        flops_most=generations * new_tokens * (most + model.num_layers * attention * mean_context),
    )


def flops_per_token(spec: JobSpec, model: ModelConfig) -> tuple[int, int]:
    """Operations of one generated token, attention left out: leaving first, and never leaving.

    Args:
        spec: the job.
        model: its model.
    """
    layers = resolve_exit_layers(spec.exit, model.num_layers)
    vocab = spec.exit.vocab
    prune_layer = resolve_prune_layer(spec.exit, layers)
    flops = flops_by_exit(model, layers, prune_layer, vocab.top_k, vocab.final_head == "full")
    return flops[layers[0]], flops[layers[-1]]


def flops_by_exit(
    model: ModelConfig,
    exit_layers: Sequence[int],
    prune_layer: int | None,
    top_k: int | None,
    ends_full: bool,
) -> dict[int, int]:
    """Operations of one generated token by the layer it leaves after, attention left out.

    A token is scored at every exit layer up to the one it leaves after, and still has the keys and
    values of the layers that it skipped projected.

    Args:
        model: its shape.
        exit_layers: increasing, the last layer among them.
        prune_layer: where the vocabulary is cut; None where it never is.
        top_k: ids that are kept there.
        ends_full: whether the last layer scores the whole vocabulary.
    """
    kept = min(top_k or model.vocab_size, model.vocab_size)
    project = 2 * model.num_kv_heads * model.head_size * model.hidden_size
    flops, heads = {}, 0
    for layer in exit_layers:
        is_full = prune_layer is None or layer <= prune_layer
        is_full = is_full or (ends_full and layer == exit_layers[-1])
        heads += model.hidden_size * (model.vocab_size if is_full else kept)
        skipped = model.num_layers - layer
        flops[layer] = 2 * (layer * model.layer_weights + heads + skipped * project)
    return flops


def _running_lengths(spec: JobSpec, counts: PromptCounts) -> Counter[int]:
    """Prompt lengths of the rows that run: over-long ones are cut or left out."""
    running: Counter[int] = Counter()
    for length, count in counts.lengths.items():
        if length <= counts.max_tokens:
            running[length] += count
        elif spec.prompt.on_overlong == "truncate_left":
            running[counts.max_tokens] += count
    return running
