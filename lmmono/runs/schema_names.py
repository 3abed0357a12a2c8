"""Short names of runs, as SQL and addresses have them."""

import re
from collections.abc import Sequence
from pathlib import Path


def schema_names(files: Sequence[str]) -> list[str]:
    """Return the names under which the tables of stores are found: those of their folders.

    Where two folders have one name, the folders above are part of it, as far as they differ.

    >>> schema_names(["runs/sweep/crate-seed0/store.duckdb", "runs/sweep/gpt2/store.duckdb"])
    ['crate_seed0', 'gpt2']
    >>> schema_names(["/runs/a/crate/store.duckdb", "/runs/b/crate/store.duckdb"])
    ['a_crate', 'b_crate']
    """
    folders = [Path(file).resolve().parent.parts[1:] for file in files]
    names: list[str] = []
    for folder in folders:
        n = 1
        while n < len(folder) and sum(other[-n:] == folder[-n:] for other in folders) > 1:
            n += 1
        name = re.sub(r"\W", "_", "_".join(folder[-n:]))
        names.append(name if name.isidentifier() else f"run_{name}")
    return names
