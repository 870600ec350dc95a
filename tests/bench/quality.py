"""How good outputs are: agreement with a reference, and likelihood under the float32 model."""

from __future__ import annotations

from typing import Any

from tests.bench.rivals.wire import Outputs, Prompts

ROWS_AT_ONCE = 8


def agreement(outputs: Outputs, reference: Outputs) -> tuple[int, float]:
    """Rows that are identical, and the share of tokens before a row's first difference."""
    identical = before = total = 0
    for ours, theirs in zip(outputs, reference, strict=True):
        identical += ours == theirs
        pairs = enumerate(zip(ours, theirs, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        before += first
        total += max(len(ours), len(theirs))
    return identical, before / total


class Judge:
    """Scores outputs with the plain float32 model; a pair seen before is not scored again."""

    def __init__(self, model_path: str, threads: int) -> None:
        from tests.bench.systems import load_transformers

        request = {"model": model_path, "dtype": "float32", "threads": threads}
        self._model = load_transformers(request)
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}

    def mean_log_probability(self, prompts: Prompts, outputs: Outputs) -> float:
        """Mean natural log-probability of a generated token, given all before it."""
        pairs = [(tuple(p), tuple(o)) for p, o in zip(prompts, outputs, strict=True)]
        unknown = sorted({pair for pair in pairs if pair not in self._known}, key=_length)
        for start in range(0, len(unknown), ROWS_AT_ONCE):
            self._score(unknown[start : start + ROWS_AT_ONCE])
        return sum(self._known[pair] for pair in pairs) / sum(map(len, outputs))

    def _score(self, pairs: list[Any]) -> None:
        """Note the summed log-probability of each pair's output; padding stands at the right."""
        import torch

        width = max(map(_length, pairs))
        rows = [[*prompt, *output] for prompt, output in pairs]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.inference_mode():
            states = self._model.get_decoder()(ids, attention_mask=mask).last_hidden_state
            for (prompt, output), row in zip(pairs, states, strict=True):
                before = row[len(prompt) - 1 : len(prompt) + len(output) - 1]
                scores = self._model.get_output_embeddings()(before).log_softmax(-1)
                chosen = scores.gather(1, torch.tensor(output)[:, None])
                self._known[prompt, output] = float(chosen.double().sum())


def _length(pair: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    return len(pair[0]) + len(pair[1])
