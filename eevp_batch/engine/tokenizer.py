"""Loading a model's tokenizer; without torch, so that `plan` stays light."""

from __future__ import annotations

from typing import Any

from eevp_batch.errors import ModelError
from eevp_batch.model_config import ModelConfig
from eevp_batch.spec import ModelSpec


def load_tokenizer(model: ModelConfig, spec: ModelSpec) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: the folder has no tokenizer that transformers can load.
    """
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            model.path, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model.path}: no usable tokenizer: {error}") from error
    # How long a prompt may be is the job's to say; transformers would warn of indexing errors.
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    return tokenizer
