"""Records: which excerpts each kind chooses, and that their activations are the stored ones."""

import numpy as np
import pytest
from explained_store import (
    HOOK,
    N_CTX,
    NOISE,
    ON_CAT,
    OTHER,
    SILENT,
    TWO_DOCUMENTS,
    planted_store,
)
from small_store import HOOK as SMALL_HOOK
from small_store import D, small_store

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.explanations.protocols import PROTOCOLS, Protocol
from lmmono.records import unit_rows
from lmmono.records.corpus_excerpts import PADDING, read_excerpts
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import N_BINS, Counts, read_records, read_token_windows

ALL = Counts(top=6, quantile=10, random=8, firing=4, near_miss=5)
WINDOW = 16


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("records") / "run")


@pytest.fixture(scope="module")
def store(planted):
    with astore.open(planted.path) as store:
        yield store


@pytest.fixture(scope="module")
def excerpts(store):
    return read_excerpts(store, "score", window=WINDOW)


@pytest.fixture(scope="module")
def records(store, excerpts):
    return read_records(store, HOOK, excerpts, ALL)


def dense(acts, excerpts, index, unit):
    """The unit's activations in one excerpt, taken from the array that the store was made from."""
    n, pos = excerpts.lengths[index], excerpts.first_pos[index]
    return acts[excerpts.seq_ids[index], pos : pos + n, unit]


def maxima(planted, excerpts, unit):
    return np.array([dense(planted.acts, excerpts, i, unit).max() for i in range(len(excerpts))])


def test_activations_of_every_record_are_the_stored_ones(planted, excerpts, records):
    n_checked = 0
    for unit, index, acts in zip(records.units, records.index, records.acts, strict=True):
        for excerpt, found in zip(index, acts, strict=True):
            wanted = dense(planted.acts, excerpts, excerpt, unit) if excerpt >= 0 else np.zeros(0)
            assert (found[: len(wanted)] == wanted).all()
            assert not found[len(wanted) :].any()
            n_checked += excerpt >= 0
    assert n_checked > 100


def test_activations_are_right_where_rows_hold_documents_of_both_splits(tmp_path):
    small = small_store(tmp_path / "run")
    with astore.open(small.path) as store:
        excerpts = read_excerpts(store, "explain", window=8, min_tokens=2)
        found = read_records(store, SMALL_HOOK, excerpts, Counts(top=3, random=5))
    for unit in range(D):
        for index, acts in zip(found.index[unit], found.acts[unit], strict=True):
            wanted = dense(small.acts[SMALL_HOOK], excerpts, index, unit)
            assert (acts[: len(wanted)] == wanted).all()
            assert not acts[len(wanted) :].any()


def test_top_records_are_the_strongest_of_each_document_in_order(planted, excerpts, records):
    for unit in (ON_CAT, NOISE):
        largest = maxima(planted, excerpts, unit)
        best = {}
        for index in np.lexsort((np.arange(len(largest)), -largest)):
            best.setdefault(int(excerpts.doc_ids[index]), int(index))
        wanted = [index for index in best.values() if largest[index] > 0][: ALL.top]
        assert records.index[unit][records.columns("top")].tolist() == wanted
        assert records.max_act[unit] == largest.max()


def test_quantile_records_come_from_every_bin_of_the_maximum(planted, excerpts, records):
    largest = maxima(planted, excerpts, NOISE)
    chosen = records.index[NOISE][records.columns("quantile")]
    bins = np.minimum((largest[chosen[chosen >= 0]] / largest.max() * N_BINS).astype(int), 9)
    firing = largest[largest > 0]
    filled = np.unique(np.minimum((firing / largest.max() * N_BINS).astype(int), 9))
    assert sorted(bins) == filled.tolist(), "one from each bin that is not empty"
    assert (np.diff(bins) < 0).all(), "the strongest bin first"


def test_firing_records_fire_and_near_misses_hold_the_token_in_silence(planted, excerpts, records):
    largest = maxima(planted, excerpts, NOISE)
    firing = records.index[NOISE][records.columns("firing")]
    assert (largest[firing] > 0).all()
    mass = np.zeros(planted.token_ids.max() + 1)
    mine = planted.rows("score")
    np.add.at(mass, planted.token_ids[mine], planted.acts[mine, :, NOISE])
    near = records.index[NOISE][records.columns("near_miss")]
    near = near[near >= 0]
    assert len(near)
    assert (largest[near] == 0).all()
    assert (excerpts.token_ids[near] == mass.argmax()).any(axis=1).all()
    on_cat = records.index[ON_CAT][records.columns("near_miss")]
    assert (on_cat == -1).all(), "an exact unit never misses its token"


def test_random_records_are_drawn_whether_the_unit_fires_or_not(store, excerpts):
    many = read_records(store, HOOK, excerpts, Counts(random=len(excerpts)))
    for index in many.index:
        assert sorted(index) == list(range(len(excerpts))), "all of them, each once"
    assert (many.index[ON_CAT] != many.index[NOISE]).any(), "every unit has draws of its own"
    again = read_records(store, HOOK, excerpts, Counts(random=len(excerpts)), seed=1)
    assert (again.index != many.index).any()


def test_a_silent_unit_has_random_records_only(records):
    assert records.max_act[SILENT] == 0
    assert records.n_records("top", "quantile", "firing", "near_miss")[SILENT] == 0
    assert records.n_records("random")[SILENT] == ALL.random


def test_a_unit_with_too_few_records_has_as_many_as_there_are(planted, excerpts, records):
    docs = excerpts.doc_ids[np.flatnonzero(maxima(planted, excerpts, TWO_DOCUMENTS) > 0)]
    assert records.n_records("top")[TWO_DOCUMENTS] == len(set(docs)) == 2
    missing = records.index[TWO_DOCUMENTS] == -1
    assert not records.acts[TWO_DOCUMENTS][missing].any()
    assert (records.token_ids(TWO_DOCUMENTS)[missing] == PADDING).all()
    assert (records.all_token_ids()[TWO_DOCUMENTS] == records.token_ids(TWO_DOCUMENTS)).all()


def test_a_units_records_do_not_depend_on_other_units_kinds_or_memory(
    store, excerpts, records, monkeypatch
):
    monkeypatch.setattr(unit_rows, "ROWS_AT_ONCE", 1)
    for units in ([NOISE], [ON_CAT, NOISE], [SILENT, NOISE]):
        some = read_records(store, HOOK, excerpts, ALL, units=units)
        assert some.units.tolist() == units
        assert (some.index == records.index[units]).all()
        assert (some.acts == records.acts[units]).all()
    only = read_records(store, HOOK, excerpts, Counts(random=8))
    assert (only.index == records.index[:, records.columns("random")]).all()


def test_records_of_the_two_splits_share_no_document(store):
    reader = RecordReader(store)
    docs = [
        set(records.excerpts.doc_ids[records.index[records.index >= 0]])
        for records in (
            reader.records(HOOK, split, ALL, window=WINDOW) for split in ("explain", "score")
        )
    ]
    assert docs[0] and docs[1] and not docs[0] & docs[1]


def test_a_hook_is_read_once_however_often_it_is_asked_for(store, monkeypatch):
    reader = RecordReader(store)
    first = reader.records(HOOK, "score", ALL)
    assert reader.records(HOOK, "score", ALL) is first
    assert reader.records(OTHER, "score", ALL) is not first


def test_openai_takes_every_fourth_top_record_and_every_third_random_one(store):
    reader, openai = RecordReader(store), PROTOCOLS["openai"]
    whole = reader.records(HOOK, "score", Counts(top=19, random=14))
    valid = reader.ranked(HOOK, "score", openai.score)
    assert valid.kinds == ("top",) * 5 + ("random",) * 5
    chosen = [2, 6, 10, 14, 18] + [19 + rank for rank in (1, 4, 7, 10, 13)]
    assert (valid.index == whole.index[:, chosen]).all()
    assert openai.explain == {"top": (0, 4, 8, 12, 16)}


def test_the_protocol_of_crate_lm_takes_turns_in_one_list():
    crate: Protocol = PROTOCOLS["openai_crate"]
    assert crate.explain == {"top": (0, 2, 4, 6, 8)}
    assert crate.score == {"top": (1, 3, 5, 7, 9), "random": (0, 2, 4, 6, 8)}
    assert crate.explain_split == crate.score_split
    assert crate.window == 64


def test_token_windows_surround_the_strongest_tokens_across_documents(planted, store, excerpts):
    found = read_token_windows(store, HOOK, excerpts.grid, Counts(top=4, random=3), window=10)
    mine = planted.rows("score")
    flat_ids = planted.token_ids[mine].reshape(-1)
    acts = planted.acts[mine, :, NOISE].reshape(-1)
    for rank, at in enumerate(np.lexsort((np.arange(len(acts)), -acts))[:4]):
        cells = np.arange(max(at - 5, 0), min(at + 5, len(acts)))
        ids = found.token_ids(NOISE)[rank]
        assert (ids[: len(cells)] == flat_ids[cells]).all()
        assert (ids[len(cells) :] == PADDING).all()
        assert (found.acts[NOISE][rank][: len(cells)] == acts[cells]).all()
    assert found.kinds == ("top",) * 4 + ("random",) * 3
    crossing = found.excerpts.first_cells % N_CTX > N_CTX - 10
    assert crossing.any(), "some window runs on into the next row"
    with pytest.raises(ExplainError, match="top and random only"):
        read_token_windows(store, HOOK, excerpts.grid, Counts(firing=1))


def test_what_cannot_be_read_is_named(store, excerpts):
    with pytest.raises(ExplainError, match="'nope' is not stored as rows; stored so: blocks.0"):
        read_records(store, "nope", excerpts, ALL)
    with pytest.raises(ExplainError, match="want units 0 to 5, got 2 to 6"):
        read_records(store, HOOK, excerpts, ALL, units=[2, 6])
