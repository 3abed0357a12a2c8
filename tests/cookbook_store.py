"""The store that the SQL cookbook is answered from: planted units, two runs, scores, controls.

python tests/cookbook_store.py    # writes the answers into docs/sql_cookbook.md anew
"""

import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import small_store
from small_store import HOOK, WORDS, Small, fill

import activation_store as astore

PAGE = Path(__file__).parents[1] / "docs" / "sql_cookbook.md"
BLOCK = re.compile(r"^```sql\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)

SAID = {0: "the article", 1: "cats", 2: "sitting", 3: "a plural s", 4: "dogs", 5: "cats"}
SCORES = {0: (0.97, 0.12), 1: (0.99, 0.08), 2: (0.95, 0.10), 3: (0.98, 0.11), 4: (0.15, 0.40)}
"""Of each unit the score and that of its control; the explanation of unit 4 is wrong."""


def planted(folder: Path, order: list[int]) -> None:
    """Write 120 documents of ten tokens; `order` says which planted unit each unit is.

    Units 0 to 3 fire on one token each, 4 on " cat" where " the" stands before it, 5 never.
    """
    rng = np.random.default_rng(0)
    token_ids = rng.integers(0, len(WORDS), (60, 20))
    doc_ids = np.arange(1200).reshape(60, 20) // 10
    acts = np.zeros((60, 20, 6), np.float32)
    for unit in range(4):
        # eighths, so that no order of the rows is a matter of rounding
        acts[..., unit] = (token_ids == unit) * rng.integers(8, 25, token_ids.shape) / 8
    after_the = np.zeros_like(token_ids, bool)
    after_the[:, 1:] = (token_ids[:, 1:] == 1) & (token_ids[:, :-1] == 0)
    acts[..., 4] = 1.5 * after_the
    made = Small(folder, token_ids, doc_ids, {HOOK: acts[..., order]}, rng.normal(size=(60, 20, 4)))
    with pytest.MonkeyPatch.context() as patch, astore.open(folder, mode="w") as store:
        for name, size in (("N_SEQ", 60), ("N_CTX", 20), ("D", 6)):
            patch.setattr(small_store, name, size)
        fill(store, made)
        store.append("explanations", [
            {"hook": HOOK, "unit": unit, "explainer": "token_lookup", "seed": 0, "text": text}
            for unit, text in SAID.items()
        ])  # fmt: skip
        store.append("all_scores", [
            {"metric": "detection", "metric_version": 1, "hook": HOOK, "unit": unit, "n": 40,
             "explainer": "token_lookup", "control": control, "value": value,
             "ci_low": value - 0.02, "ci_high": min(1.0, value + 0.02)}
            for unit, values in SCORES.items()
            for control, value in zip((None, "random_explanation"), values, strict=True)
        ])  # fmt: skip


def cookbook_store(folder: Path) -> astore.Store:
    """Return the open store; it is attached as `crate`, and one with its units turned as `gpt2`."""
    planted(folder / "crate", [0, 1, 2, 3, 4, 5])
    planted(folder / "gpt2", [3, 4, 5, 0, 1, 2])
    store = astore.open(folder / "crate")
    for name in ("crate", "gpt2"):
        store.attach(folder / name, name)
    return store


def shown(store: astore.Store, query: str) -> str:
    """Return the rows of a query in columns, as the page shows them."""
    result = store.sql(query)
    table = [result.columns, *([_cell(value) for value in row] for row in result.fetchall())]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _cell(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}"
    if isinstance(value, str):
        return value.replace("\n", "↵")
    return "" if value is None else str(value)


def main() -> None:
    """Write every answer anew."""
    with tempfile.TemporaryDirectory() as folder, cookbook_store(Path(folder)) as store:
        text = PAGE.read_text("utf-8")
        PAGE.write_text(
            BLOCK.sub(lambda m: f"```sql\n{m[1]}```\n\n```text\n{shown(store, m[1])}```", text),
            "utf-8",
        )


if __name__ == "__main__":
    main()
