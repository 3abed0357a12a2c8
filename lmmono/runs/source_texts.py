"""The files of text that a stage read: what they were then, and what has changed since.

A recipe names texts by their paths, so its digest stays when somebody edits one of them, and
results of the old text would look like results of the new one.
"""

from collections.abc import Mapping, Sequence

from lmmono.data.text_files import SourceFile, source_files
from lmmono.errors import DataError
from lmmono.recipe import Recipe
from lmmono.recipe.sections import FilesCorpus

TextMark = list[str | int]
"""SHA-256 of a file, its size in bytes, and when it was last changed, in nanoseconds."""


def named_texts(recipe: Recipe, sections: Sequence[str]) -> tuple[str, ...]:
    """Return the paths and globs of text files that parts of a recipe name."""
    paths: list[str] = []
    if "data" in sections and isinstance(recipe.data.corpus, FilesCorpus):
        paths += recipe.data.corpus.paths
    if "robustness" in sections:
        for task in recipe.robustness.tasks:
            paths += [task.path] if task.path else []
            paths += [other.path for other in task.ood.values()]
    return tuple(paths)


def text_marks(paths: Sequence[str]) -> dict[str, TextMark]:
    """Return what the files are now; reads all of them.

    Raises:
        DataError: A path is missing or cannot be read.
    """
    files = source_files(paths)
    return {str(file.path): [file.sha256(), *_size_and_time(file)] for file in files}


def changed_texts(paths: Sequence[str], marks: Mapping[str, TextMark]) -> list[str]:
    """Return one line for each file that is not what it was; reads only those of another time.

    Texts that are gone altogether change nothing: results stand without them.
    """
    try:
        files = {str(file.path): file for file in source_files(paths)}
    except DataError:
        return []
    faults = [f"{name} is missing" for name in marks if name not in files]
    faults += [f"{name} is new" for name in files if name not in marks]
    for name, file in files.items():
        if name in marks:
            digest, *before = marks[name]
            if _size_and_time(file) != before and file.sha256() != digest:
                faults.append(f"{name} has other bytes (sha256 differs)")
    return faults


def _size_and_time(file: SourceFile) -> list[int]:
    parts = list(file.path.glob("*.arrow")) if file.path.is_dir() else [file.path]
    stats = [part.stat() for part in parts]
    return [sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)]
