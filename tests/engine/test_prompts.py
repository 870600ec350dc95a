"""From a row's columns to token ids: every way to say a prompt, and every way it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from eevp_batch.engine.prompts import PromptEncoder
from eevp_batch.engine.tokenizer import load_tokenizer
from eevp_batch.errors import (
    EmptyPromptError,
    PromptRenderError,
    PromptTooLongError,
    RowError,
    RowSkippedError,
    UnreadableTextError,
    UsageError,
)
from eevp_batch.model_config import read_model_config
from eevp_batch.records import MAX_MESSAGE_CHARS, RowFailure
from eevp_batch.spec import InputSpec, ModelSpec, PromptSpec

MakeEncoder = Callable[..., PromptEncoder]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    spec = ModelSpec(path=str(tiny_llama))
    return load_tokenizer(read_model_config(spec), spec)


@pytest.fixture
def encoder(tokenizer: Any) -> MakeEncoder:
    def make(source: dict[str, Any] | None = None, room: int = 200, **prompt: Any) -> PromptEncoder:
        columns = InputSpec(path="unused.parquet", **(source or {}))
        return PromptEncoder(tokenizer, PromptSpec(**prompt), columns, room)

    return make


def chat_ids(tokenizer: Any, *messages: tuple[str, str]) -> list[int]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_the_chat_template_is_applied_where_there_is_one(
    encoder: MakeEncoder, tokenizer: Any
) -> None:
    found = encoder().encode({"prompt": "the dog"})
    assert found == chat_ids(tokenizer, ("user", "the dog"))
    with_system = encoder(system="be brief").encode({"prompt": "the dog"})
    assert with_system == chat_ids(tokenizer, ("system", "be brief"), ("user", "the dog"))


def test_a_plain_prompt_is_encoded_as_it_is(encoder: MakeEncoder, tokenizer: Any) -> None:
    assert encoder(chat=False).encode({"prompt": "the dog"}) == tokenizer("the dog")["input_ids"]


def test_messages_and_their_column(encoder: MakeEncoder, tokenizer: Any) -> None:
    talk = encoder({"prompt_column": None, "messages_column": "talk"})
    assert talk.columns == ["talk"]
    turns = [("user", "hi"), ("assistant", "yes?"), ("user", "the dog")]
    row = {"talk": [{"role": role, "content": content} for role, content in turns]}
    assert talk.encode(row) == chat_ids(tokenizer, *turns)


def test_a_template_reads_the_columns_it_names(encoder: MakeEncoder, tokenizer: Any) -> None:
    made = encoder(template="{{ a }} and {{ b | upper }}")
    assert made.columns == ["a", "b"]
    assert made.encode({"a": "x", "b": "y"}) == chat_ids(tokenizer, ("user", "x and Y"))


@pytest.mark.parametrize("content", [None, ""])
def test_no_prompt_is_an_error_row(encoder: MakeEncoder, content: str | None) -> None:
    with pytest.raises(EmptyPromptError):
        encoder().encode({"prompt": content})


def test_a_long_prompt_is_an_error_or_loses_its_beginning(encoder: MakeEncoder) -> None:
    row = {"prompt": "the dog " * 30}
    whole = encoder(chat=False).encode(row)
    with pytest.raises(PromptTooLongError, match=f"{len(whole)} prompt tokens; allowed: at most 9"):
        encoder(chat=False, max_prompt_tokens=9).encode(row)
    cut = encoder(chat=False, max_prompt_tokens=9, on_overlong="truncate_left").encode(row)
    assert cut == whole[-9:]
    with pytest.raises(RowSkippedError, match="allowed: at most 9"):
        encoder(chat=False, max_prompt_tokens=9, on_overlong="skip").encode(row)
    assert encoder(room=50, max_prompt_tokens=80).max_tokens == 50, "the context has the last word"


def test_transformers_does_not_warn_of_a_prompt_that_the_job_refuses(
    encoder: MakeEncoder, tokenizer: Any, tiny_llama: Path
) -> None:
    key = "sequence-length-is-longer-than-the-specified-maximum"
    for content in ("the dog " * 300, "<s> the dog " * 300):
        with pytest.raises(PromptTooLongError):
            encoder().encode({"prompt": content})
    assert key not in tokenizer.deprecation_warnings
    theirs = AutoTokenizer.from_pretrained(tiny_llama)
    theirs("the dog " * 300)
    assert key in theirs.deprecation_warnings, "this no longer tells whether it warned"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / zero }}", "ZeroDivisionError"),
        ("{{ missing }}", "UndefinedError"),
        ("{{ zero.__class__.__mro__ }}", "SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ zero | round(method='no') }}", "FilterArgumentError"),
        ("{{ zero | dictsort }}", "AttributeError"),
    ],
)
def test_a_template_that_raises_is_an_error_row(
    encoder: MakeEncoder, template: str, reason: str
) -> None:
    with pytest.raises(PromptRenderError, match=reason):
        encoder(template=template).encode({"zero": 0})


def test_an_error_row_does_not_hold_what_its_template_raises_in_full(
    encoder: MakeEncoder, tokenizer: Any
) -> None:
    tokenizer.chat_template = "{{ raise_exception(messages[0].content * 1000) }}"
    with pytest.raises(PromptRenderError) as raised:
        encoder().encode({"prompt": "endless " * 1000})
    failure = RowFailure.of("r", raised.value)
    assert failure.message.startswith("chat template: TemplateError: endless endless")
    assert failure.message.endswith("... (8,000,030 characters)")
    assert len(failure.message) < MAX_MESSAGE_CHARS + 100, "a chunk of such rows has to fit"


@pytest.mark.parametrize("talk", [["hi"], [{"role": "user"}], [None]])
def test_messages_that_are_none_are_an_error_row(encoder: MakeEncoder, talk: list[Any]) -> None:
    made = encoder({"prompt_column": None, "messages_column": "talk"})
    with pytest.raises(RowError, match="allowed: role and content"):
        made.encode({"talk": talk})


def test_settings_that_need_a_chat_template_are_refused_without_one(
    encoder: MakeEncoder, tokenizer: Any
) -> None:
    tokenizer.chat_template = None
    for settings in ({"chat": True}, {"system": "be brief"}):
        with pytest.raises(UsageError, match=r"prompt\.(chat|system)"):
            encoder(**settings)
    assert encoder().encode({"prompt": "the dog"}) == tokenizer("the dog")["input_ids"]


def test_a_template_that_does_not_parse_is_refused(encoder: MakeEncoder) -> None:
    with pytest.raises(UsageError, match=r"prompt\.template"):
        encoder(template="{{ a")


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, {"prompt": "a\ud800"}),
        ({"chat": False}, {"prompt": "\udfff"}),
        ({"template": r"{{ '\ud800' }} {{ prompt }}"}, {"prompt": "a"}),
        (
            {"chat": False},
            {"prompt": "<|endoftext|>\ud800"},
        ),  # with a control token, which is marked
    ],
)
def test_half_of_a_surrogate_pair_is_a_row_error(
    encoder: MakeEncoder, settings: dict[str, Any], row: dict[str, Any]
) -> None:
    with pytest.raises(UnreadableTextError, match=r"U\+D(800|FFF), half of a surrogate pair"):
        encoder(**settings).encode(row)
