"""Corpora: every format gives the same documents, and what cannot be read is told exactly."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lmmono.data.corpora import document_count, documents, fingerprint
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


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_every_format_plain_or_compressed_gives_the_same_documents(
    tmp_path: Path, suffix: str, compression: str
) -> None:
    path = tmp_path / f"corpus{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](in_format(suffix)))
    assert texts(files(path)) == TEXTS


def test_names_lead_back_to_the_line_or_row(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl", ".parquet"):
        (tmp_path / f"a{suffix}").write_bytes(in_format(suffix))
    names = [document.name for document in documents(files(tmp_path))]
    assert names == [
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


BAD_FILES = {
    "a.jsonl: broken line": (
        b'{"text": "a"}\n{"text": \n',
        r"a\.jsonl:2: no JSON at column 10",
    ),
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
    (tmp_path / "a.csv").write_text("text\nx")
    with pytest.raises(DataError, match=r"end in '.csv': want .txt, .jsonl, .parquet"):
        texts(files(tmp_path / "a.csv"))
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
