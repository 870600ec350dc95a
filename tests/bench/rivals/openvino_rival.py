"""OpenVINO GenAI's continuous batching; run by an interpreter that has openvino-genai.

The model is a folder that `optimum-cli export openvino --task text-generation-with-past
--weight-format fp32` wrote; the number type of the computation is asked for at load time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai
from wire import OneCall, Outputs, Prompts, serve, up_to_end, versions

PRECISION = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino(OneCall):
    """A pipeline whose scheduler holds `batch` sequences."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.versions = versions("openvino", "openvino-genai")
        self._end_ids = request["end_ids"]
        self._max_new_tokens = request["max_new_tokens"]
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = request["kv_gib"]
        scheduler.max_num_seqs = request["batch"]
        scheduler.max_num_batched_tokens = max(256, 8 * request["batch"])
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        properties = {
            "INFERENCE_PRECISION_HINT": PRECISION[request["dtype"]],
            "INFERENCE_NUM_THREADS": request["threads"],
        }
        if "kv" in request:
            properties["KV_CACHE_PRECISION"] = request["kv"]
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            request["model"], scheduler, "CPU", properties
        )

    def _run(self, prompts: Prompts, max_new_tokens: int) -> Outputs:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        config.do_sample = False
        config.apply_chat_template = False
        config.stop_token_ids = set(self._end_ids)
        config.include_stop_str_in_output = True
        config.eos_token_id = self._end_ids[0]
        tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = self._pipeline.generate(tensors, [config] * len(prompts))
        return [up_to_end(result.m_generation_ids[0], self._end_ids) for result in results]


if __name__ == "__main__":
    serve(OpenVino)
