"""Embedding and surprisal: an encoder and a reader that know, and such that do not."""

import re

import numpy as np
import pytest
from explained_store import HOOK, NOISE, ON_CAT, SILENT, planted_store
from sklearn.metrics import roc_auc_score

import activation_store as astore
import lmmono as lm
from lmmono.clients.client import Reading
from lmmono.errors import ExplainError
from lmmono.records.record_reader import RecordReader
from lmmono.registry.scorers import find_scorer
from lmmono.scores.embedding import SentenceEncoder
from lmmono.scores.judging import area_row
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.surprisal import mean_logprob

UNITS = (ON_CAT, SILENT, NOISE)


def bag_of_words(texts):
    counts = np.zeros((len(texts), 41))
    for row, text in zip(counts, texts, strict=True):
        words = re.findall(r"w(\d+)", text)
        row[[int(word) for word in words]] = 1
        row[40] = not words
    return counts


class Reader:
    """Expects a text the more, the more of its words stand before it."""

    name = "reader"

    def complete(self, *_, **__):
        raise AssertionError

    def read(self, texts, **_):
        return [self._read(text) for text in texts]

    def _read(self, text):
        tokens = re.findall(r"\s*\S+|\s+$", text)
        said = set()
        logprobs = [None]
        for before, token in zip(tokens, tokens[1:], strict=False):
            said |= set(re.findall(r"w\d+", before))
            word = re.search(r"w\d+", token)
            logprobs.append(-1.0 if word and word[0] in said else -4.0)
        return Reading(tuple(tokens), tuple(logprobs))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = planted_store(tmp_path_factory.mktemp("embedding") / "run", n_rows=60)
    with astore.open(planted.path, mode="a") as store:
        lm.explain(store, HOOK, units=UNITS)
    return planted


@pytest.fixture
def store(planted):
    with astore.open(planted.path, mode="a") as store:
        yield store


def rows_of(store, scorer, client=None, **settings):
    changes = {"window": 16, "n": 20, **settings}
    settings = find_scorer(scorer).with_settings(changes=changes)
    reader = RecordReader(store)
    job = ScoreJob(store, HOOK, reader, UNITS, settings, explainer="token_lookup", client=client)
    rows = find_scorer(scorer).load()(job)
    return {(row["metric"], row["unit"], row["control"]): row for row in rows}


def test_an_encoder_of_words_finds_the_texts_with_the_word(store):
    rows = rows_of(store, "embedding", encoder=SentenceEncoder("words", bag_of_words))
    assert rows["embedding", ON_CAT, None]["value"] == 1.0
    assert rows["embedding", ON_CAT, None]["details"] == {"encoder": "words"}
    low, high = (
        rows["embedding", ON_CAT, "shuffled_pairing"][end] for end in ("ci_low", "ci_high")
    )
    assert low < 0.5 < high
    assert rows["embedding", SILENT, None]["nan_fraction"] == 1.0
    blind = SentenceEncoder("blind", lambda texts: np.ones((len(texts), 3)))
    assert rows_of(store, "embedding", encoder=blind)["embedding", ON_CAT, None]["value"] == 0.5


def test_an_encoder_is_named_in_stored_rows_and_a_missing_one_is_told(store):
    encoder = SentenceEncoder("words-1", bag_of_words)
    given = {"scorer": "embedding", "units": UNITS, "window": 16, "n": 20}
    lm.score(store, HOOK, encoder=encoder, **given)
    found = store.sql(
        "SELECT DISTINCT preset FROM all_scores WHERE metric = 'embedding'"
    ).fetchall()
    assert found == [("encoder=words-1,n=20,window=16",)]
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(ExplainError, match=r"lmmono\[embed\]"):
            lm.score(store, HOOK, **given)


def test_the_area_of_a_row_is_that_of_scikit_learn_and_missing_records_are_counted(store):
    rng = np.random.default_rng(0)
    firing, other = rng.normal(1, 1, 9), rng.normal(0, 1, 11)
    row = area_row(ScoreJob(store, HOOK, RecordReader(store)), "embedding", 0, firing, other, None)
    truth = np.arange(20) < 9
    assert row["value"] == pytest.approx(roc_auc_score(truth, np.concatenate([firing, other])))
    firing[0] = np.nan
    row = area_row(ScoreJob(store, HOOK, RecordReader(store)), "embedding", 0, firing, other, None)
    assert row["n_failures"] == 1


def test_a_reader_that_expects_what_was_said_before_tells_texts_apart(store):
    rows = rows_of(store, "surprisal", Reader())
    assert rows["surprisal", ON_CAT, None]["value"] > 0.9
    noise = rows["surprisal", NOISE, "random_explanation"]
    assert noise["ci_low"] < 0.6
    assert rows["surprisal", ON_CAT, None]["judge"] == "reader"


def test_a_reading_counts_the_tokens_after_the_prompt_only():
    reading = Reading(("ab", "cd", "ef"), (None, -1.0, -3.0))
    assert mean_logprob(reading, "ab") == -2.0
    assert mean_logprob(reading, "abc") == -3.0, "a token across the border is left out"
    assert np.isnan(mean_logprob(Reading(failure="no_answer"), ""))
