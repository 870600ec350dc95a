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

FIRST_NAMES = """Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karim Laura Marco Nadia
Oscar Paula Quentin Rosa Stefan Tara Ursula Viktor Wanda Xenia Yusuf Zoe Amir Bianca Cedric Doris
Emil Fatima""".split()
LAST_NAMES = """Keller Novak Moreau Rossi Tanaka Silva Jensen Okafor Petrov Lindqvist Garcia Schmidt
Dubois Haddad Kowalski Brown Costa Ivanova Murphy Yilmaz Larsen Weber Fontaine Mbeki Sato Horvat
Olsen Bauer Conti Walsh""".split()
CITIES = """Lisbon Vienna Oslo Prague Turin Lyon Bergen Krakow Porto Dublin Ghent Basel Seville Riga
Graz Leeds Bremen Nantes Split Cairo Lagos Kyoto Boston Denver Lima Quito Hanoi Perth""".split()
JOBS = """architect nurse violinist carpenter geologist pilot chemist baker journalist teacher
engineer painter lawyer gardener translator""".split()
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
    out = []
    for number in range(count):
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        city, job, year = rng.choice(CITIES), rng.choice(JOBS), rng.randrange(1900, 2024)
        article = "an" if job[0] in "aeiou" else "a"
        text = rng.choice(SENTENCES).format(
            name=name, city=city, year=year, job=f"{article} {job}", bare=job
        )
        answer = f'{{"name": "{name}", "city": "{city}", "year": {year}, "job": "{job}"}}'
        out.append({"id": f"note-{number:06d}", "text": text, "expected": answer})
    return out


def main() -> None:
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
