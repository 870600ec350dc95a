"""From a row's columns to token ids: template, chat template, tokenizer, length policy.

Knows strings and ids; nothing of tensors, Parquet or Ray, and `plan` uses it without torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.meta import find_undeclared_variables

from eevp_batch.engine.chat_template import ChatTemplate
from eevp_batch.engine.control_tokens import ControlTokens
from eevp_batch.engine.templates import BoundedEnvironment
from eevp_batch.errors import (
    EmptyPromptError,
    PromptRenderError,
    PromptTooLongError,
    RowSkippedError,
    UnreadableTextError,
    UsageError,
)
from eevp_batch.spec import InputSpec, PromptSpec

MAX_PROMPT_CHARS = 8 << 20
"""Longest prompt that is encoded at all: each million takes 0.7 s and 130 MB."""

# A template may write control tokens around a role, or make them of it.
_ROLE = re.compile(r"[\w.-]+")


class PromptEncoder:
    """Encodes one row at a time; control tokens in a row's own text stay text.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: template, chat and length settings.
        source: which column holds the prompt; None: the one named `prompt`.
        max_tokens: most prompt tokens that the model's context leaves.

    Raises:
        UsageError: the settings ask for a chat template that the tokenizer does not have, or a
            jinja template does not parse.
    """

    def __init__(
        self, tokenizer: Any, prompt: PromptSpec, source: InputSpec | None, max_tokens: int
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._messages_column = source.messages_column if source else None
        self._prompt_column = (source.prompt_column if source else None) or "prompt"
        self.max_tokens = min(prompt.max_prompt_tokens or max_tokens, max_tokens)
        has_template = tokenizer.chat_template is not None
        self._is_chat = has_template if prompt.chat == "auto" else bool(prompt.chat)
        if self._is_chat and not has_template:
            raise UsageError(
                "prompt.chat: found true; allowed: false, the tokenizer has no template"
            )
        if not self._is_chat and (prompt.system or self._messages_column):
            field = "prompt.system" if prompt.system else "input.messages_column"
            raise UsageError(f"{field}: needs a chat template; found none; allowed: null")
        self._chat_template = ChatTemplate(tokenizer) if self._is_chat else None
        self._control_tokens = ControlTokens(tokenizer)
        self._environment = BoundedEnvironment(undefined=StrictUndefined)
        self._template: Template | None = None
        self._variables: list[str] = []
        if prompt.template is not None:
            self._parse(prompt.template)

    def _parse(self, template: str) -> None:
        try:
            parsed = self._environment.parse(template)
            self._template = self._environment.from_string(template)
        except Exception as error:  # the parser and Python's compiler have many of their own
            raise UsageError(
                f"prompt.template: found {type(error).__name__}: {error}; allowed: a jinja template"
            ) from error
        self._variables = sorted(find_undeclared_variables(parsed))

    @property
    def columns(self) -> list[str]:
        """Input columns that a row must bring."""
        if self._template is not None:
            return self._variables
        return [self._messages_column or self._prompt_column]

    def encode(self, row: Mapping[str, Any]) -> list[int]:
        """Token ids of one row's prompt, one or more.

        Args:
            row: value by column name, for at least `columns`.

        Raises:
            EmptyPromptError: null, empty, or no token.
            PromptRenderError: the template raised, or the messages are not messages.
            PromptTooLongError: over the limit and `on_overlong` is `error`.
            RowSkippedError: over the limit and `on_overlong` is `skip`.
            UnreadableTextError: it holds what no UTF-8 has bytes for.
        """
        token_ids = self._token_ids({name: row[name] for name in self.columns if name in row})
        if not token_ids:
            raise EmptyPromptError("the prompt encodes to no token")
        if len(token_ids) <= self.max_tokens:
            return token_ids
        if self._prompt.on_overlong == "truncate_left":
            return token_ids[-self.max_tokens :]
        raise self._too_long(f"{len(token_ids)} prompt tokens; allowed: at most {self.max_tokens}")

    def _too_long(self, message: str) -> RowSkippedError | PromptTooLongError:
        is_skipped = self._prompt.on_overlong == "skip"
        return (RowSkippedError if is_skipped else PromptTooLongError)(message)

    def _token_ids(self, values: Mapping[str, Any]) -> list[int]:
        marked = self._control_tokens.mark(values)
        text = self._text(marked)
        if len(text) > MAX_PROMPT_CHARS:
            raise self._too_long(f"{len(text):,} characters; allowed: at most {MAX_PROMPT_CHARS:,}")
        _refuse_surrogates(text)
        if marked is not values:
            return self._control_tokens.encode(text, add_special_tokens=not self._is_chat)
        token_ids: list[int] = self._tokenizer(text, add_special_tokens=not self._is_chat)[
            "input_ids"
        ]
        return token_ids

    def _text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            content: Any = self._render(self._template, row)
        else:
            content = row[self.columns[0]]
        if not content:
            raise EmptyPromptError("the prompt is null or empty")
        if self._chat_template is None:
            return str(content)
        return self._apply_chat(self._chat_template, content)

    def _render(self, template: Template, row: Mapping[str, Any]) -> str:
        try:
            return template.render(row)
        except Exception as error:  # whatever a template raises concerns this row alone
            raise PromptRenderError(f"prompt.template: {type(error).__name__}: {error}") from error

    def _apply_chat(self, template: ChatTemplate, content: Any) -> str:
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        if not isinstance(messages, list | tuple):
            raise PromptRenderError(f"messages: found {str(messages)[:80]!r}; allowed: a list")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise PromptRenderError(
                    f"messages: found {str(message)[:80]!r}; allowed: role and content"
                )
            role = message["role"]
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise PromptRenderError(
                    f"messages: found the role {str(role)[:80]!r}; allowed: letters, digits, "
                    "`_`, `.` and `-`"
                )
        if self._prompt.system is not None:
            messages = [{"role": "system", "content": self._prompt.system}, *messages]
        try:
            return template.render(messages)
        except Exception as error:  # as above
            raise PromptRenderError(f"chat template: {type(error).__name__}: {error}") from error


def _refuse_surrogates(text: str) -> None:
    """Refuse what tokenizers cannot take; a template may have written it as an escape."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the prompt holds U+{ord(text[error.start]):04X}, half of a surrogate pair"
        raise UnreadableTextError(found) from error
