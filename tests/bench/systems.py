"""The systems of the throughput benchmark; each returns a function that runs the first rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_NEW_TOKENS = 128
SYSTEMS = {
    "transformers-float32": {"engine": "transformers", "dtype": "float32", "batch": 32},
    "transformers-bfloat16": {"engine": "transformers", "dtype": "bfloat16", "batch": 64},
    "eevp-float32-off": {"engine": "eevp", "dtype": "float32", "batch": 64},
    "eevp-bfloat16-off": {"engine": "eevp", "dtype": "bfloat16", "batch": 64},
    "eevp-bfloat16-on": {
        "engine": "eevp",
        "dtype": "bfloat16",
        "batch": 64,
        "layers": [20, 25],
        "threshold": 0.9,
    },
}  # fmt: skip
Outputs = list[list[int]]


def transformers_static(model_path: str, prompts: list[list[int]], setting: dict[str, Any]) -> Any:
    """Length-sorted, left-padded batches, as a careful user of `generate` would run them."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, setting["dtype"])
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    end = model.generation_config.eos_token_id

    @torch.inference_mode()
    def generate(count: int) -> tuple[Outputs, dict[str, Any]]:
        order = sorted(range(count), key=lambda i: len(prompts[i]))
        outputs: Outputs = [[] for _ in range(count)]
        for start in range(0, count, setting["batch"]):
            rows = order[start : start + setting["batch"]]
            width = max(len(prompts[i]) for i in rows)
            padding = [width - len(prompts[i]) for i in rows]
            ids = torch.tensor([[end] * n + prompts[i] for n, i in zip(padding, rows, strict=True)])
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in padding])
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=end,
            )
            for i, row in zip(rows, out[:, width:].tolist(), strict=True):
                outputs[i] = row[: row.index(end) + 1] if end in row else row
        return outputs, {}

    return generate


def eevp(model_path: str, prompts: list[list[int]], setting: dict[str, Any]) -> Any:
    """Our engine; `layers` turns exits on."""
    from eevp_batch.engine.load import build_engine, load_weights
    from eevp_batch.engine.tokenizer import load_tokenizer
    from eevp_batch.model_config import read_model_config
    from eevp_batch.records import Generation, Prompt
    from eevp_batch.spec import EngineSpec, ExitSpec, ModelSpec, SamplingSpec

    spec = ModelSpec(path=model_path, dtype=setting["dtype"])
    config = read_model_config(spec)
    exits = ExitSpec(mode="off")
    if "layers" in setting:
        exits = ExitSpec(layers=setting["layers"], threshold=setting["threshold"])
    engine = build_engine(
        load_weights(spec, config),
        load_tokenizer(config, spec),
        exits,
        SamplingSpec(max_new_tokens=MAX_NEW_TOKENS),
        EngineSpec(max_batch=setting["batch"]),
    )

    def generate(count: int) -> tuple[Outputs, dict[str, Any]]:
        outputs: Outputs = [[] for _ in range(count)]
        layers = 0
        for result in engine.generate(Prompt(i, prompts[i]) for i in range(count)):
            if not isinstance(result, Generation):
                raise SystemExit(f"row {result.row_id} failed: {result.message}")
            outputs[int(result.row_id)] = result.token_ids
            layers += sum(result.exit_layers)
        return outputs, {"mean_exit_layer": layers / sum(map(len, outputs))}

    return generate


ENGINES: dict[str, Callable[..., Any]] = {"transformers": transformers_static, "eevp": eevp}
