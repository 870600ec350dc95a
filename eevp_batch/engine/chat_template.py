"""A tokenizer's chat template, rendered as transformers does, within bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import (
    _alias_reasoning_fields,
    _compile_jinja_template,
    _plain_template_data,
)

from eevp_batch.engine.templates import BoundedEnvironment
from eevp_batch.errors import ModelError


class ChatTemplate:
    """Turns messages into the text of a prompt.

    Args:
        tokenizer: a transformers tokenizer with a chat template.

    Raises:
        ModelError: the template does not parse.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokens = dict(tokenizer.special_tokens_map)
        theirs: Any = _compile_jinja_template("").environment
        environment = BoundedEnvironment(
            trim_blocks=theirs.trim_blocks,
            lstrip_blocks=theirs.lstrip_blocks,
            extensions=[type(extension) for extension in theirs.extensions.values()],
        )
        environment.globals.update(theirs.globals)
        environment.filters["tojson"] = theirs.filters["tojson"]
        environment.guard_filters()
        try:
            self._template = environment.from_string(tokenizer.get_chat_template())
        except Exception as error:  # the parser is driven by a file that others wrote
            raise ModelError(
                f"{tokenizer.name_or_path}: chat template: found {type(error).__name__}: {error}; "
                "allowed: a jinja template"
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation, up to where the model is to answer.

        Args:
            messages: role and content each.

        Raises:
            Exception: whatever the template raises.
        """
        given = [{k: v for k, v in message.items() if v is not None} for message in messages]
        return self._template.render(
            messages=_alias_reasoning_fields(_plain_template_data(given)),
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._tokens,
        )
