"""Corpora: every format gives the same documents, and what cannot be read is told exactly."""

import csv
import gzip
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmmono.data.corpora import document_count, documents, fingerprint, reading_notes
from lmmono.errors import DataError
from lmmono.recipe.sections import FilesCorpus, HubCorpus, PlantedCorpus

TEXTS = ["The cat sat.\nOn a mat.", "Grüße, 世界 🌍!", "third"]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def in_format(suffix: str) -> bytes:
    """The three texts as the bytes of one file."""
    if suffix == ".txt":
        return "\n\n \n".join(TEXTS).encode()
    if suffix == ".json":
        return json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}).encode()
    if suffix in (".csv", ".tsv"):
        table = StringIO()
        writer = csv.writer(table, delimiter="," if suffix == ".csv" else "\t")
        writer.writerows([("n", "text"), *enumerate(TEXTS)])
        return table.getvalue().encode("utf-8-sig")
    if suffix == ".jsonl":
        return "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), sink)
    return sink.getvalue().to_pybytes()


def files(*paths: Path | str, **settings: object) -> FilesCorpus:
    return FilesCorpus.model_validate(
        {"kind": "files", "paths": tuple(map(str, paths)), **settings}, strict=False
    )


def texts(corpus: FilesCorpus | HubCorpus | PlantedCorpus) -> list[str]:
    return [document.text for document in documents(corpus)]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_format_plain_or_compressed_gives_the_same_documents(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = tmp_path / f"corpus{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](in_format(suffix)))
    assert texts(files(path)) == TEXTS


def test_names_lead_back_to_the_line_or_row(tmp_path: Path) -> None:
    for suffix in (".txt", ".csv", ".json", ".jsonl", ".parquet"):
        (tmp_path / f"a{suffix}").write_bytes(in_format(suffix))
    names = [document.name for document in documents(files(tmp_path))]
    assert names == [
        *("a.csv:2", "a.csv:4", "a.csv:5"),  # the first text has two lines
        *("a.json:0", "a.json:1", "a.json:2"),
        *("a.jsonl:1", "a.jsonl:2", "a.jsonl:3"),
        *("a.parquet:0", "a.parquet:1", "a.parquet:2"),
        *("a.txt:1", "a.txt:5", "a.txt:8"),
    ]


def test_folders_and_globs_are_read_in_sorted_order_and_no_file_twice(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "c.txt", "b/1.txt", ".hidden.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(files(tmp_path)) == ["a.txt", "b/1.txt", "b/2.txt", "c.txt"]
    assert texts(files(tmp_path / "b" / "*.txt", tmp_path)) == [
        "b/1.txt",
        "b/2.txt",
        "a.txt",
        "c.txt",
    ]
    assert texts(files(tmp_path / "**" / "*.txt"))[-1] == "c.txt"


def test_max_documents_stops_reading(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(in_format(".jsonl") + b"broken\n")
    assert texts(files(tmp_path / "a.jsonl", max_documents=2)) == TEXTS[:2]


def test_the_count_is_known_where_the_files_say_it(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(in_format(".parquet"))
    assert document_count(files(tmp_path)) == 3
    assert document_count(files(tmp_path, max_documents=2)) == 2
    (tmp_path / "b.txt").write_text("x")
    assert document_count(files(tmp_path)) is None
    assert document_count(PlantedCorpus(n_documents=7)) == 7


def test_a_fingerprint_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("z" if folder == "z" else "same")
    x, y, z = (fingerprint(files(tmp_path / folder)) for folder in ("x", "y", "z"))
    assert x == y != z
    assert fingerprint(files(tmp_path / "x", text_column="body")) != x


def test_null_text_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "b"}\n')
    assert texts(files(tmp_path)) == ["", "b"]


def saved(folder: Path, rows: dict[str, list[object]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return folder


def test_a_folder_of_save_to_disk_is_read_as_files_and_as_a_dataset(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", {"n": [1, 2, 3], "text": [*TEXTS]})
    for corpus in (files(folder), hub(folder)):
        assert texts(corpus) == TEXTS
        assert [document.name for document in documents(corpus)] == ["set:0", "set:1", "set:2"]
    same = saved(tmp_path / "x" / "set", {"n": [1, 2, 3], "text": [*TEXTS]})
    other = saved(tmp_path / "y" / "set", {"n": [1, 2, 3], "text": ["a", "b", "c"]})
    prints = [fingerprint(files(path)) for path in (folder, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert fingerprint(hub(folder)) != fingerprint(hub(other))
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    saved(splits / "a", {"text": ["one"]})
    saved(splits / "b", {"text": ["two"]})
    assert texts(files(splits)) == ["one", "two"]
    assert texts(hub(splits, split="b")) == ["two"]
    with pytest.raises(DataError, match="no split 'train'; known: a, b"):
        texts(hub(splits))


WHOLE = "one two\nthree\n\nfour\n"


def test_a_text_file_is_one_document_or_one_per_line_or_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(WHOLE)
    by = {split: files(tmp_path, split=split) for split in ("file", "line", "blank_line")}
    assert texts(by["file"]) == ["one two\nthree\n\nfour"]
    assert texts(by["line"]) == ["one two", "three", "four"]
    assert texts(by["blank_line"]) == ["one two\nthree", "four"]
    assert [d.name for d in documents(by["line"])] == ["a.txt:1", "a.txt:2", "a.txt:4"]
    assert len({json.dumps(fingerprint(corpus)) for corpus in by.values()}) == 3


AUTO = {
    "blank lines part documents": ({"a.txt": WHOLE}, "at blank lines .* 2 documents; 3 by line"),
    "long lines are documents": ({"a.txt": ("w " * 60 + "\n") * 4}, "at lines .* 4 documents"),
    "wrapped lines are none": ({"a.txt": "some words\n" * 9}, "1 .txt file is not split .* 9 by"),
    "files are documents": ({"a.txt": "a", "b.txt": "b"}, "2 .txt files are not split"),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_says_how_text_files_are_split(tmp_path: Path, case: str) -> None:
    contents, message = AUTO[case]
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    (note,) = reading_notes(files(tmp_path))
    assert re.search(message, note), note
    assert f": {len(texts(files(tmp_path)))} document" in note


def test_the_text_column_is_guessed_where_there_is_one_candidate(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,stars,body,label\n1,5,It is good,pos\n2,1,It is bad,neg\n")
    assert texts(files(path)) == ["It is good", "It is bad"]
    assert reading_notes(files(path)) == ["text is read from column 'body'"]
    path.write_text("id;stars;body\n1;4,5;x\n")  # where a comma is the decimal point
    assert texts(files(path, text_column="body")) == ["x"]
    path.write_text("title,body\nA film,It is good\n")
    with pytest.raises(
        DataError,
        match="2 columns of text among 'title', 'body'; name .* as data.corpus.text_column",
    ):
        texts(files(path))
    (tmp_path / "b.jsonl").write_text('{"id": 1, "n": 2}\n')
    with pytest.raises(DataError, match="no column of text among 'id', 'n'"):
        texts(files(tmp_path / "b.jsonl"))


BAD_FILES = {
    "a.csv: no column": (b"n,txt\n1,a\n", r"a\.csv: no column 'text'; .* 'n', 'txt'"),
    "a.csv: short row": (b"n,text\n1,a\n2\n", r"a\.csv:3: want 2 columns, got 1"),
    "a.csv: open quote": (b'n,text\n1,"a\n', r"a\.csv:2: no readable CSV: unexpected end"),
    "a.csv: twice": (b"text,text\n1,a\n", r"a\.csv:1: column 'text' stands twice"),
    "a.csv: no UTF-8": (b"n,text\n1,caf\xe9\n", r"a\.csv:2: byte 12 \(0xE9\) is no UTF-8"),
    "a.json: no JSON": (b'[{"text": "a"},\n{"text": \n', r"a\.json:3: no JSON"),
    "a.json: no list": (b'{"text": "a"}', r"a\.json: want a list of objects, got dict"),
    "a.json: no object": (b'["a"]', r"a\.json: item 0: want an object, got str"),
    "a.json: no column": (b'[{"txt": "a"}]', r"item 0: no column 'text'; .* did you mean txt"),
    "a.jsonl: broken line": (
        b'{"text": "a"}\n{"text": \n',
        r"a\.jsonl:2: no JSON at column 10",
    ),
    "a.jsonl: deep": (b'{"text": "a"}\n' + b"[" * 99_999, r"a\.jsonl:2: no JSON: nested too deep"),
    "a.jsonl: digits": (b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: no JSON: .*more digits"),
    "a.json: digits": (b'[{"text": ' + b"9" * 5000 + b"}]", r"a\.json: no JSON: .*more digits"),
    "a.jsonl: no object": (b'["text"]\n', r"a\.jsonl:1: want a JSON object, got list"),
    "a.jsonl: no column": (
        b'{"txt": "a", "title": ""}\n',
        r"a\.jsonl:1: no column 'text'; it has 'txt', 'title'; did you mean txt",
    ),
    "a.jsonl: no text": (b'{"text": 5}\n', r"a\.jsonl:1: want text in 'text', got int"),
    "a.jsonl: half a character": (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: .*U\+D800"),
    "a.txt: no UTF-8": (b"good line\n\nbad \xff line\n", r"a\.txt:3: byte 15 \(0xFF\)"),
    "a.parquet: no Parquet": (b"PAR1 nonsense", r"a\.parquet: no readable Parquet"),
    "a.parquet: no column": (in_format(".parquet"), r"no column 'body'; it has 'n', 'text'"),
    "a.txt.gz: truncated": (gzip.compress(b"text " * 999)[:-12], r"a\.txt\.gz: .*gzip"),
    "a.txt.zst: truncated": (
        zstandard.ZstdCompressor().compress(in_format(".txt") * 99)[:-9],
        r"a\.txt\.zst: .*zstd",
    ),
    "a.txt.gz: not gzip": (b"plain text", r"a\.txt\.gz: cannot be read as gzip"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_file_is_an_error_that_names_the_place(tmp_path: Path, case: str) -> None:
    name = case.partition(":")[0]
    content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    column = "body" if "body" in message else "text"
    with pytest.raises(DataError, match=message):
        texts(files(tmp_path / name, text_column=column))


def test_a_parquet_column_that_is_no_utf8_is_an_error(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"rows 0 to 1 hold text that is no UTF-8.*0xFF"):
        texts(files(tmp_path / "a.parquet"))


def test_a_path_that_is_not_there_is_an_error_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "stories.txt").write_text("x")
    with pytest.raises(DataError, match="no file or folder 'story.txt'.*did you mean stories.txt"):
        texts(files(tmp_path / "story.txt"))
    with pytest.raises(DataError, match="missing or empty"):
        texts(files(tmp_path / "nowhere" / "a.txt"))
    with pytest.raises(DataError, match="no file matches"):
        texts(files(tmp_path / "*.jsonl"))


def test_an_unknown_suffix_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.doc").write_text("text\nx")
    with pytest.raises(DataError, match=r"end in '.doc': want .txt, .csv, .tsv, .json, .jsonl"):
        texts(files(tmp_path / "a.doc"))
    with pytest.raises(DataError, match="holds no file to read"):
        texts(files(tmp_path))


def hub(name: Path | str, **settings: object) -> HubCorpus:
    return HubCorpus.model_validate({"kind": "hub", "name": str(name), **settings})


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub and no cache of this machine."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_folder_is_read_through_datasets(tmp_path: Path, streaming: bool) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(in_format(".parquet"))
    corpus = hub(folder, streaming=streaming)
    assert texts(corpus) == TEXTS
    assert [document.name for document in documents(corpus)] == ["set:0", "set:1", "set:2"]
    assert texts(hub(folder, streaming=streaming, max_documents=1)) == TEXTS[:1]


@pytest.mark.usefixtures("offline")
def test_a_hub_fingerprint_follows_the_bytes_of_a_folder(tmp_path: Path) -> None:
    prints: list[object] = []
    for parent, content in (("x", b"a\nb"), ("y", b"a\nb"), ("z", b"a\nc")):
        folder = tmp_path / parent / "set"
        folder.mkdir(parents=True)
        (folder / "train.txt").write_bytes(content)
        prints.append(fingerprint(hub(folder)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.usefixtures("offline")
def test_what_a_hub_dataset_lacks_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(in_format(".parquet"))
    with pytest.raises(DataError, match="no column 'texts'.*did you mean text"):
        texts(hub(folder, text_column="texts"))
    with pytest.raises(DataError, match="split nope"):
        texts(hub(folder, split="nope"))
    with pytest.raises(DataError, match="want text, got int"):
        texts(hub(folder, text_column="n"))
    with pytest.raises(DataError, match="dataset nobody/nothing.*check its name"):
        texts(hub("nobody/nothing"))


def test_importing_the_corpora_does_not_import_datasets() -> None:
    import subprocess
    import sys

    code = "import sys, lmmono.data.corpora; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
