"""Words that may stand for each other: lists from a file, from WordNet, or of the planted language.

A file is JSON (`{"good": ["fine", "nice"]}`), lines of words (`good fine nice`), or word vectors
(`good 0.1 -0.3 ...`, such as the counter-fitted ones), whose near neighbours are the synonyms.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from lmmono.data.planted.lexicon import Lexicon, WordClass
from lmmono.errors import DataError

Synonyms = Callable[[str], tuple[str, ...]]
"""Takes a word in small letters, returns others that may stand for it, the nearest first."""

NEIGHBOURS, LEAST_COSINE = 50, 0.5
"""How many neighbours a word vector has, and how near they must be (TextFooler's settings)."""

_POS = ("n", "v", "a", "r")


def synonyms_of(lists: Mapping[str, Iterable[str]]) -> Synonyms:
    """Return the look-up of given lists; a word is no synonym of itself."""
    by_word = {
        word.lower(): tuple(
            dict.fromkeys(other for other in others if other.lower() != word.lower())
        )
        for word, others in lists.items()
    }
    return lambda word: by_word.get(word, ())


def read_synonyms(path: str | Path, words: Iterable[str] | None = None) -> Synonyms:
    """Return the look-up of a file of synonyms or word vectors.

    Args:
        path: The file; see the module.
        words: Words that neighbours are worked out for, where the file holds vectors; None takes
            all of the file's.

    Raises:
        DataError: The file is missing, is no UTF-8 text, or holds no lists.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"synonyms {path}: cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".json":
        return synonyms_of(_json_lists(path, text))
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if not any(len(row) > 1 for row in rows):
        raise DataError(f"synonyms {path}: no line has a word and another after it")
    if all(_is_number(value) for value in rows[-1][1:]):
        return _near(path, rows, words)
    return synonyms_of({row[0]: row[1:] for row in rows})


@cache
def wordnet_synonyms() -> Synonyms:
    """Return the look-up of WordNet's first sense of each word as noun, verb, adjective, adverb.

    Raises:
        DataError: nltk or its WordNet corpus is not there; nothing is downloaded.
    """
    try:
        from nltk.corpus import wordnet
    except ImportError as error:
        raise DataError(
            "WordNet needs nltk: pip install nltk; or name a file of synonyms"
        ) from error
    reader = cast(Any, wordnet)
    try:
        reader.ensure_loaded()
    except LookupError as error:
        raise DataError(
            "nltk's WordNet corpus is not on this machine: python -m nltk.downloader wordnet; or "
            "name a file of synonyms"
        ) from error

    @cache
    def look_up(word: str) -> tuple[str, ...]:
        return _senses(reader, word)

    return look_up


def planted_synonyms() -> Synonyms:
    """Return the look-up of the planted language: words that no task tells apart.

    Words stand for each other if they have one class, number, polarity, topic and value; names,
    places, determiners, prepositions, negators and all other words of grammar stay.
    """
    lexicon = Lexicon()
    groups: dict[tuple[Any, ...], list[str]] = {}
    content = (WordClass.NOUN, WordClass.VERB, WordClass.ADJECTIVE)
    for word in lexicon.words:
        if word.word_class in content and len(word.topics) < 2:
            kind = (word.word_class, word.number, word.polarity, word.topics)
            groups.setdefault(kind, []).append(word.form)
    return synonyms_of({form: forms for forms in groups.values() for form in forms})


def _senses(wordnet: Any, word: str) -> tuple[str, ...]:
    names: list[str] = []
    for pos in _POS:
        for synset in wordnet.synsets(word, pos=pos)[:1]:
            names += [name for name in synset.lemma_names() if "_" not in name]
    return tuple(dict.fromkeys(name for name in names if name.lower() != word))


def _json_lists(path: Path, text: str) -> dict[str, list[str]]:
    try:
        lists = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"synonyms {path}:{error.lineno}: no JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
        raise DataError(f"synonyms {path}: no JSON: {error}") from error
    fits = isinstance(lists, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) for other in cast(Any, others))
        for others in cast(dict[str, Any], lists).values()
    )
    if not fits:
        raise DataError(f'synonyms {path}: want an object of lists, such as {{"good": ["fine"]}}')
    return cast(dict[str, list[str]], lists)


def _near(path: Path, rows: list[list[str]], words: Iterable[str] | None) -> Synonyms:
    width = len(rows[-1])
    if rows and len(rows[0]) == 2 and width > 2:
        rows = rows[1:]  # the header that some files have: number of words, width
    uneven = next((i for i, row in enumerate(rows) if len(row) != width), None)
    if uneven is not None:
        word, *numbers = rows[uneven]
        raise DataError(
            f"synonyms {path}: vector {uneven + 1}, {word!r}, has {len(numbers)} numbers, want "
            f"{width - 1}"
        )
    names = [row[0] for row in rows]
    vectors = np.array([row[1:] for row in rows], np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    wanted = None if words is None else {word.lower() for word in words}
    lists: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        if wanted is not None and name.lower() not in wanted:
            continue
        cosine = vectors @ vectors[i]
        order = np.argsort(-cosine, kind="stable")[: NEIGHBOURS + 1]
        lists[name] = [names[j] for j in order.tolist() if j != i and cosine[j] >= LEAST_COSINE]
    return synonyms_of(lists)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
