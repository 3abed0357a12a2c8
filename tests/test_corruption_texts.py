"""Text noise: severity, what it may touch, and the same noise for the same text."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmono.data.corruption import edits
from lmmono.data.corruption.synonyms import (
    planted_synonyms,
    read_synonyms,
    synonyms_of,
    wordnet_synonyms,
)
from lmmono.data.corruption.text_noise import (
    corrupt_texts,
    pieces_of,
    standing_in,
)
from lmmono.data.planted import Language
from lmmono.errors import DataError
from lmmono.registry.suites import TEXT_CORRUPTIONS, find_corruption

LANGUAGE = Language(3)
TEXTS = [LANGUAGE.text(i) for i in range(8)]
LISTS = planted_synonyms()


def noisy(kind: str, severity: int, seed: int = 0, texts: list[str] = TEXTS) -> list[str]:
    return corrupt_texts(texts, kind, severity, seed=seed, synonyms=LISTS)


def words_changed(kind: str, severity: int) -> int:
    changed = 0
    for new, old in zip(noisy(kind, severity), TEXTS, strict=True):
        assert len(new.split()) == len(old.split())
        changed += sum(a != b for a, b in zip(new.split(), old.split(), strict=True))
    return changed


def distance(a: str, b: str) -> int:
    """The least number of insertions, deletions and replacements, by the textbook's recursion."""
    if not a or not b:
        return len(a) + len(b)
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_shares_grow_with_the_severity() -> None:
    for corruption in TEXT_CORRUPTIONS.values():
        assert list(corruption.shares) == sorted(corruption.shares)
        assert corruption.shares[0] > 0 and corruption.shares[-1] <= 1


@pytest.mark.parametrize("kind", TEXT_CORRUPTIONS)
def test_severity_zero_gives_the_texts_as_they_are(kind) -> None:
    assert noisy(kind, 0) == TEXTS


@pytest.mark.parametrize("kind", TEXT_CORRUPTIONS)
def test_noise_is_decided_by_text_kind_severity_and_seed_alone(kind) -> None:
    whole = noisy(kind, 4)
    np.random.seed(0)  # the global state must not matter
    assert noisy(kind, 4, texts=TEXTS[::-1])[::-1] == whole
    assert noisy(kind, 4, texts=TEXTS[5:8]) == whole[5:8]
    assert noisy(kind, 4, seed=1) != whole


@pytest.mark.parametrize("kind", ["typos", "ocr", "homoglyph", "case", "punctuation", "synonyms"])
def test_the_share_of_words_is_the_severity_s_and_a_higher_one_adds_edits(kind) -> None:
    n_words = sum(len(text.split()) for text in TEXTS)
    shares = TEXT_CORRUPTIONS[kind].shares
    before = TEXTS
    for severity in (3, 5):
        made = noisy(kind, severity)
        for old, weaker, new in zip(TEXTS, before, made, strict=True):
            for a, b, c in zip(old.split(), weaker.split(), new.split(), strict=True):
                assert a == b or b == c  # an edit that was made stays as it was
        if kind not in ("synonyms", "case", "homoglyph", "ocr"):  # these have too few places
            assert abs(words_changed(kind, severity) - shares[severity - 1] * n_words) <= len(TEXTS)
        before = made


def test_short_texts_get_their_share_on_average() -> None:
    texts = [f"word{i} is here now" for i in range(600)]
    made = corrupt_texts(texts, "typos", 3, seed=0)
    changed = sum(new != old for new, old in zip(made, texts, strict=True))
    assert abs(changed / 600 - 4 * 0.05) < 5 * (0.2 * 0.8 / 600) ** 0.5


def test_words_stay_in_number_or_are_lost_or_change_places_as_the_kind_says() -> None:
    for new, old in zip(noisy("word_shuffle", 5), TEXTS, strict=True):
        assert sorted(new.split()) == sorted(old.split()) and new != old
    n_lost = 0
    for new, old in zip(noisy("word_drop", 5), TEXTS, strict=True):
        rest = iter(old.split())
        assert all(word in rest for word in new.split())  # in their order
        assert "  " not in new
        n_lost += len(old.split()) - len(new.split())
    n_words = sum(len(text.split()) for text in TEXTS)
    assert abs(n_lost - 0.4 * n_words) <= len(TEXTS)
    assert corrupt_texts(["one two"] * 40, "word_drop", 5, seed=0).count("") == 0


def test_formatting_leaves_every_word_and_case_every_letter() -> None:
    for new, old in zip(noisy("formatting", 5), TEXTS, strict=True):
        for mark in ("<br />", "-", "*"):
            new = new.replace(f" {mark} ", " ")
        assert new.split() == old.split()
    for new, old in zip(noisy("case", 5), TEXTS, strict=True):
        assert new.lower() == old.lower() and new != old


def test_look_alike_letters_are_of_other_alphabets_and_look_like_unicode_says() -> None:
    for latin, other in edits.LOOKALIKES.items():
        assert latin.isascii() and not other.isascii() and len(other) == 1
        assert latin.isupper() == other.isupper()
    for new, old in zip(noisy("homoglyph", 5), TEXTS, strict=True):
        back = {other: latin for latin, other in edits.LOOKALIKES.items()}
        assert "".join(back.get(letter, letter) for letter in new) == old


def test_planted_synonyms_keep_class_number_polarity_and_topic() -> None:
    lexicon = LANGUAGE.lexicon
    for form in ("bad", "boats", "sails", "lovely"):
        word = lexicon.words[lexicon[form]]
        for other in LISTS(form):
            found = lexicon.words[lexicon[other]]
            assert (found.word_class, found.number, found.polarity, found.topics) == (
                word.word_class,
                word.number,
                word.polarity,
                word.topics,
            )
    assert LISTS("not") == () and LISTS("bass") == ()
    assert words_changed("synonyms", 5) > 0


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=9)
EDITS = (
    edits.press_neighbour,
    edits.insert_neighbour,
    edits.swap,
    edits.drop,
    edits.typo,
    edits.misread,
    edits.lookalike,
    edits.recase,
    edits.repunctuate,
)


@given(WORDS, st.sampled_from(EDITS), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_an_edit_changes_the_word_by_one_slip_or_says_that_it_cannot(word, edit, seed) -> None:
    made = edit(word, np.random.default_rng(seed))
    if made is None:
        return
    assert made != word
    if edit in (edits.press_neighbour, edits.insert_neighbour, edits.drop, edits.lookalike):
        assert distance(word, made) == 1
    if edit is edits.swap:
        assert sorted(made) == sorted(word)


def test_keys_are_neighbours_both_ways_and_as_on_the_keyboard() -> None:
    assert all(key in edits.NEIGHBOURS[other] for key in "gsp" for other in edits.NEIGHBOURS[key])
    assert set(edits.NEIGHBOURS["g"]) == set("tyfhvb")
    assert set(edits.NEIGHBOURS["q"]) == set("wa")


def test_a_word_s_stand_in_keeps_marks_and_capitals() -> None:
    lists = synonyms_of({"good": ["fine", "Good"], "ok": ["fair"]})
    assert standing_in('"GOOD!"', lists) == ['"FINE!"']
    assert standing_in("Ok", lists) == ["Fair"]
    assert standing_in("...", lists) == []


def test_synonyms_are_read_as_json_lines_or_vectors(tmp_path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"good": ["fine", "good"]}))
    assert read_synonyms(tmp_path / "a.json")("good") == ("fine",)
    (tmp_path / "b.txt").write_text("good fine nice\n\nbad poor\n")
    assert read_synonyms(tmp_path / "b.txt")("good") == ("fine", "nice")
    vectors = ["3 2", "good 1 0", "fine 0.9 0.1", "bad -1 0"]
    (tmp_path / "c.txt").write_text("\n".join(vectors))
    near = read_synonyms(tmp_path / "c.txt")
    assert near("good") == ("fine",) and near("bad") == ()
    assert read_synonyms(tmp_path / "c.txt", ["bad"])("good") == ()


def test_files_that_hold_no_synonyms_are_refused(tmp_path) -> None:
    cases = {
        "a.json": ("{", "no JSON"),
        "deep.json": ("[" * 99_999, "no JSON"),
        "digits.json": ("9" * 5000, "no JSON"),
        "b.json": ('{"good": "fine"}', "want an object of lists"),
        "c.txt": ("good\nbad\n", "no line has a word and another"),
        "d.txt": ("good 1 2 3\nbad 1 2\n", "'good', has 3 numbers, want 2"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            read_synonyms(tmp_path / name)
    with pytest.raises(DataError, match="cannot be read"):
        read_synonyms(tmp_path / "none.txt")


def test_wordnet_gives_synonyms_or_says_how_to_get_them() -> None:
    try:
        lists = wordnet_synonyms()
    except DataError as error:
        assert "nltk" in str(error) and "name a file of synonyms" in str(error)
    else:
        assert "automobile" in lists("car")


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(DataError, match="did you mean typos"):
        find_corruption("typo")
    with pytest.raises(DataError, match="want a severity of 0 to 5, got 6"):
        corrupt_texts(TEXTS, "typos", 6, seed=0)
    with pytest.raises(DataError, match="changes none of the 2 texts"):
        corrupt_texts(["1 2 3", "4 5 6"], "typos", 5, seed=0)
    assert corrupt_texts([], "typos", 5, seed=0) == []
    assert "".join(pieces_of(" a\n b ")) == " a\n b "
