"""The tiny models must be worth testing with: loadable, varied, and never degenerate."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import EOS, NUM_LAYERS, VOCAB_SIZE

PROMPTS = ("The quick brown fox", "What is the answer?", "Zürich 🙂 12", "a")


def test_text_survives_the_round_trip(any_tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(any_tiny_model)
    assert len(tokenizer) == VOCAB_SIZE, "the tokenizer and the head disagree on the vocabulary"
    assert tokenizer.convert_tokens_to_ids(EOS) == tokenizer.eos_token_id == 1
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text, f"{text!r} came back changed"


def test_the_chat_template_ends_with_the_assistants_turn(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|begin|>[user] Hi\n[assistant] "


def test_outputs_vary_and_middle_layers_sometimes_agree(any_tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(any_tiny_model)
    model = AutoModelForCausalLM.from_pretrained(any_tiny_model)
    outputs, agreements, margins = [], [], []
    for text in PROMPTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            output = model.generate(ids, max_new_tokens=32, do_sample=False)
            states = model(output, output_hidden_states=True).hidden_states
            middle = model.lm_head(model.model.norm(states[NUM_LAYERS - 2])).softmax(-1)
            last = model.lm_head(states[-1]).softmax(-1)
        outputs.append(tuple(output[0, ids.shape[1] :].tolist()))
        agreements.append((middle.argmax(-1) == last.argmax(-1)).float().mean())
        top = middle.topk(2).values
        margins.append((top[..., 0] - top[..., 1]).flatten())
    assert len(set(outputs)) == len(PROMPTS), "two prompts gave the same output"
    assert min(len(set(ids)) for ids in outputs) >= 4, f"an output repeats itself: {outputs}"
    agreement = torch.stack(agreements).mean()
    assert 0.05 < agreement < 0.95, f"layers agree on {agreement:.0%} of the tokens"
    spread = torch.cat(margins)
    assert spread.quantile(0.9) - spread.quantile(0.1) > 0.2, "margins hardly differ"
