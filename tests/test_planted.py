"""The planted language: its truth, re-derived from the text alone by a slow and simple reader."""

import hashlib
import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy

from lmmono.data.planted import Habits, Language
from lmmono.data.planted.features import KINDS
from lmmono.data.tokens import TokenCorpus, prepare
from lmmono.data.truth import planted_language, row_truth, token_truth
from lmmono.errors import DataError
from lmmono.recipe.sections import Data

LANGUAGE = Language(0)
DOCUMENTS = [LANGUAGE.document(i) for i in range(400)]

PLACES = {
    "sea": {"harbor", "beach"},
    "music": {"theater", "opera"},
    "sport": {"stadium", "arena"},
    "law": {"courthouse", "tribunal"},
    "science": {"laboratory", "observatory"},
    "farm": {"barn", "meadow"},
    "cooking": {"kitchen", "restaurant"},
    "craft": {"workshop", "garage"},
}
NUMBERS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
PRAISE = set(["good", "kind", "bright", "calm", "brave", "clever", "honest", "lovely"])
BLAME = set(["bad", "cruel", "dull", "angry", "lazy", "foolish", "dirty", "awful"])


def columns(names: list[str]) -> list[int]:
    known = [feature.name for feature in LANGUAGE.features]
    return [known.index(name) for name in names]


def assert_reads_as_told(reader: Callable[[list[str]], dict[str, list[bool]]]) -> None:
    """Compare what a reader finds in the text with the truth, for every word of 400 documents."""
    n_on = dict.fromkeys(reader(DOCUMENTS[0].words), 0)
    for document in DOCUMENTS:
        read = reader(document.words)
        truth = document.truth[:, columns(list(read))]
        for (name, found), told in zip(read.items(), truth.T, strict=True):
            assert found == told.tolist(), (name, document.text)
            n_on[name] += sum(found)
    assert all(n_on.values()), [name for name, n in n_on.items() if n == 0]


def read_topics(words: list[str]) -> dict[str, list[bool]]:
    now, topics = "", list[str]()
    for word in words:
        now = next((topic for topic, places in PLACES.items() if word in places), now)
        topics.append(now)
    found = {f"topic.{topic}": [t == topic for t in topics] for topic in PLACES}
    for noun, one, other in (
        ("bass", "sea", "music"),
        ("pitch", "music", "sport"),
        ("court", "sport", "law"),
        ("cell", "law", "science"),
        ("field", "science", "farm"),
        ("turkey", "farm", "cooking"),
        ("nut", "cooking", "craft"),
        ("seal", "craft", "sea"),
    ):
        forms = {noun, noun + "s", noun + "es"}
        for topic in (one, other):
            found[f"sense.{noun}_{topic}"] = [
                word in forms and t == topic for word, t in zip(words, topics, strict=True)
            ]
    return found


def read_bigrams(words: list[str]) -> dict[str, list[bool]]:
    pairs = list(zip(["", *words], words, strict=False))
    idioms = ("at last", "of course", "once more", "in fact", "old friend")
    return {
        f"bigram.{idiom.replace(' ', '_')}": [f"{a} {b}" == idiom for a, b in pairs]
        for idiom in idioms
    }


def read_positions(words: list[str]) -> dict[str, list[bool]]:
    starts = [i == 0 or words[i - 1] == "." for i in range(len(words))]
    return {
        "position.sentence_start": starts,
        "position.second_word": [False, *starts[:-1]],
        "position.document_start": [i < 5 for i in range(len(words))],
        "position.late": [i >= 64 for i in range(len(words))],
    }


def read_quotes(words: list[str]) -> dict[str, list[bool]]:
    n_before = [words[:i].count('"') for i in range(len(words))]
    marks = [word == '"' for word in words]
    return {
        "quoting.inside": [n % 2 == 1 and not m for n, m in zip(n_before, marks, strict=True)],
        "quoting.opening": [n % 2 == 0 and m for n, m in zip(n_before, marks, strict=True)],
        "quoting.closing": [n % 2 == 1 and m for n, m in zip(n_before, marks, strict=True)],
    }


def read_negation(words: list[str]) -> dict[str, list[bool]]:
    scope, negated = False, list[bool]()
    for word in words:
        scope = scope and word not in {".", ",", '"', "but", "and"}
        negated.append(scope)
        scope = scope or word in {"not", "never"}
    both = list(zip(words, negated, strict=True))
    return {
        "negation.scope": negated,
        "negation.negated_positive": [word in PRAISE and no for word, no in both],
        "negation.negated_negative": [word in BLAME and no for word, no in both],
        "negation.praise": [word in (BLAME if no else PRAISE) for word, no in both],
        "negation.blame": [word in (PRAISE if no else BLAME) for word, no in both],
    }


def read_numbers(words: list[str]) -> dict[str, list[bool]]:
    values = [NUMBERS.index(word) + 1 if word in NUMBERS else 0 for word in words]
    counting, results, counted = ([False] * len(words) for _ in range(3))
    for i, value in enumerate(values):
        if value and words[i - 1] in {",", "and"} and values[i - 2]:
            assert value == values[i - 2] + 1, words[i - 3 : i + 1]
            counting[i] = True
        if value and words[i - 1] == "make":
            # two boats and three boats make five boats
            assert value == values[i - 6] + values[i - 3], words[i - 6 : i + 1]
            results[i] = True
        counted[i] = i > 0 and values[i - 1] > 0 and words[i] not in {",", "and"}
    return {
        "number.word": [value > 0 for value in values],
        "number.large": [value >= 7 for value in values],
        "number.counting": counting,
        "number.sum": results,
        "number.counted_noun": counted,
    }


CLAUSE = re.compile(
    r"(?:DA*|#)(?P<head>[sp])(?P<between>(?:PDA*[sp])*|T(?:N|DA*[sp])[vV])n?(?P<verb>[vVcCxX])"
)


@cache
def letters() -> dict[str, str]:
    """One letter per word: D determiner, A adjective, s/p noun, v/V verb, and so on."""
    fixed = {
        "D": "the this every each these some many more",
        "#": " ".join(NUMBERS),
        "J": " ".join(PRAISE | BLAME),
        "P": "near behind beside under with of in",
        "n": "not never",
        ".": "said asked shouted whispered counted make",
        "T": "that",
        "c": "is",
        "C": "are",
        "x": "does",
        "X": "do",
    }
    letter_of = {word: letter for letter, words in fixed.items() for word in words.split()}
    by_word = {  # these hang on the word alone, see the test of needs_context
        "word_class.noun_singular": "s",
        "word_class.noun_plural": "p",
        "word_class.verb_singular": "v",
        "word_class.verb_plural": "V",
        "word_class.adjective": "A",
        "word_class.name": "N",
    }
    for document in DOCUMENTS:
        for place, letter in zip(columns(list(by_word)), by_word.values(), strict=True):
            for i in np.flatnonzero(document.truth[:, place]):
                letter_of.setdefault(document.words[i], letter)
    return letter_of


def read_agreement(words: list[str]) -> dict[str, list[bool]]:
    found = {
        name: [False] * len(words)
        for name in ("awaiting_singular", "awaiting_plural", "far_verb", "attracted_verb")
    }
    for match in CLAUSE.finditer("".join(letters().get(word, ".") for word in words)):
        head, verb = match.start("head"), match.start("verb")
        plural = match["head"] == "p"
        assert match["verb"] in ("VCX" if plural else "vcx"), words[head : verb + 1]
        for i in range(head + 1, verb):
            found["awaiting_plural" if plural else "awaiting_singular"][i] = True
        nouns = re.findall("[sp]", match["head"] + match["between"])
        found["far_verb"][verb] = verb - head > 1
        found["attracted_verb"][verb] = nouns[-1] != match["head"]
    return {f"agreement.{name}": on for name, on in found.items()}


@pytest.mark.parametrize(
    "reader",
    [
        read_topics,
        read_bigrams,
        read_positions,
        read_quotes,
        read_negation,
        read_numbers,
        read_agreement,
    ],
)
def test_the_truth_is_what_a_reader_finds_in_the_text(
    reader: Callable[[list[str]], dict[str, list[bool]]],
) -> None:
    assert_reads_as_told(reader)


def test_there_are_at_least_32_named_features_of_every_declared_kind() -> None:
    names = [feature.name for feature in LANGUAGE.features]
    assert len(set(names)) == len(names) >= 32
    assert {feature.kind for feature in LANGUAGE.features} == set(KINDS)
    assert all(feature.name.startswith(feature.kind + ".") for feature in LANGUAGE.features)
    assert len({feature.description for feature in LANGUAGE.features}) == len(names)


def test_a_feature_needs_context_exactly_if_the_word_alone_does_not_decide_it() -> None:
    on: list[set[str]] = [set() for _ in LANGUAGE.features]
    off: list[set[str]] = [set() for _ in LANGUAGE.features]
    for document in DOCUMENTS:
        for word, truth in zip(document.words, document.truth, strict=True):
            for i, is_on in enumerate(truth.tolist()):
                (on if is_on else off)[i].add(word)
    for feature, with_it, without_it in zip(LANGUAGE.features, on, off, strict=True):
        assert with_it and without_it, feature.name
        assert bool(with_it & without_it) == feature.needs_context, feature.name


def test_every_word_occurs_and_every_feature_is_on_somewhere_but_never_mostly() -> None:
    truth = np.concatenate([document.truth for document in DOCUMENTS])
    shares = truth.mean(axis=0)
    assert (shares > 1e-4).all() and (shares < 0.5).all()
    used = {word for document in DOCUMENTS for word in document.words}
    assert used == set(LANGUAGE.vocabulary) and 300 <= len(used) <= 500


def test_words_are_joined_by_single_blanks() -> None:
    for document in DOCUMENTS:
        assert document.words == document.text.split()
        assert document.truth.shape == (len(document.words), len(LANGUAGE.features))
    lengths = [len(document.words) for document in DOCUMENTS]
    assert 60 <= np.mean(lengths) <= 120


def test_a_document_depends_on_its_seed_and_number_only() -> None:
    again = Language(0)
    assert again.text(7) == DOCUMENTS[7].text == again.document(7).text
    assert again.text(3) == DOCUMENTS[3].text
    assert len({language.text(7) for language in map(Language, range(5))}) == 5


def test_equal_seeds_give_equal_documents_in_another_process() -> None:
    code = (
        "import hashlib; from lmmono.data.planted import Language; language = Language(0)\n"
        "both = [(d.text, d.truth.tobytes()) for d in map(language.document, range(50))]\n"
        "print(hashlib.sha256(repr(both).encode()).hexdigest())"
    )
    both = [(d.text, d.truth.tobytes()) for d in DOCUMENTS[:50]]
    here = hashlib.sha256(repr(both).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert there.stdout.strip() == here


def test_labels_tell_the_main_topic_and_the_mood() -> None:
    agree = list[bool]()
    praise, blame = columns(["negation.praise", "negation.blame"])
    for document in DOCUMENTS:
        assert document.words[2] in PLACES[document.topic]
        balance = int(document.truth[:, praise].sum()) - int(document.truth[:, blame].sum())
        if balance != 0:
            agree.append((balance > 0) == (document.mood > 0))
    assert len(agree) > 350 and np.mean(agree) > 0.9
    assert {document.mood for document in DOCUMENTS} == {1, -1}


def test_other_habits_shift_the_text_and_keep_the_features() -> None:
    negating = Language(0, Habits(negation=0.9))
    assert negating.features == LANGUAGE.features
    scope = columns(["negation.scope"])[0]
    share, usual = (
        np.concatenate([language.document(i).truth[:, scope] for i in range(50)]).mean()
        for language in (negating, LANGUAGE)
    )
    assert share > 2 * usual
    with pytest.raises(ValueError, match="negation: want a probability"):
        Habits(negation=1.5)


def test_structure_is_worth_more_than_two_nats_over_frequencies(tmp_path: Path) -> None:
    data = Data.model_validate({"corpus": {"kind": "planted", "n_documents": 500}})
    ids = prepare(data, tmp_path).tokens("train").ids
    before, after = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    unigram = entropy(np.bincount(ids.ravel()))
    pairs = np.unique(before * 400 + after, return_counts=True)[1]
    bigram = entropy(pairs) - entropy(np.bincount(before.ravel()))
    source = LANGUAGE.source_entropy(200)
    assert unigram - source > 2.0
    assert unigram > bigram > source
    assert 4.0 < unigram < np.log(362)


def test_a_token_has_the_features_of_every_word_it_touches() -> None:
    document = DOCUMENTS[0]
    words, truth = document.words, document.truth
    ends = list(itertools.accumulate(len(word) + 1 for word in words))
    first, second = len(words[0]), len(words[1])
    spans = [
        (0, first),  # the first word
        (first, first + 1 + second),  # a blank and the second word
        (first, first + 1),  # only a blank
        (0, first + 2),  # the first word and a piece of the second
        (first + 2, first + 1 + second),  # the rest of the second
        (0, ends[-1]),  # everything
        (3, 3),  # nothing
    ]
    expected = [
        truth[0],
        truth[1],
        np.zeros_like(truth[0]),
        truth[0] | truth[1],
        truth[1],
        truth.any(axis=0),
        np.zeros_like(truth[0]),
    ]
    assert (token_truth(document, np.array(spans)) == np.array(expected)).all()


def corpus_of(tokenizer: dict[str, object], folder: Path) -> TokenCorpus:
    corpus = {"kind": "planted", "n_documents": 60}
    data = {"corpus": corpus, "tokenizer": tokenizer, "n_ctx": 16}
    return prepare(Data.model_validate(data), folder)


def test_words_align_with_the_truth_one_to_one(tmp_path: Path) -> None:
    corpus = corpus_of({"kind": "words"}, tmp_path)
    for split in ("train", "score"):
        rows = corpus.tokens(split)
        truth = row_truth(corpus, rows).reshape(rows.ids.size, -1)
        at = {doc_id: 0 for doc_id in range(60)}
        for doc_id, token, found in zip(rows.doc_ids.flat, rows.ids.flat, truth, strict=True):
            document = DOCUMENTS[int(doc_id)]
            place = at[int(doc_id)]
            at[int(doc_id)] += 1
            if place == len(document.words):
                assert token == corpus.tokenizer.eos_token_id and not found.any()
            else:
                assert (found == document.truth[place]).all()


def test_pieces_of_words_have_the_features_of_their_word(tmp_path: Path) -> None:
    corpus = corpus_of({"kind": "bpe", "d_vocab": 300}, tmp_path)
    rows = corpus.tokens("train")
    truth = row_truth(corpus, rows)
    assert truth.shape == (*rows.ids.shape, len(LANGUAGE.features))
    later = type(rows)(rows.ids[5:9], rows.doc_ids[5:9], rows.first_seq_id + 5, rows.split)
    assert (row_truth(corpus, later) == truth[5:9]).all()
    # the tokens of one place name together spell it, and each of them is a place
    shown, place = corpus.vocabulary(), columns(["word_class.place"])[0]
    flat = truth.reshape(-1, truth.shape[-1])[:, place]
    spelled = "".join(
        shown[token] if is_place else "|"
        for token, is_place in zip(rows.ids.flat, flat, strict=True)
    )
    every = set().union(*PLACES.values())
    found = {name.strip() for name in spelled.split("|") if name}
    assert len(found & every) == 16 and len(found) <= 18  # two may be cut by the rows' ends


def test_only_a_planted_corpus_has_a_language(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c d e f g h i j k l m n o p\n\n" * 4)
    corpus = {"kind": "files", "paths": [str(tmp_path / "a.txt")]}
    none = {"val_fraction": 0, "explain_fraction": 0, "score_fraction": 0}
    data = Data.model_validate({"corpus": corpus, "splits": none, "n_ctx": 8}, strict=False)
    with pytest.raises(DataError, match="only a planted corpus.*kind 'files'"):
        planted_language(prepare(data, tmp_path / "cache"))
