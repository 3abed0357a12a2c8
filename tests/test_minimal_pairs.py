"""Minimal pairs in BLiMP's format."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmmono.data.minimal_pairs import MinimalPair, read_minimal_pairs
from lmmono.errors import DataError


def test_a_blimp_json_line_becomes_a_pair_grouped_by_its_uid(tmp_path: Path) -> None:
    row = {
        "sentence_good": "Dogs bark.",
        "sentence_bad": "Dogs barks.",
        "UID": "agreement",
        "pairID": "0",
    }
    (tmp_path / "agreement.jsonl").write_text(json.dumps(row) + "\n")
    pair = MinimalPair("Dogs bark.", "Dogs barks.", "agreement")
    assert read_minimal_pairs(tmp_path / "agreement.jsonl") == [pair]
    assert read_minimal_pairs(tmp_path) == [pair]


def test_a_parquet_without_uid_groups_by_file(tmp_path: Path) -> None:
    table = pa.table({"good": ["A b."], "bad": ["B a."]})
    pq.write_table(table, tmp_path / "order.parquet")
    assert read_minimal_pairs(tmp_path / "order.parquet") == [MinimalPair("A b.", "B a.", "order")]


def test_the_blimp_sample_has_500_pairs_of_each_of_50_paradigms(shared: Path) -> None:
    pairs = read_minimal_pairs(shared / "data" / "lm_blimp")
    sizes = Counter(pair.group for pair in pairs)
    assert len(sizes) == 50 and set(sizes.values()) == {500}


def test_wrong_columns_and_empty_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"x.jsonl:1: want the columns sentence_good.*got text"):
        read_minimal_pairs(tmp_path / "x.jsonl")
    (tmp_path / "y.jsonl").write_text('{"good": "a", "bad": ""}\n')
    with pytest.raises(DataError, match="want two sentences"):
        read_minimal_pairs(tmp_path / "y.jsonl")
    (tmp_path / "z.jsonl").write_text("")
    with pytest.raises(DataError, match="no minimal pairs"):
        read_minimal_pairs(tmp_path / "z.jsonl")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(DataError, match=r"\.jsonl or \.parquet"):
        read_minimal_pairs(tmp_path / "t.txt")
