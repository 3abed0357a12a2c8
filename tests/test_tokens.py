"""Prepared corpora: packed exactly, cached by content, whole or not at all."""

import errno
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from lmmono.data import tokens as tokens_module
from lmmono.data.corpora import documents
from lmmono.data.packing import RowFile, id_dtype
from lmmono.data.splits import split_of
from lmmono.data.tokens import TokenCorpus, TokenRows, prepare
from lmmono.errors import DataError
from lmmono.recipe.sections import Data
from lmmono.types import SPLITS

PLANTED = Data.model_validate({"corpus": {"kind": "planted", "n_documents": 150}, "n_ctx": 32})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache: Path) -> TokenCorpus:
    return prepare(PLANTED, cache)


def text_data(folder: Path, texts: list[str], **settings: object) -> Data:
    """Settings for a corpus of JSON lines with one document per text, all for training."""
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "texts.jsonl").write_text("".join(lines))
    return Data.model_validate_json(
        json.dumps(
            {
                "corpus": {"kind": "files", "paths": [str(folder)]},
                "splits": {"val_fraction": 0, "explain_fraction": 0, "score_fraction": 0},
                "n_ctx": 4,
                **settings,
            }
        )
    )


def stream(rows: TokenRows) -> list[int]:
    return rows.ids.ravel().tolist()


def test_rows_are_the_documents_end_to_end_with_only_the_last_row_dropped(
    corpus: TokenCorpus,
) -> None:
    end = corpus.tokenizer.eos_token_id
    texts = [document.text for document in documents(PLANTED.corpus)]
    for split in SPLITS:
        rows = corpus.tokens(split)
        expected: list[tuple[int, int]] = []
        for doc_id, text in enumerate(texts):
            if split_of(text, PLANTED.splits) == split:
                ids = [*corpus.tokenizer(text)["input_ids"], end]
                expected += [(i, doc_id) for i in ids]
        n_whole = len(expected) // 32 * 32
        assert (
            list(zip(stream(rows), rows.doc_ids.ravel().tolist(), strict=True))
            == (expected[:n_whole])
        )
        facts = corpus.facts[split]
        assert facts["n_tokens"] == len(expected)
        assert facts["n_tokens_dropped"] == len(expected) - n_whole
        assert rows.ids.dtype == np.uint16 and rows.doc_ids.dtype == np.int32
        assert isinstance(rows.ids, np.memmap)


def test_every_document_has_one_row_in_the_table(corpus: TokenCorpus) -> None:
    table = corpus.documents.to_pydict()
    assert list(table) == ["doc_id", "split", "name", "text_sha256", "n_tokens"]
    assert table["doc_id"] == list(range(150))
    assert table["name"][:2] == ["planted:0", "planted:1"]
    for split in SPLITS:
        sizes = [n for s, n in zip(table["split"], table["n_tokens"], strict=True) if s == split]
        assert sum(sizes) == corpus.facts[split]["n_tokens"]
        assert len(sizes) == corpus.facts[split]["n_documents"]


def test_seq_ids_are_unique_over_splits_and_count_rows(corpus: TokenCorpus) -> None:
    seq_ids = np.concatenate([corpus.tokens(split).seq_ids for split in SPLITS])
    assert seq_ids.tolist() == list(range(len(seq_ids)))


def test_a_limit_takes_whole_rows(corpus: TokenCorpus) -> None:
    rows = corpus.tokens("train")
    assert len(rows.limit(100)) == 3 and rows.limit(None) is rows
    assert rows.limit(rows.ids.size) is rows
    with pytest.raises(DataError, match="allow at least 32"):
        rows.limit(31)


def test_a_limit_draws_rows_of_the_whole_split_and_a_larger_one_keeps_them(corpus: TokenCorpus):
    rows = corpus.tokens("train")
    few, more = rows.limit(10 * 32), rows.limit(20 * 32)
    assert set(few.seq_ids) < set(more.seq_ids) <= set(rows.seq_ids)
    assert (np.diff(more.seq_ids) > 0).all() and more.seq_ids[-1] > len(rows) // 2
    place = few.seq_ids - rows.first_seq_id
    assert np.array_equal(few.ids, rows.ids[place])
    assert np.array_equal(few.doc_ids, rows.doc_ids[place])
    assert few.n_documents > rows[:10].n_documents  # the first ten rows hold few documents
    assert not np.array_equal(rows.limit(10 * 32, seed=1).seq_ids, few.seq_ids)
    assert np.array_equal(few[2:5].seq_ids, few.seq_ids[2:5])


@pytest.mark.parametrize("name", ["train.ids.npy", "val.doc_ids.npy", "documents.parquet"])
def test_a_prepared_corpus_with_other_bytes_is_refused(tmp_path: Path, name: str):
    made = prepare(PLANTED, tmp_path)
    path = made.dir / name
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(bytes(whole))
    assert made.verify() == [f"{path}: other bytes than were written (sha256 differs)"]
    with pytest.raises(DataError, match=f"{name}: other bytes .*; delete .* and prepare"):
        prepare(PLANTED, tmp_path)


def test_the_second_call_opens_what_the_first_made(
    corpus: TokenCorpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "_write", None)
    again = prepare(PLANTED, cache)
    assert (again.dir, again.digest) == (corpus.dir, corpus.digest)
    assert again.dir == cache / corpus.digest[:16]
    assert again.section == PLANTED


def test_equal_settings_give_equal_bits_elsewhere(corpus: TokenCorpus, tmp_path: Path) -> None:
    again = prepare(PLANTED, tmp_path)
    for path in sorted(corpus.dir.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again.dir / path.relative_to(corpus.dir)).read_bytes()


def test_the_digest_follows_settings_and_bytes_and_not_the_place(tmp_path: Path) -> None:
    texts = ["a b c d e f g h"] * 4
    x = prepare(text_data(tmp_path / "x", texts), tmp_path / "cache")
    y = prepare(text_data(tmp_path / "y", texts), tmp_path / "cache")
    z = prepare(text_data(tmp_path / "x", [*texts, "z"]), tmp_path / "cache")
    n = prepare(text_data(tmp_path / "y", texts, n_ctx=8), tmp_path / "cache")
    assert x.digest == y.digest
    assert len({x.digest, z.digest, n.digest}) == 3


def test_a_document_shorter_than_the_context_shares_its_row(tmp_path: Path) -> None:
    corpus = prepare(text_data(tmp_path / "x", ["a", "b a", "c"], n_ctx=7), tmp_path)
    rows = corpus.tokens("train")
    shown = corpus.vocabulary()
    assert [shown[i] for i in stream(rows)] == [
        *(" a", "<|endoftext|>"),
        *(" b", " a", "<|endoftext|>"),
        *(" c", "<|endoftext|>"),
    ]
    assert rows.doc_ids.tolist() == [[0, 0, 1, 1, 1, 2, 2]]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    corpus = prepare(text_data(tmp_path / "x", ["a b c", " \n", "", "d"], n_ctx=2), tmp_path)
    assert corpus.documents.num_rows == 2
    assert json.loads((corpus.dir / "corpus.json").read_text())["empty_documents"] == 2


@pytest.mark.parametrize("kind", [{"kind": "words"}, {"kind": "bpe", "d_vocab": 257}])
def test_a_literal_end_of_text_in_a_document_ends_nothing(
    tmp_path: Path, kind: dict[str, object]
) -> None:
    texts = ["x <|endoftext|> y", "z", "a tail that fills the last row"]
    corpus = prepare(text_data(tmp_path / "x", texts, tokenizer=kind), tmp_path)
    rows = corpus.tokens("train")
    ends = np.flatnonzero(rows.ids.ravel() == corpus.tokenizer.eos_token_id)
    lengths = corpus.documents["n_tokens"].to_pylist()
    assert ends[:2].tolist() == [lengths[0] - 1, lengths[0] + lengths[1] - 1]


def test_an_empty_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="corpus is empty: 2 documents read"):
        prepare(text_data(tmp_path / "x", ["", " "]), tmp_path)
    assert not list(tmp_path.glob("*/corpus.json"))


def test_too_little_text_to_train_on_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'train' fills no row of 64.*1 documents with 3 tokens"):
        prepare(text_data(tmp_path / "x", ["a b"], n_ctx=64), tmp_path)


def test_a_split_without_rows_is_an_error_only_when_asked_for(tmp_path: Path) -> None:
    corpus = prepare(text_data(tmp_path / "x", ["a b c d e"]), tmp_path)
    assert len(corpus.tokens("train")) == 1
    with pytest.raises(DataError, match=r"'val' fills no row.*0 documents.*val_fraction"):
        corpus.tokens("val")


def test_a_folder_that_is_no_prepared_corpus_is_an_error(
    corpus: TokenCorpus, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="is no prepared corpus"):
        TokenCorpus(tmp_path)
    shutil.copytree(corpus.dir, tmp_path / "other")
    facts = json.loads((corpus.dir / "corpus.json").read_text())
    (tmp_path / "other" / "corpus.json").write_text(json.dumps(facts | {"format": 0}))
    with pytest.raises(DataError, match="want a corpus of format 3, got 0"):
        TokenCorpus(tmp_path / "other")
    (tmp_path / "other" / "corpus.json").write_text("{")
    with pytest.raises(DataError, match="corpus.json: damaged.*delete"):
        TokenCorpus(tmp_path / "other")


def test_a_full_disk_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(DataError, match="cannot write.*No space left.*free space"):
        prepare(PLANTED, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    monkeypatch.undo()
    assert len(prepare(PLANTED, tmp_path).tokens("train")) > 0


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_call_cleans_up_after_itself(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    def interrupt(what: str, done: int, total: int, **facts: float) -> None:
        raise stop

    with pytest.raises(stop):
        prepare(PLANTED, tmp_path, interrupt)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_call_left_is_thrown_away(corpus: TokenCorpus, tmp_path: Path) -> None:
    left = tmp_path / f"{corpus.digest[:16]}.tmp"
    shutil.copytree(corpus.dir, left)
    (left / "train.ids.npy").write_bytes(b"half")
    assert stream(prepare(PLANTED, tmp_path).tokens("train")) == stream(corpus.tokens("train"))
    assert not left.exists()


def prepare_and_report(cache_dir: Path, queue: "multiprocessing.Queue[tuple[str, int]]") -> None:
    calls: list[str] = []
    made = prepare(PLANTED, cache_dir, lambda what, done, total, **facts: calls.append(what))
    queue.put((made.digest, len(calls)))


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=prepare_and_report, args=(tmp_path, queue)) for _ in "ab"]
    for worker in workers:
        worker.start()
    (one, calls_one), (two, calls_two) = queue.get(timeout=120), queue.get(timeout=120)
    for worker in workers:
        worker.join()
    assert one == two and min(calls_one, calls_two) == 0 < max(calls_one, calls_two)


def test_ids_take_two_bytes_up_to_65536_tokens_and_four_above() -> None:
    assert id_dtype(2**16) == np.uint16 and id_dtype(2**16 + 1) == np.uint32


def chunks(total: int) -> Iterator[int]:
    rng = np.random.default_rng(0)
    while total > 0:
        yield (size := min(total, int(rng.integers(0, 50))))
        total -= size


def test_a_growing_row_file_reads_back_as_one_array(tmp_path: Path) -> None:
    values = np.arange(1000, dtype=np.uint32)
    file = RowFile(tmp_path / "x.npy", 7, np.dtype(np.uint32))
    start = 0
    for size in chunks(len(values)):
        file.append(values[start : start + size])
        start += size
    file.finish()
    file.close()
    loaded = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert loaded.shape == (142, 7) and file.n_left == 6
    assert loaded.ravel().tolist() == values[:994].tolist()


@pytest.mark.slow
def test_wikipedia_with_its_own_bpe_is_read_and_packed(shared: Path, tmp_path: Path) -> None:
    data = Data.model_validate_json(
        json.dumps(
            {
                "corpus": {
                    "kind": "files",
                    "paths": [str(shared / "data" / "lm_wikipedia_en" / "articles.parquet")],
                    "max_documents": 200,
                },
                "tokenizer": {"kind": "bpe", "d_vocab": 1024},
            }
        )
    )
    corpus = prepare(data, tmp_path)
    assert corpus.documents.num_rows == 200
    first = next(documents(data.corpus))
    n_tokens = corpus.documents["n_tokens"][0].as_py()
    rows = corpus.tokens(split_of(first.text, data.splits))
    assert corpus.tokenizer.decode(stream(rows)[: n_tokens - 1]) == first.text
