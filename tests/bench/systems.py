"""The systems that benchmarks compare: their settings, and those that our interpreter runs.

python -m tests.bench.systems        one system's process, spoken to as rivals/wire.py says
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import psutil

from tests.bench.rivals.wire import Outputs, Prompts, System, serve, up_to_end, versions

OFF, ON = {"mode": "off"}, {"layers": [20, 25], "threshold": 0.9}
SYSTEMS: dict[str, dict[str, Any]] = {
    "transformers-float32": {"engine": "transformers-static", "dtype": "float32", "batch": 32},
    "transformers-bfloat16": {"engine": "transformers-static", "dtype": "bfloat16", "batch": 64},
    "transformers-continuous-float32": {
        "engine": "transformers-continuous",
        "dtype": "float32",
        "batch": 64,
    },
    "transformers-continuous-bfloat16": {
        "engine": "transformers-continuous",
        "dtype": "bfloat16",
        "batch": 64,
    },
    "vllm-float32": {"engine": "vllm", "dtype": "float32", "batch": 64},
    "vllm-bfloat16": {"engine": "vllm", "dtype": "bfloat16", "batch": 64},
    # Keys and values in float32 are exact; the plugin's own choice is faster and changes rows.
    "openvino-float32": {"engine": "openvino", "dtype": "float32", "batch": 64, "kv": "f32"},
    "openvino-float32-default-kv": {"engine": "openvino", "dtype": "float32", "batch": 64},
    "openvino-bfloat16": {"engine": "openvino", "dtype": "bfloat16", "batch": 64},
    "eevp-float32-off": {"engine": "eevp", "dtype": "float32", "exit": OFF, "limits": {}},
    "eevp-bfloat16-off": {"engine": "eevp", "dtype": "bfloat16", "exit": OFF, "limits": {}},
    "eevp-bfloat16-on": {"engine": "eevp", "dtype": "bfloat16", "exit": ON, "limits": {}},
}
PAGE = 256  # tokens; what transformers' continuous batching gives out of its pool at a time
FIFTHS = 5


def setting_of(name: str) -> dict[str, Any]:
    """A system's setting; `NAME-128` is NAME with a batch of 128 sequences set by hand."""
    base, batch = name, None
    if name not in SYSTEMS and (found := re.fullmatch(r"(.+)-(\d+)", name)):
        base, batch = found[1], int(found[2])
    if base not in SYSTEMS:
        raise SystemExit(f"--systems: found {name}; allowed: {', '.join(SYSTEMS)}")
    setting = deepcopy(SYSTEMS[base])
    if batch is not None and "limits" in setting:
        setting["limits"]["max_batch"] = batch
    elif batch is not None:
        setting["batch"] = batch
    return setting


class TransformersStatic:
    """Length-sorted, left-padded batches, as a careful user of `generate` would run them."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.versions = versions("torch", "transformers")
        self._request = request
        self._model = load_transformers(request)

    def first_token(self, prompt: list[int]) -> float:
        """Generate one token."""
        self._batch([prompt], 1)
        return time.monotonic()

    def generate(self, prompts: Prompts) -> tuple[Outputs, dict[str, Any]]:
        """Generate for all prompts."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        outputs: Outputs = [[] for _ in prompts]
        for start in range(0, len(prompts), self._request["batch"]):
            rows = order[start : start + self._request["batch"]]
            found = self._batch([prompts[i] for i in rows], self._request["max_new_tokens"])
            for i, ids in zip(rows, found, strict=True):
                outputs[i] = ids
        return outputs, {}

    def _batch(self, prompts: Prompts, max_new_tokens: int) -> Outputs:
        import torch

        end_ids = self._request["end_ids"]
        width = max(map(len, prompts))
        padding = [width - len(ids) for ids in prompts]
        ids = torch.tensor([end_ids[:1] * n + p for n, p in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=end_ids[0],
            )
        return [up_to_end(row, end_ids) for row in out[:, width:].tolist()]


class TransformersContinuous:
    """`generate_batch`, transformers' continuous batching."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.versions = versions("torch", "transformers")
        self._request = request
        self._model = load_transformers(request)

    def first_token(self, prompt: list[int]) -> float:
        """Generate one token."""
        self._run([prompt], 1)
        return time.monotonic()

    def generate(self, prompts: Prompts) -> tuple[Outputs, dict[str, Any]]:
        """Generate for all prompts."""
        return self._run(prompts, self._request["max_new_tokens"]), {}

    def _run(self, prompts: Prompts, max_new_tokens: int) -> Outputs:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        end_ids, batch = self._request["end_ids"], self._request["batch"]
        pages = -(-(max(map(len, prompts)) + max_new_tokens) // PAGE)
        found = self._model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=end_ids,
                pad_token_id=end_ids[0],
            ),
            # Its own choice of pool does not fit the host's memory: it looks for a GPU's.
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE,
                num_blocks=2 * batch * pages,
                max_requests_per_batch=batch,
                max_batch_tokens=max(256, 8 * batch),
                use_cuda_graph=False,
            ),
            progress_bar=False,
        )
        if len(found) != len(prompts) or any(result.error for result in found.values()):
            raise SystemExit(f"{len(prompts) - len(found)} rows are missing, or some failed")
        return [up_to_end(result.generated_tokens, end_ids) for result in found.values()]


def load_transformers(request: dict[str, Any]) -> Any:
    """The plain model, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    return AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype).eval()


class Eevp:
    """Our engine; `exit` and `limits` of the setting are a job file's sections."""

    def __init__(self, request: dict[str, Any]) -> None:
        import torch

        from eevp_batch.engine.load import load
        from eevp_batch.spec import EngineSpec, ExitSpec, SamplingSpec

        torch.set_num_threads(request["threads"])
        self.versions = versions("eevp-batch", "torch", "transformers")
        self._engine = load(
            request["model"],
            exits=ExitSpec(**request["exit"]),
            sampling=SamplingSpec(max_new_tokens=request["max_new_tokens"]),
            limits=EngineSpec(**request["limits"]),
            dtype=request["dtype"],
        )

    def first_token(self, prompt: list[int]) -> float:
        """Step until a token is there; then finish the row."""
        from eevp_batch.records import Prompt

        engine = self._engine
        engine.add(Prompt("first", prompt))
        while not engine.stats.tokens:
            engine.step()
        there_at = time.monotonic()
        while not engine.is_idle:
            engine.step()
        return there_at

    def generate(self, prompts: Prompts) -> tuple[Outputs, dict[str, Any]]:
        """Generate for all prompts, and note how the run went by fifths of the rows."""
        from eevp_batch.records import Generation, Prompt

        outputs: Outputs = [[] for _ in prompts]
        layers = 0
        edges = {-(-len(prompts) * part // FIFTHS) for part in range(1, FIFTHS + 1)}
        marks = [self._mark(0)]
        rows = (Prompt(i, ids) for i, ids in enumerate(prompts))
        for finished, result in enumerate(self._engine.generate(rows), 1):
            if not isinstance(result, Generation):
                raise SystemExit(f"row {result.row_id} failed: {result.message}")
            outputs[int(result.row_id)] = result.token_ids
            layers += sum(result.exit_layers)
            if finished == 1 or finished in edges:
                marks.append(self._mark(finished))
        return outputs, {
            "mean_exit_layer": layers / sum(map(len, outputs)),
            "first_row_s": marks[1]["seconds"] - marks[0]["seconds"],
            "marks": marks,
        }

    def _mark(self, rows: int) -> dict[str, Any]:
        return {
            "rows": rows,
            "seconds": time.perf_counter(),
            "tokens": self._engine.stats.tokens,
            "rss_bytes": psutil.Process().memory_info().rss,
        }


ENGINES: dict[str, Callable[[dict[str, Any]], System]] = {
    "transformers-static": TransformersStatic,
    "transformers-continuous": TransformersContinuous,
    "eevp": Eevp,
}


def with_batches(names: Iterable[str], engines: set[str], batches: list[int]) -> list[str]:
    """The names, each one of `engines` followed by itself with every batch set by hand."""
    found = []
    for name in names:
        found.append(name)
        setting = setting_of(name)
        fixed = {setting.get("batch"), setting.get("limits", {}).get("max_batch")}
        if setting["engine"] in engines and name in SYSTEMS:
            found += [f"{name}-{batch}" for batch in batches if batch not in fixed]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    serve(lambda request: ENGINES[request["engine"]](request))
