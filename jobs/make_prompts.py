#!/usr/bin/env python3
"""Write the example prompts: `prompts/` for corpus.yaml, `conversations/` for messages.yaml.

Everything in them is ours: the texts in `material/`, and the templates in `prompt_families.py`.
The same texts give the same rows, in the same order, on every machine.

    python jobs/make_prompts.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from prompt_families import Item, conversations, items_by_task

HERE = Path(__file__).resolve().parent
NUM_PARTS = 2
ROW_GROUP_ROWS = 128

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("difficulty", pa.string(), nullable=False),
        pa.field("expected", pa.string()),  # the answer, where there is exactly one
        pa.field("prompt", pa.string(), nullable=False),
    ]
)
MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
CONVERSATION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("topic", pa.string(), nullable=False),
        pa.field("expected", pa.string()),
        pa.field("messages", pa.list_(MESSAGE), nullable=False),
    ]
)


def spread(items: list[Item]) -> list[Item]:
    """The same items in an order that keeps neighbours (one topic, one template) apart."""
    step = next(n for n in (37, 41, 43) if len(items) % n)
    return [items[index * step % len(items)] for index in range(len(items))]


def prompt_rows() -> list[dict[str, str | None]]:
    """Every prompt, the tasks interleaved, so that the first rows are a sample of all of them."""
    placed = []
    for task, items in items_by_task().items():
        for index, item in enumerate(spread(items)):
            row = {"id": f"{task}-{index:04d}", "task": task, **item._asdict()}
            placed.append(((2 * index + 1) / (2 * len(items)), task, row))
    return [row for _, _, row in sorted(placed, key=lambda entry: entry[:2])]


def write_parts(rows: list[dict[str, str | None]], folder: Path) -> None:
    """Write the rows to `part-<n>.parquet` files of about equal size, with several row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(NUM_PARTS):
        bounds = [len(rows) * edge // NUM_PARTS for edge in (part, part + 1)]
        table = pa.Table.from_pylist(rows[slice(*bounds)], schema=PROMPT_SCHEMA)
        path = folder / f"part-{part}.parquet"
        pq.write_table(table, path, row_group_size=ROW_GROUP_ROWS, compression="zstd")


def write_conversations(folder: Path) -> None:
    """Write the conversations to one file, with integer ids."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": 1000 + index, **row} for index, row in enumerate(conversations())]
    table = pa.Table.from_pylist(rows, schema=CONVERSATION_SCHEMA)
    pq.write_table(table, folder / "part-0.parquet", row_group_size=32, compression="zstd")


def main(folder: Path = HERE) -> None:
    """Write both folders below `folder` and say how much there is."""
    rows = prompt_rows()
    write_parts(rows, folder / "prompts")
    write_conversations(folder / "conversations")
    print(f"{len(rows)} prompts in {folder / 'prompts'}, conversations beside them")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
