"""Stop strings: where a generation ends before its end token."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopStrings:
    """Looks for stop strings in the text of the tokens so far.

    A stop string completed by the newest token lies within as many tokens as it has bytes, for a
    token that shows in the text brings at least one; a few more are read, because some tokens do
    not show.

    Args:
        stops: the strings; none turns every check off.
        decode: text of a list of token ids.
    """

    SPARE_TOKENS = 8

    def __init__(self, stops: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._stops, self._decode = list(stops), decode
        longest = max((len(stop.encode()) for stop in stops), default=0)
        self._window = longest + self.SPARE_TOKENS
        self._ends = {stop[-1] for stop in stops}
        self._may_complete: dict[int, bool] = {}

    def is_reached(self, token_ids: list[int], start: int = 0) -> bool:
        """Whether the newest token completed a stop string.

        Args:
            token_ids: prompt and generation; as it is asked after each token, only their end is
                copied.
            start: the first generated one.
        """
        if not self._stops or not self._brings_an_end(token_ids[-1]):
            return False
        tail = self._decode(token_ids[max(start, len(token_ids) - self._window) :])
        if not any(stop in tail for stop in self._stops):
            return False
        # A tail decodes a little differently from the whole at its first token: ask the whole.
        text = self._decode(token_ids[start:])
        return any(stop in text for stop in self._stops)

    def _brings_an_end(self, token_id: int) -> bool:
        """Whether this token can be the one that completes a stop string.

        Most tokens do not hold the last character of any. Alone, a token may lose white space or
        show only a part of a character, so that those are always looked into.
        """
        known = self._may_complete.get(token_id)
        if known is None:
            alone = self._decode([token_id])
            known = "\ufffd" in alone or any(end.isspace() or end in alone for end in self._ends)
            self._may_complete[token_id] = known
        return known

    def cut(self, text: str) -> str:
        """The text before the first stop string; the string itself is left out."""
        found = [text.index(stop) for stop in self._stops if stop in text]
        return text[: min(found)] if found else text
