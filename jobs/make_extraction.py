#!/usr/bin/env python3
"""Write the texts of extract.yaml: short notes on invented people, and what is to be found in them.

The same number and seed give the same rows on every machine.

    python jobs/make_extraction.py [FOLDER] [--rows 2000] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
PEOPLE = HERE / "material" / "people.txt"

SENTENCES = [
    "{name}, {job}, moved to {city} in {year}.",
    "In {year} {name} opened a small studio in {city} and worked there as {job}.",
    "{name} was born in {city} in {year} and later became {job}.",
    "After years abroad, {name} returned to {city} in {year} to work as {job}.",
    "The prize for the best young {bare} went to {name} in {city} in {year}.",
    "It was in {city}, in {year}, that {name} first worked as {job}.",
]
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("expected", pa.string(), nullable=False),
    ]
)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Texts, and the answer to each as JSON."""
    rng = random.Random(seed)
    first_names, last_names, cities, jobs = (
        line.partition(": ")[2].split(", ") for line in PEOPLE.read_text().splitlines()
    )
    out = []
    for number in range(count):
        name = f"{rng.choice(first_names)} {rng.choice(last_names)}"
        city, job, year = rng.choice(cities), rng.choice(jobs), rng.randrange(1900, 2024)
        article = "an" if job[0] in "aeiou" else "a"
        text = rng.choice(SENTENCES).format(
            name=name, city=city, year=year, job=f"{article} {job}", bare=job
        )
        answer = f'{{"name": "{name}", "city": "{city}", "year": {year}, "job": "{job}"}}'
        out.append({"id": f"note-{number:06d}", "text": text, "expected": answer})
    return out


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "notes")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows(chosen.rows, chosen.seed), schema=SCHEMA)
    pq.write_table(table, chosen.folder / "notes.parquet", compression="zstd")
    print(f"{chosen.folder / 'notes.parquet'}: {table.num_rows} rows")


if __name__ == "__main__":
    main()
