"""Tasks that are read: labelled rows of local files or Hugging Face datasets, as parts of a task.

A built-in task is read as its record in `lmmono.registry.tasks` says, one of the user's own by the
names of its columns. Files of built-in tasks are looked for below a folder that the caller names;
without a folder the set is read from the hub, where it is there.

A table says which columns hold what, which rows count, and to which part each split goes. Files are
those of `lmmono.data.text_files`; `datasets` is imported only when a dataset is asked for by name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmmono.data.hub_documents import labelled_rows
from lmmono.data.tasks.overlap import text_key, without_leakage
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.data.tasks.task import NO_PARTNER, OOD, Labelled, Task
from lmmono.data.text_files import missing_column, read_rows, source_files
from lmmono.errors import DataError, nearest
from lmmono.recipe import Recipe
from lmmono.recipe.robustness_settings import Robustness, TaskSettings
from lmmono.registry.tasks import PLANTED, Shift, TaskRecord, TaskTable, find_record

VAL_SHARE, TEST_SHARE = 0.2, 0.2
"""Shares of training texts that are held out where a set has no such split."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text as read."""

    part: str
    text: str
    label: str
    noisy: str | None
    """None where nobody gave one."""
    pair: int | None


def find_task(
    name: str,
    folder: str | Path | None = None,
    *,
    ood: Sequence[str] | None = None,
    shared_texts: bool = False,
) -> Task:
    """Return a built-in task, read when asked for.

    Args:
        name: A name of `lmmono.registry.tasks.TASK_NAMES`; planted tasks need no data.
        folder: Folder with the sets' own folders; None reads from the hub.
        ood: Out-of-domain sets to add, by name. None adds those of the record that the folder
            holds; from the hub it adds none, for each is a download of its own.
        shared_texts: Keep texts of `train` and `val` that a test part has too; they are dropped
            otherwise.

    Raises:
        DataError: An unknown name, a task that is not where it was looked for, or a file, column,
            row or out-of-domain set that is missing.
    """
    if name in PLANTED:
        return planted_task(name)
    record = find_record(name)
    rows = [row for table in _tables(record, folder) for row in read_table(table, folder)]
    places = [table.place for table in _tables(record, folder)]
    task = assemble(
        rows,
        name=name,
        about=record.about,
        licence=record.licence,
        source=f"{record.citation}; {', '.join(dict.fromkeys(places))}",
        label_names=record.label_names,
    )
    parts = {**task.parts, **_shifted(record, folder, ood)}
    whole = Task(name, task.about, task.licence, task.source, task.label_names, parts)
    return whole if shared_texts else without_leakage(whole)


def read_table(
    table: TaskTable, folder: str | Path | None, *, required: bool = True
) -> Iterator[Row]:
    """Yield the rows of a table that count.

    Args:
        table: What to read.
        folder: Folder that holds the table's file; None reads the dataset of its name.
        required: Refuse a table of which no row counts.

    Raises:
        DataError: A file, dataset or column is missing, no row counts, a text or label is of
            another type.
    """
    rows = _hub_rows(table) if folder is None else _file_rows(Path(folder) / table.place)
    yield from _counted_rows(table, rows, required=required)


def _counted_rows(
    table: TaskTable, rows: Iterable[tuple[str, Mapping[str, Any]]], *, required: bool = True
) -> Iterator[Row]:
    counted = 0
    seen: dict[str, set[str]] = {column: set() for column in table.where}
    for where, values in rows:
        for column in table.where:
            seen[column].add(str(_value(values, column, where)))
        if any(str(values[column]) != wanted for column, wanted in table.where.items()):
            continue
        row = _row(table, values, where)
        if row is not None:
            counted += 1
            yield row
    if required and not counted:
        raise _nothing(table, seen)


def asked_tasks(settings: Robustness) -> list[Task]:
    """Return the tasks of a recipe's section, built-in ones and the user's own.

    Raises:
        DataError: As `find_task` and `read_task`.
    """
    return [
        find_task(task.title, settings.folder) if task.path is None else own_task(task)
        for task in settings.tasks
    ]


def require_own_tasks(recipe: Recipe) -> None:
    """Read the tasks of a recipe's own files, so that a fault in them costs no work.

    Raises:
        DataError: As `read_task`.
    """
    for task in recipe.robustness.tasks:
        if task.path is not None:
            own_task(task)


def own_task(settings: TaskSettings) -> Task:
    """Return the task of a recipe that is read from files of the user's own; see `read_task`."""
    assert settings.path is not None
    return read_task(
        settings.path,
        name=settings.title,
        text=settings.text,
        label=settings.label,
        split=settings.split,
        noisy=settings.noisy,
        pair=settings.pair,
        ood={name: domain.model_dump(exclude_unset=True) for name, domain in settings.ood.items()},
    )


def read_task(
    rows: Any,
    *,
    name: str | None = None,
    text: str | Sequence[str] = "text",
    label: str = "label",
    split: str | None = "split",
    noisy: str | None = None,
    pair: str | None = None,
    ood: Mapping[str, Any] | None = None,
    shared_texts: bool = False,
) -> Task:
    """Return the task of labelled rows: of a file, a folder, or in memory.

    Where there is no split for them, 20 % of the texts are held out for `val` and `test` by a hash
    of the text, so that copies stay together.

    Args:
        rows: A `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet` file, a folder of such or of
            `save_to_disk`, a dataset of `datasets`, or mappings.
        name: Name of the task; the path's own by default.
        text: Column of the text, or columns such as premise and hypothesis, which are joined by
            line breaks.
        label: Column of the class, a name or a number from 0 or 1; any number of classes.
        split: Column of `train`, `val` or `test`; None, or rows without it, takes every row
            as training text.
        noisy: Column of the class that annotators really gave, if there is one.
        pair: Column that is the same number in both texts of a contrast pair, if there is one.
        ood: Rows of other domains by name, all of them tested on: rows as above, or a mapping of
            `path` and, where they are others, `text`, `label`, and `labels`: the class here that
            each class there means.
        shared_texts: Keep texts of `train` and `val` that a test part has too; they are dropped
            otherwise.

    Raises:
        DataError: A file or column is missing, a split stands for no part, a label is missing or
            negative, or the rows make no task; see `Task`.
    """
    source = _Source.of(rows)
    title = name or (Path(source.name).stem if source.is_file else "mine")
    columns = (text,) if isinstance(text, str) else tuple(text)
    table = TaskTable(
        source.name,
        text=columns,
        label=label,
        split=split if split is not None and split in source.columns() else None,
        noisy=noisy,
        pair=pair,
        refuse_others=True,
    )
    counted = list(_counted_rows(table, source.rows()))
    task = assemble(
        counted,
        name=title,
        about=f"{label} of {source.name}, parts {', '.join(sorted({row.part for row in counted}))}",
        licence="not stated",
        source=source.name,
        label_names=_classes(counted, source.name),
    )
    parts = {**task.parts}
    for domain, other in (ood or {}).items():
        parts[f"{OOD}{domain}"] = _other_domain(task, other, columns, label, domain)
    whole = Task(title, task.about, task.licence, task.source, task.label_names, parts)
    return whole if shared_texts else without_leakage(whole)


@dataclass(frozen=True, slots=True)
class _Source:
    """Labelled rows, of files or in memory."""

    name: str
    is_file: bool
    rows: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]

    @classmethod
    def of(cls, rows: Any) -> "_Source":
        if isinstance(rows, str | Path):
            path = Path(rows)
            return cls(path.name, True, lambda: _file_rows(path))
        if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
            kind = type(rows).__name__  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
            raise DataError(f"task: want a file, or rows that are mappings, got {kind}")
        several: list[Any] = list(rows)  # pyright: ignore[reportUnknownArgumentType]
        for i, row in enumerate(several):
            if not isinstance(row, Mapping):
                raise DataError(f"task: row {i}: want a mapping of columns, got {row!r:.40}")
        return cls("rows", False, lambda: ((f"row {i}", row) for i, row in enumerate(several)))

    def columns(self) -> Mapping[str, Any]:
        """Return the first row.

        Raises:
            DataError: There is none.
        """
        first = next(iter(self.rows()), None)
        if first is None:
            raise DataError(f"{self.name}: no rows in it")
        return first[1]


def _other_domain(
    task: Task, source_of: Any, columns: tuple[str, ...], label: str, domain: str
) -> Labelled:
    """Return rows of another domain as a part of a task.

    Raises:
        DataError: They cannot be read, or hold no text of the task's classes.
    """
    about: Mapping[str, Any] = source_of if isinstance(source_of, Mapping) else {"path": source_of}  # pyright: ignore[reportUnknownVariableType]
    keys = ("path", "text", "label", "labels")
    for key in about:
        if key not in keys:
            raise DataError(f"task {task.name}, ood {domain}: no {key!r}; {nearest(key, keys)}")
    if "path" not in about:
        raise DataError(f"task {task.name}, ood {domain}: want a path, or rows as path")
    text: Any = about.get("text") or columns
    source = _Source.of(about["path"])
    table = TaskTable(
        source.name,
        text=(text,) if isinstance(text, str) else tuple(text),
        label=about.get("label") or label,
        split=None,
    )
    mapping: Mapping[str, str] = about.get("labels") or {name: name for name in task.label_names}
    where = f"task {task.name}, part {OOD}{domain}"
    counted = list(_counted_rows(table, source.rows()))
    if not about.get("labels"):  # only what is mapped on purpose is left out
        return labelled(counted, task.label_names, where)
    rows = [
        Row(row.part, row.text, mapping[row.label], None, None)
        for row in counted
        if row.label in mapping
    ]
    if not rows:
        has = ", ".join(sorted({row.label for row in counted})[:10])
        raise DataError(f"{where}: no text of the classes {', '.join(mapping)}; it has {has}")
    return labelled(rows, task.label_names, where)


def assemble(
    rows: Iterable[Row],
    *,
    name: str,
    about: str,
    licence: str,
    source: str,
    label_names: tuple[str, ...],
) -> Task:
    """Return the task of rows, with what is missing of `val` and `test` held out of `train`.

    Raises:
        DataError: The rows make no task; see `Task`.
    """
    by_part: dict[str, list[Row]] = {}
    for row in rows:
        by_part.setdefault(row.part, []).append(row)
    for part, share in (("test", TEST_SHARE), ("val", VAL_SHARE)):
        if part not in by_part and "train" in by_part:
            rest, by_part[part] = _held_out(by_part["train"], share, part)
            by_part["train"] = rest
    order = {"train": 0, "val": 1, "test": 2}
    parts = {
        part: labelled(
            by_part[part], label_names, f"task {name}, part {part}", fitted=part in ("train", "val")
        )
        for part in sorted(by_part, key=lambda part: (order.get(part, 3), part))
    }
    return Task(name, about, licence, source, label_names, parts)


def labelled(
    rows: list[Row], label_names: tuple[str, ...], where: str, *, fitted: bool = False
) -> Labelled:
    """Return rows as a part, with real noisy labels where every row has one.

    Args:
        rows: The rows.
        label_names: The classes in the order of the labels.
        where: The part as errors name it.
        fitted: The part is learned from: a row without a real label is left out if others have one.

    Raises:
        DataError: A label that is none of the names, or an empty text.
    """
    index = {name: i for i, name in enumerate(label_names)}
    for row in rows:
        for value in (row.label, row.noisy):
            if value is not None and value not in index:
                raise DataError(f"{where}: label {value!r}; {nearest(value, label_names)}")
    some = any(row.noisy is not None for row in rows)
    if some and fitted:
        rows = [row for row in rows if row.noisy is not None]
    noisy_names = [row.noisy for row in rows if row.noisy is not None]
    noisy = (
        [index[name] for name in noisy_names] if some and len(noisy_names) == len(rows) else None
    )
    return Labelled(
        tuple(row.text for row in rows),
        np.array([index[row.label] for row in rows], np.int64),
        None if noisy is None else np.array(noisy, np.int64),
        _partners(rows),
    )


def _partners(rows: list[Row]) -> Any:
    if not any(row.pair is not None for row in rows):
        return None
    partners = np.full(len(rows), NO_PARTNER, np.int64)
    first: dict[int, int] = {}
    for i, row in enumerate(rows):
        if row.pair is None:
            continue
        if row.pair in first:
            partners[i], partners[first[row.pair]] = first[row.pair], i
        else:
            first[row.pair] = i
    return partners


def _held_out(rows: list[Row], share: float, salt: str) -> tuple[list[Row], list[Row]]:
    kept: list[Row] = []
    out: list[Row] = []
    for row in rows:
        digest = text_key(row.text)
        place = int.from_bytes(digest[:8] if salt == "test" else digest[8:], "big") / 2**64
        part = Row(salt, row.text, row.label, row.noisy, row.pair)
        (out if place < share else kept).append(part if place < share else row)
    return kept, out


def _classes(rows: list[Row], path: str) -> tuple[str, ...]:
    """Return the classes that labels name, or that they number from 0 or 1.

    Raises:
        DataError: Numbers with gaps, or below 0, which sets give to texts without a label.
    """
    labels = {row.label for row in rows}
    negative = sorted(label for label in labels if label[:1] == "-" and label[1:].isdecimal())
    if negative and all(label.lstrip("-").isdecimal() for label in labels):
        raise DataError(
            f"{path}: label {negative[0]}: want numbers from 0; leave out texts without a class"
        )
    # nine digits: int() of thousands of them is refused by Python
    if not all(label.isdecimal() and len(label) < 10 for label in labels):
        return tuple(sorted(labels))
    numbers = sorted(int(label) for label in labels)
    start = min(numbers[0], 1)  # stars begin at 1
    missing = next((i for i, number in enumerate(numbers, start) if number != i), None)
    if missing is not None:
        some = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
        raise DataError(
            f"{path}: labels with gaps: {some}; want every number from {start} to {numbers[-1]}, "
            f"{missing} is missing"
        )
    return tuple(str(number) for number in numbers)


def _row(table: TaskTable, values: Mapping[str, Any], where: str) -> Row | None:
    split = "train" if table.split is None else str(_value(values, table.split, where))
    part = table.splits.get(split)
    if part is None and table.refuse_others:
        raise DataError(
            f"{where}: split {split!r} stands for no part; want {', '.join(table.splits)}, or pass "
            "split=None to hold texts out"
        )
    label = _label(table, values, table.label, where)
    if part is None or label is None:
        return None
    texts = [_value(values, column, where) for column in table.text]
    for column, text in zip(table.text, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{where}: want text in {column!r}, got {type(text).__name__}")
    if table.blanks and not any(text.strip() for text in texts):
        return None
    noisy = None if table.noisy is None else _label(table, values, table.noisy, where)
    pair = None if table.pair is None else int(_number(values, table.pair, where))
    return Row(part, "\n".join(texts), label, noisy, pair)


def _label(table: TaskTable, values: Mapping[str, Any], column: str, where: str) -> str | None:
    """Return the class of a row, None where its value stands for none of the classes."""
    value = _value(values, column, where)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{where}: no label in {column!r}")
    if table.threshold is not None:
        value = "high" if _number(values, column, where) >= table.threshold else "low"
    name = str(value)
    return name if table.labels is None else table.labels.get(name)


def _number(values: Mapping[str, Any], column: str, where: str) -> float:
    value = _value(values, column, where)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: want a number in {column!r}, got {value!r:.40}") from error


def _value(values: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in values:
        raise missing_column(where, column, list(values))
    return values[column]


def _nothing(table: TaskTable, seen: Mapping[str, set[str]]) -> DataError:
    for column, wanted in table.where.items():
        if wanted not in seen[column]:
            has = ", ".join(sorted(seen[column])[:10]) or "no row"
            return DataError(f"{table.place}: no row with {column} {wanted!r}; it has {has}")
    return DataError(f"{table.place}: no labelled row of the splits {', '.join(table.splits)}")


def _hub_rows(table: TaskTable) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for split in table.splits:
        rows = labelled_rows(table.place, table.config, split, table.max_rows)
        for i, row in enumerate(rows):
            yield f"{table.place}:{split}:{i}", {**row, "split": split}


def _file_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in source_files([str(path)]):
        if file.format == ".txt":
            raise DataError(
                f"{file.path}: labelled texts come in .csv, .tsv, .json, .jsonl or .parquet"
            )
        yield from read_rows(file)


def _tables(record: TaskRecord, folder: str | Path | None) -> tuple[TaskTable, ...]:
    if folder is None and not record.hub:
        raise DataError(
            f"task {record.name} is not on the Hugging Face hub: give the folder that holds "
            f"{record.files[0].place}"
        )
    if folder is not None and not record.files:
        raise DataError(
            f"task {record.name} is read from the Hugging Face hub only, as "
            f"{record.hub[0].place}: leave the folder out"
        )
    return record.hub if folder is None else record.files


def _shifted(
    record: TaskRecord, folder: str | Path | None, ood: Sequence[str] | None
) -> dict[str, Labelled]:
    """Return the out-of-domain parts asked for, or those that the folder holds."""
    for key in ood or ():
        if key not in record.ood:
            way_out = nearest(key, record.ood)
            raise DataError(f"task {record.name}: no out-of-domain set {key!r}; {way_out}")
    keys = ood if ood is not None else [key for key in record.ood if folder is not None]
    parts: dict[str, Labelled] = {}
    for key in keys:
        shift = record.ood[key]
        if ood is None and folder is not None:
            files = [Path(folder) / table.place for table in find_record(shift.task).files]
            if not files or not all(file.exists() for file in files):
                continue
        rows = _shifted_rows(record, shift, folder, required=ood is not None)
        if rows:
            where = f"task {record.name}, {shift.task} {shift.part}"
            parts[f"{OOD}{key}"] = labelled(rows, record.label_names, where)
    return parts


def _shifted_rows(
    record: TaskRecord, shift: Shift, folder: str | Path | None, *, required: bool
) -> list[Row]:
    """Return the rows of another task's part, as classes of this one."""
    mapping = shift.labels or {label: label for label in record.label_names}
    rows = [
        Row(row.part, row.text, mapping[row.label], None, row.pair)
        for table in _tables(find_record(shift.task), folder)
        for row in read_table(table, folder, required=required)
        if row.part == shift.part and row.label in mapping
    ]
    if required and not rows:
        raise DataError(
            f"task {record.name}: {shift.task} has no text of part {shift.part} and the classes "
            f"{', '.join(mapping)}"
        )
    return rows
