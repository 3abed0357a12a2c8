"""Texts with concept labels of files, and their rows at a hook of a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor, nn

from lmmono.data.text_files import missing_column, read_rows, source_files
from lmmono.errors import DataError
from lmmono.suites.feature_families import FeatureFamily
from lmmono.suites.text_codes import EncodedTexts, ProbedCode, TextEncoder


@dataclass(frozen=True, slots=True, eq=False)
class ConceptTexts:
    """Texts with a class and the values of some concepts."""

    texts: tuple[str, ...]
    labels: Int64[ndarray, " n"]
    concepts: Int64[ndarray, "n k"]
    """Index into `values` of every concept."""
    label_names: tuple[str, ...]
    names: tuple[str, ...]
    """Concepts."""
    values: tuple[str, ...]
    """What a concept may be, such as Negative, Positive and unknown."""


def read_concepts(
    path: str | Path,
    *,
    concepts: Sequence[str],
    text: str = "text",
    label: str = "label_name",
    split: str = "split",
    leave_out: Sequence[str] = ("no majority", "None"),
) -> dict[str, ConceptTexts]:
    """Return the parts of a file with concept columns, by the names of its splits.

    Args:
        path: A .csv, .tsv, .json, .jsonl or .parquet file.
        concepts: Columns of concepts; all have the same values.
        text: Column of the text.
        label: Column of the class.
        split: Column of the split.
        leave_out: Rows with such a class or concept are left out.

    Raises:
        DataError: A file or column is missing, or no row is left.
    """
    rows: list[tuple[str, str, str, list[str]]] = []
    for file in source_files([str(path)]):
        for where, row in read_rows(file):
            for column in (text, label, split, *concepts):
                if column not in row:
                    raise missing_column(where, column, list(row))
            held_concepts = [str(row[column]) for column in concepts]
            if not {str(row[label]), *held_concepts} & set(leave_out):
                rows.append((str(row[split]), str(row[text]), str(row[label]), held_concepts))
    if not rows:
        raise DataError(f"{path}: no row without {', '.join(leave_out)}; leave out less")
    classes = tuple(sorted({row[2] for row in rows}))
    values = tuple(sorted({value for row in rows for value in row[3]}))
    parts: dict[str, ConceptTexts] = {}
    for part in dict.fromkeys(row[0] for row in rows):
        of_part = [row for row in rows if row[0] == part]
        parts[part] = ConceptTexts(
            tuple(row[1] for row in of_part),
            np.array([classes.index(row[2]) for row in of_part], np.int64),
            np.array([[values.index(value) for value in row[3]] for row in of_part], np.int64),
            classes,
            tuple(concepts),
            values,
        )
    return parts


def text_rows(
    model: nn.Module, texts: Sequence[str], hook: str, tokenizer: Any = None
) -> list[Float[Tensor, "pos d"]]:
    """Return the rows of the tokens of each text at a hook, without the token before the text.

    They are on the host, where comparators are small enough to be trained.
    """
    code = ProbedCode("raw", FeatureFamily("raw"), hook, "mean")
    whole = EncodedTexts(TextEncoder(model, tokenizer, [code]), hook, texts)
    return [rows.cpu() for rows in whole.encoder.token_rows(hook, whole.ids(texts))]
