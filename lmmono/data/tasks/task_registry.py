"""A built-in task by its name: read as its record in `lmmono.registry.tasks` says, or generated.

Files are looked for below a folder that the caller names; without a folder the set is read from the
Hugging Face hub, where it is there.
"""

from collections.abc import Sequence
from pathlib import Path

from lmmono.data.tasks.leakage import without_leakage
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.data.tasks.reading import Row, assemble, labelled, read_table
from lmmono.data.tasks.task import OOD, Labelled, Task
from lmmono.errors import DataError, nearest
from lmmono.registry.tasks import PLANTED, Shift, Table, TaskRecord, find_record


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
    rows = _rows(record, folder)
    task = assemble(
        rows,
        name=name,
        about=record.about,
        licence=record.licence,
        source=_source(record, folder),
        label_names=record.label_names,
    )
    parts = {**task.parts, **_shifted(record, folder, ood)}
    whole = Task(name, task.about, task.licence, task.source, task.label_names, parts)
    return whole if shared_texts else without_leakage(whole)


def _tables(record: TaskRecord, folder: str | Path | None) -> tuple[Table, ...]:
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


def _source(record: TaskRecord, folder: str | Path | None) -> str:
    places = dict.fromkeys(table.place for table in _tables(record, folder))
    return f"{record.citation}; {', '.join(places)}"


def _rows(record: TaskRecord, folder: str | Path | None, *, required: bool = True) -> list[Row]:
    tables = _tables(record, folder)
    return [row for table in tables for row in read_table(table, folder, required=required)]


def _shifted(
    record: TaskRecord, folder: str | Path | None, ood: Sequence[str] | None
) -> dict[str, Labelled]:
    """Return the out-of-domain parts asked for, or those that the folder holds."""
    for key in ood or ():
        if key not in record.ood:
            known = nearest(key, record.ood) if record.ood else "it has none"
            raise DataError(f"task {record.name}: no out-of-domain set {key!r}; {known}")
    keys = ood if ood is not None else [key for key in record.ood if folder is not None]
    parts: dict[str, Labelled] = {}
    for key in keys:
        shift = record.ood[key]
        if ood is None and folder is not None and not _is_there(shift, Path(folder)):
            continue
        rows = _shifted_rows(record, shift, folder, required=ood is not None)
        if rows:
            where = f"task {record.name}, {shift.task} {shift.part}"
            parts[f"{OOD}{key}"] = labelled(rows, record.label_names, where)
    return parts


def _is_there(shift: Shift, folder: Path) -> bool:
    tables = find_record(shift.task).files
    return bool(tables) and all((folder / table.place).exists() for table in tables)


def _shifted_rows(
    record: TaskRecord, shift: Shift, folder: str | Path | None, *, required: bool
) -> list[Row]:
    mapping = shift.labels or {label: label for label in record.label_names}
    rows = [
        Row(row.part, row.text, mapping[row.label], None, row.pair)
        for row in _rows(find_record(shift.task), folder, required=required)
        if row.part == shift.part and row.label in mapping
    ]
    if required and not rows:
        raise DataError(
            f"task {record.name}: {shift.task} has no text of part {shift.part} and the classes "
            f"{', '.join(mapping)}"
        )
    return rows
