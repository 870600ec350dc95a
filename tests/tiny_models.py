"""Tiny random models of every supported family, as real Hugging Face folders.

Their weights are drawn so that tokens vary, confidences spread over 0..1, and a middle layer
sometimes agrees with the last one; norms and biases are drawn too, so that one left out shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

NUM_LAYERS = 6
VOCAB_SIZE = 320  # 3 special tokens, 256 bytes, the rest merges
CONTEXT_LENGTH = 256
SLIDING_WINDOW = 8  # tokens; of the Mistral only, shorter than most prompts
BOS, EOS, PAD = "<|begin|>", "<|endoftext|>", "<|pad|>"  # ids 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog while the other dogs are sleeping.",
    "Write a short list of the things that are in the house and in the garden.",
    "What is the answer to the question? The answer is in the text of the letter.",
]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _configs() -> dict[str, PretrainedConfig]:
    return {
        "llama": LlamaConfig(**_SHAPE, tie_word_embeddings=False),
        "llama_tied": LlamaConfig(**_SHAPE, tie_word_embeddings=True),
        "mistral": MistralConfig(
            **_SHAPE, tie_word_embeddings=False, sliding_window=SLIDING_WINDOW
        ),
        "qwen2": Qwen2Config(**_SHAPE, tie_word_embeddings=False),
        # Its heads are wider than hidden_size / num_attention_heads.
        "qwen3": Qwen3Config(**_SHAPE, tie_word_embeddings=False, head_dim=16),
    }


FAMILIES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives the round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(text, special=True) for text in (BOS, EOS, PAD)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    )


def build_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 model in evaluation mode; `changes` overwrite fields of its config."""
    config = _configs()[family]
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(_drawn(name, noise))
    return model


def _drawn(name: str, noise: torch.Tensor) -> torch.Tensor:
    if "norm" in name:
        return 1.0 + 0.2 * noise
    if "embed_tokens" in name or "lm_head" in name:
        return 0.5 * noise  # scores of the normed state then have a deviation of about 3
    if "down_proj" in name or "o_proj" in name:
        return 0.5 * noise  # what a layer adds weighs as much as what it adds to
    return 0.3 * noise


def save_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write the model and its tokenizer to `folder` as safetensors and JSON."""
    build_model(family, seed, **changes).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder
