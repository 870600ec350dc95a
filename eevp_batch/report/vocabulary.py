"""What tokens look like: a job's tokenizer, read from the model's folder without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders

from eevp_batch.errors import ModelError
from eevp_batch.model_config import ModelConfig, hash_model, read_model_config
from eevp_batch.spec import ModelSpec
from eevp_batch.storage.plan import Plan

CLASSES = ("word start", "word inside", "number", "punctuation", "whitespace", "special")
_START, _INSIDE, _NUMBER, _PUNCTUATION, _SPACE, _SPECIAL = range(len(CLASSES))

_UNKNOWN = -1

Ids = npt.NDArray[np.int64]


class Vocabulary:
    """Texts and classes of token ids.

    A token with letters is a *word start* where it begins with a space or follows what is not a
    letter, else *word inside*; bytes that are only a part of a character count as letters. A
    *number* has digits and no letters, *punctuation* neither.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {token_id for token_id, token in added if token.special}
        # Alone, a token may lose the space that it begins with; after another one it does not.
        self._before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._facts = np.zeros((0, 3), np.int8)  # by token id, see _facts_of

    @classmethod
    def read(cls, folder: Path) -> Vocabulary | None:
        """The tokenizer of a model folder; None where there is none that can be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception:  # the library raises nothing narrower
            return None

    def classes(self, ids: Ids, starts: Ids) -> Ids:
        """The class of every token, an index into `CLASSES`.

        Args:
            ids: [N] tokens of several generations.
            starts: where a generation begins.
        """
        self._learn(np.unique(ids))
        kinds, spaced, lettered = self._facts[ids].T
        after_letter = np.concatenate([[0], lettered[:-1]])
        after_letter[starts[starts < len(ids)]] = 0
        is_inside = (kinds == _START) & (spaced == 0) & (after_letter == 1)
        return np.where(is_inside, _INSIDE, kinds).astype(np.int64)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each token's text in its place; empty where its character ends in a later token."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token_id) or "" for token_id in ids]

    def _learn(self, ids: Ids) -> None:
        """Fill in the facts of tokens that have not been seen before."""
        if len(ids) and ids[-1] >= len(self._facts):
            missing = np.full((ids[-1] + 1 - len(self._facts), 3), _UNKNOWN, np.int8)
            self._facts = np.concatenate([self._facts, missing])
        new = ids[self._facts[ids, 0] == _UNKNOWN].tolist()
        decode = self._tokenizer.decode_batch
        (before,) = decode([self._before])
        texts = decode([[*self._before, token_id] for token_id in new], skip_special_tokens=False)
        for token_id, text in zip(new, texts, strict=True):
            self._facts[token_id] = self._facts_of(token_id, text.removeprefix(before))

    def _facts_of(self, token_id: int, text: str) -> tuple[int, bool, bool]:
        """Class (all letters: word start), whether a space comes first, a letter last."""
        if token_id in self._special:
            return _SPECIAL, False, False
        if not text.strip():
            return _SPACE, False, False
        if any(_is_letter(character) for character in text):
            return _START, text[0].isspace(), _is_letter(text[-1])
        has_digit = any(character.isdigit() for character in text)
        return (_NUMBER if has_digit else _PUNCTUATION), False, False


def _is_letter(character: str) -> bool:
    return character.isalpha() or character == "\N{REPLACEMENT CHARACTER}"


def find_model(plan: Plan) -> ModelConfig | None:
    """The shape of a job's model, where the model is still at hand and is the one of the job.

    Nothing is downloaded: a hub id is looked up in the local cache.
    """
    folder = Path(plan.model)
    if not folder.is_dir():
        cached = _cached(plan)
        if cached is None:
            return None
        folder = cached
    try:
        if hash_model(folder) != plan.fields["model.content_hash"]:
            return None
        return read_model_config(ModelSpec(path=str(folder)))
    except (ModelError, OSError):
        return None


def _cached(plan: Plan) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            plan.model, revision=plan.model_revision_or_hash, local_files_only=True
        )
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
    return Path(found)
