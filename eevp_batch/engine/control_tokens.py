"""Control tokens in rows are text: a row cannot end its turn and speak as the system.

A tokenizer turns the text of a special token, such as `<|im_start|>`, into that token wherever it
finds it. In what the job file and the chat template write, that is wanted; in what a row brings, it
would let the row write the conversation around itself. Such rows are marked before they are
rendered and encoded in pieces; all others take the usual way.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping
from typing import Any

from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from eevp_batch.errors import PromptRenderError

MAX_MARKED = 4096
"""Most control tokens in one prompt: each is encoded apart, which takes about a millisecond."""

_MARKER = "\U000f0000"  # what `mark_control_tokens` puts before each


class ControlTokens:
    """Finds the control tokens of a tokenizer in rows, and encodes prompts in which they are text.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._apart: Any = None
        self._lock = threading.Lock()
        template = tokenizer.get_chat_template() if tokenizer.chat_template is not None else ""
        longest_first = sorted(_control_tokens(tokenizer, template), key=len, reverse=True)
        # With nothing to look for, the pattern matches nothing.
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def mark(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values with their control tokens marked; the same object where there are none.

        Raises:
            PromptRenderError: there are more than `MAX_MARKED`.
        """
        if not self._is_in(values):
            return values
        marked: Mapping[str, Any] = mark_control_tokens(dict(values), self._pattern)
        return marked

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that was rendered from marked values.

        Args:
            text: with markers.
            add_special_tokens: whether to begin and end as the tokenizer does with plain text.

        Raises:
            PromptRenderError: they cannot be encoded as text, or are too many.
        """
        if text.count(_MARKER) > MAX_MARKED:
            raise PromptRenderError(f"more than {MAX_MARKED:,} control tokens in the row's text")
        # Encoding as text switches the tokenizer over: not the one that other threads use.
        with self._lock:
            self._apart = self._apart or copy.deepcopy(self._tokenizer)
            try:
                token_ids: list[int] = encode_marked_chat(self._apart, text)
            except ValueError as error:
                raise PromptRenderError(f"control tokens in the row's text: {error}") from error
        if not add_special_tokens:
            return token_ids
        before, after = self._around
        return [*before, *token_ids, *after]

    @property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        bare = self._tokenizer("x", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("x")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def _is_in(self, value: Any) -> bool:
        if isinstance(value, str):
            return self._pattern.search(value) is not None
        if isinstance(value, Mapping):
            return any(self._is_in(item) for item in value.values())
        return isinstance(value, list | tuple) and any(map(self._is_in, value))


def _control_tokens(tokenizer: Any, template: str) -> set[str]:
    """The special tokens, and what else is one token and stands in the chat template."""
    return {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    }
