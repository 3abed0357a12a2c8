"""The 25 queries of docs/sql_cookbook.md on one store of 10 M and one of 100 M activations.

    python benchmarks/cookbook.py [--acts 10 100] [--repeats 9] [--only 12 24] [--folder FOLDER]

Stores and units are those of `store_queries.py`: 6 hooks of 1,536 units at 15 % density, which is
dense; the text is random, of 4,096 words, and the documents have no scores. Names of the cookbook
(tokens, stores) are replaced by those of these stores. Prints the median wall time of each, its
median processor time, and the load of the machine.
"""

import argparse
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

from store_queries import build

import activation_store as astore

PAGE = Path(__file__).parents[1] / "docs" / "sql_cookbook.md"
RECIPE = re.compile(r"^## (\d+)\. (.*?)\n\n```sql\n(.*?)^```", re.DOTALL | re.MULTILINE)
WORDS = {"'the cat'": "'w7 w8'", "'cat'": "'w7'"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acts", type=int, nargs="+", default=[10], help="millions")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", nargs="+", help="numbers of the questions")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for n_million in options.acts:
            path = build(options.folder or Path(made), n_million)
            for file in path.with_suffix("").iterdir():
                file.read_bytes()
            with astore.open(path) as store:
                for name in ("crate", "gpt2"):
                    store.attach(path, name)
                print(f"{store.info().n_acts / 1e6:.1f} M acts, load {os.getloadavg()[0]:.1f}")
                for number, question, query in RECIPE.findall(PAGE.read_text("utf-8")):
                    if options.only and number not in options.only:
                        continue
                    for word, here in WORDS.items():
                        query = query.replace(word, here)
                    store.sql(query).fetchall()
                    walls: list[float] = []
                    processors: list[float] = []
                    for _ in range(options.repeats):
                        wall, processor = time.perf_counter(), time.process_time()
                        store.sql(query).fetchall()
                        walls.append(1e3 * (time.perf_counter() - wall))
                        processors.append(1e3 * (time.process_time() - processor))
                    print(
                        f"| {number} | {question} | {statistics.median(walls):.1f} | "
                        f"{statistics.median(processors):.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
