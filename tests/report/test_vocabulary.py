from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from eevp_batch.model_config import read_model_config
from eevp_batch.report.vocabulary import CLASSES, Vocabulary, find_model
from eevp_batch.spec import ModelSpec
from eevp_batch.storage.plan import make_plan
from tests.storage.jobs import make_spec, write_input


def classes_of(folder: Path, *texts: str) -> list[tuple[str, str]]:
    """(text, class) of every token of some generations."""
    vocabulary, tokenizer = Vocabulary.read(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    flat = np.asarray([token for some in ids for token in some])
    starts = np.cumsum([0, *(len(some) for some in ids)])[:-1]
    kinds = vocabulary.classes(flat, starts).tolist()
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token in flat]
    return [(text, CLASSES[kind]) for text, kind in zip(texts, kinds, strict=True)]


def test_tokens_are_told_apart(tiny_llama: Path) -> None:
    found = classes_of(tiny_llama, " qz 4,\n<|endoftext|>")
    assert found == [
        (" ", "whitespace"),
        ("q", "word start"),
        ("z", "word inside"),
        (" ", "whitespace"),
        ("4", "number"),
        (",", "punctuation"),
        ("\n", "whitespace"),
        ("<|endoftext|>", "special"),
    ]


def test_a_token_that_begins_with_a_space_starts_a_word(tiny_llama: Path) -> None:
    found = classes_of(tiny_llama, "z the")
    assert found == [("z", "word start"), (" the", "word start")]


def test_a_generation_begins_with_a_word_start_whatever_stood_before_it(tiny_llama: Path) -> None:
    assert [kind for _, kind in classes_of(tiny_llama, "q", "z")] == ["word start"] * 2


def test_pieces_are_the_text_and_a_character_comes_whole(tiny_llama: Path) -> None:
    vocabulary, tokenizer = (
        Vocabulary.read(tiny_llama),
        Tokenizer.from_file(f"{tiny_llama}/tokenizer.json"),
    )
    text = " a ü 日本!"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = vocabulary.pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert pieces.count("") == 1 + 2 + 2, "bytes of a character that is not complete yet"


def test_a_model_is_found_only_while_it_is_the_one_of_the_job(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model = read_model_config(ModelSpec(path=str(tiny_llama)))
    plan = make_plan(make_spec(write_input(tmp_path / "in.parquet", ["a"])), model)
    assert find_model(plan) == model
    plan.fields["model.content_hash"] = "another"
    assert find_model(plan) is None


def test_a_model_that_is_gone_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    from tests.storage.jobs import MODEL

    plan = make_plan(make_spec(write_input(tmp_path / "in.parquet", ["a"])), MODEL)
    assert find_model(plan) is None


def test_a_broken_tokenizer_is_none(tmp_path: Path) -> None:
    assert Vocabulary.read(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert Vocabulary.read(tmp_path) is None
