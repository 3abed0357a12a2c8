"""Excerpts: windows of one document, each once, of one split."""

import numpy as np
import pytest
from explained_store import N_CTX, planted_store
from small_store import small_store, split

import activation_store as astore
from lmmono.errors import ExplainError
from lmmono.records.corpus_excerpts import PADDING, TokenGrid, cut, read_excerpts


def pieces_by_hand(token_ids, doc_ids, wanted, window, min_tokens):
    """(row, first position, tokens) of every excerpt, cut one token after the other."""
    found, seen = [], set()
    for row in range(len(token_ids)):
        piece: list[int] = []
        for pos in range(token_ids.shape[1] + 1):
            ends = pos == token_ids.shape[1]
            new_document = not ends and pos > 0 and doc_ids[row, pos] != doc_ids[row, pos - 1]
            if piece and (ends or new_document or len(piece) == window):
                if len(piece) >= min_tokens and tuple(piece) not in seen:
                    found.append((row, pos - len(piece), tuple(piece)))
                seen.add(tuple(piece))
                piece = []
            if not ends and wanted(doc_ids[row, pos]):
                piece.append(int(token_ids[row, pos]))
    return found


def as_pieces(excerpts):
    return [
        (int(seq), int(pos), tuple(ids[:n].tolist()))
        for seq, pos, ids, n in zip(
            excerpts.seq_ids, excerpts.first_pos, excerpts.token_ids, excerpts.lengths, strict=True
        )
    ]


@pytest.mark.parametrize(("window", "min_tokens"), [(16, 1), (5, 1), (4, 3), (64, 8)])
@pytest.mark.parametrize("name", ["explain", "score"])
def test_excerpts_are_those_cut_by_hand_where_rows_mix_documents_of_both_splits(
    tmp_path, name, window, min_tokens
):
    small = small_store(tmp_path / "run")
    with astore.open(small.path) as store:
        excerpts = read_excerpts(store, name, window=window, min_tokens=min_tokens)
    wanted = pieces_by_hand(
        small.token_ids, small.doc_ids, lambda doc: split(doc) == name, window, min_tokens
    )
    assert as_pieces(excerpts) == wanted
    assert excerpts.split == name
    assert (excerpts.doc_ids % 2 == (name == "explain")).all()


def test_excerpts_of_a_captured_store_are_those_cut_by_hand(tmp_path):
    planted = planted_store(tmp_path / "run")
    with astore.open(planted.path) as store:
        splits = {name: read_excerpts(store, name, window=16) for name in ("explain", "score")}
    for name, excerpts in splits.items():
        mine = planted.rows(name)
        rows, docs = planted.token_ids[mine], planted.doc_ids[mine]
        by_hand = pieces_by_hand(rows, docs, lambda doc: True, 16, 8)
        assert as_pieces(excerpts) == [(row + mine.start, pos, ids) for row, pos, ids in by_hand]
    both = set(splits["explain"].doc_ids) & set(splits["score"].doc_ids)
    assert not both, "a document explains and scores"


def test_the_same_tokens_make_one_excerpt_and_short_ends_none():
    token_ids = np.array([1, 2, 3, 4, 1, 2, 3, 4, 1, 2], np.int32)
    doc_ids = np.zeros(10, np.int64)
    excerpts = cut(TokenGrid("score", np.array([0]), 10, token_ids, doc_ids), 4, 3)
    assert excerpts.token_ids.tolist() == [[1, 2, 3, 4]]


def test_every_token_of_an_excerpt_is_in_it_and_no_other_token_is(tmp_path):
    planted = planted_store(tmp_path / "run")
    with astore.open(planted.path) as store:
        excerpts = read_excerpts(store, "score", window=16)
    owner = excerpts.of_cells()
    assert (np.bincount(owner[owner >= 0]) == excerpts.lengths).all()
    for number in range(len(excerpts)):
        cells = np.flatnonzero(owner == number)
        ids = excerpts.token_ids[number]
        assert (excerpts.grid.token_ids[cells] == ids[ids != PADDING]).all()


def test_a_split_that_was_not_captured_is_named_with_those_that_were(tmp_path):
    planted = planted_store(tmp_path / "run", n_rows=2)
    with astore.open(planted.path) as store:
        with pytest.raises(ExplainError, match="no tokens of split 'val'; it has explain, score"):
            read_excerpts(store, "val")
        with pytest.raises(ExplainError, match=f"no excerpt of {N_CTX + 1} tokens"):
            read_excerpts(store, "score", window=99, min_tokens=N_CTX + 1)
