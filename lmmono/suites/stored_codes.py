"""Codes of texts in a file of their own, `features.duckdb`: texts are encoded once, whoever asks.

    texts          text_id, text_sha256, n_tokens, split     one row per text
    codes          code_id, digest, hook, pooling, ...       one row per code: what it is of
    code_vectors   code_id, text_id, vector                  one row per text and code

It is a plain DuckDB file, no activation store: a text has one vector, and no tokens. A text is
known by the SHA-256 of its characters, so sets that share texts share their codes. Rows are
committed as they are computed, so a call that was killed costs the texts after its last commit.
"""

import hashlib
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from lmmono.errors import RobustnessError
from lmmono.suites.text_codes import ProbedCode, TextCodes, TextEncoder

COMMIT_TEXTS = 2048
"""Texts between commits."""

_SCHEMA = """
CREATE TABLE texts (text_id BIGINT, text_sha256 VARCHAR, n_tokens INTEGER, split VARCHAR);
COMMENT ON TABLE texts IS 'Texts of tasks that were encoded; the texts themselves are not kept.';
COMMENT ON COLUMN texts.text_sha256 IS 'SHA-256 of the characters, UTF-8.';
COMMENT ON COLUMN texts.n_tokens IS 'Tokens that were read, after the cut at the context''s end.';
COMMENT ON COLUMN texts.split IS 'Part of the task that the text first stood in.';
CREATE TABLE codes (code_id INTEGER, digest VARCHAR, hook VARCHAR, pooling VARCHAR, family VARCHAR,
    family_digest VARCHAR, model_digest VARCHAR, d INTEGER, l0 DOUBLE, n_parameters BIGINT);
COMMENT ON TABLE codes IS 'Pooled codes: a feature family on the token rows of one hook.';
COMMENT ON COLUMN codes.digest IS 'SHA-256 of everything that decides a vector beside its text.';
COMMENT ON COLUMN codes.d IS 'Width of the code.';
COMMENT ON COLUMN codes.l0 IS 'Mean coordinates that are not zero, on the rows of the fit.';
COMMENT ON COLUMN codes.n_parameters IS 'Numbers learned or drawn; NULL where unknown.';
CREATE TABLE code_vectors (code_id INTEGER, text_id BIGINT, vector FLOAT[]);
COMMENT ON TABLE code_vectors IS 'The code of a text, pooled over its tokens.';
"""

# a file may come from somebody else: nothing in it may reach beyond it
_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}

_OBJECTS = """SELECT table_name FROM system.main.duckdb_tables() WHERE NOT internal
    UNION ALL SELECT 'view ' || view_name FROM system.main.duckdb_views() WHERE NOT internal
    ORDER BY ALL"""


class CodeStore:
    """An open file of codes; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file, made now if there is none.

        Raises:
            RobustnessError: What is there is damaged, in use or no file of codes.
        """
        self.path = path
        with self._told():
            self._con = duckdb.connect(str(path), config=_LOCKED)
            names = [name for (name,) in self._con.execute(_OBJECTS).fetchall()]
            if not names:
                self._con.execute(f"BEGIN; {_SCHEMA} COMMIT")
            elif names != ["code_vectors", "codes", "texts"]:
                self._con.close()
                raise RobustnessError(
                    f"{path}: no file of codes, it holds {', '.join(names)}; want texts, codes and "
                    "code_vectors: move it away, codes are then computed anew"
                )

    def __enter__(self) -> "CodeStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._con.close()

    @contextmanager
    def _told(self) -> Generator[None]:
        """Raise what DuckDB says of the file as the error of this room."""
        try:
            yield
        except duckdb.IOException as fault:
            if "set lock" in str(fault):  # "block" is in what it says of damage
                raise RobustnessError(
                    f"{self.path}: another process has it open; wait for it, or end it"
                ) from fault
            raise self._damaged(fault) from fault
        except (duckdb.Error, ValueError) as fault:
            raise self._damaged(fault) from fault

    def _damaged(self, fault: Exception) -> RobustnessError:
        reason = str(fault).splitlines()[0]
        return RobustnessError(
            f"{self.path}: cannot be read or written: {reason}; if it is damaged, delete it: codes "
            "are then computed anew"
        )

    def encode(self, encoder: TextEncoder, texts: Sequence[str], part: str) -> TextCodes:
        """Return the codes of texts; those that are not stored are computed and stored.

        Args:
            encoder: Fitted.
            texts: Any texts, repeats included.
            part: What table `texts` calls their split.

        Raises:
            RobustnessError: A code is not finite, or the file is damaged.
        """
        ids, n_truncated, n_tokenless = encoder.reader.read(texts)
        with self._told():
            text_ids = self._text_ids(texts, [len(row) - 1 for row in ids], part)
            code_ids = {name: self._code_id(encoder, c) for name, c in encoder.codes.items()}
            stored = {code: set[int]() for code in code_ids.values()}
            query = """SELECT code_id, list(text_id) FROM code_vectors
                WHERE list_contains($codes::INTEGER[], code_id) GROUP BY code_id"""
            rows = self._con.execute(query, {"codes": list(code_ids.values())}).fetchall()
            stored |= {code: set(present) for code, present in rows}
            lacking: dict[tuple[str, ...], dict[int, str]] = {}  # texts by the codes that they lack
            for text_id, text in zip(text_ids, texts, strict=True):
                short = tuple(n for n, code in code_ids.items() if text_id not in stored[code])
                if short:
                    lacking.setdefault(short, {})[text_id] = text
            for short, missing in lacking.items():
                items = list(missing.items())
                for first in range(0, len(items), COMMIT_TEXTS):
                    block = items[first : first + COMMIT_TEXTS]
                    encoded = encoder.encode([text for _, text in block], names=short).codes
                    self._add(
                        [i for i, _ in block], {code_ids[name]: encoded[name] for name in short}
                    )
            codes = {name: self._read(code, text_ids) for name, code in code_ids.items()}
        return TextCodes(codes, n_truncated, n_tokenless)

    def _text_ids(self, texts: Sequence[str], lengths: Sequence[int], part: str) -> list[int]:
        """Return the number of each text; new texts are added to `texts`."""
        keys = [hashlib.sha256(t.encode(errors="surrogatepass")).hexdigest() for t in texts]
        ids: dict[str, int] = dict(
            self._con.execute("SELECT text_sha256, text_id FROM texts").fetchall()
        )
        rows: list[dict[str, Any]] = []
        for key, n_tokens in zip(keys, lengths, strict=True):
            if key not in ids:
                ids[key] = len(ids)
                row = {"text_id": ids[key], "text_sha256": key, "n_tokens": n_tokens}
                rows.append({**row, "split": part})
        if rows:
            self._insert("texts", pa.Table.from_pylist(rows))
        return [ids[key] for key in keys]

    def _code_id(self, encoder: TextEncoder, code: ProbedCode) -> int:
        """Return the number of a code, added to `codes` if it is not there."""
        family = code.family
        parts = [code.hook, code.pooling, family.digest, encoder.model_digest]
        digest = hashlib.sha256(json.dumps([*parts, encoder.reader.digest]).encode()).hexdigest()
        stored = self._con.execute(
            "SELECT code_id FROM codes WHERE digest = $1", [digest]
        ).fetchone()
        if stored is not None:
            return int(stored[0])
        row = self._con.execute("SELECT count(*) FROM codes").fetchone()
        assert row is not None
        about = {"code_id": row[0], "digest": digest, "hook": code.hook, "pooling": code.pooling}
        about |= {"family": family.name, "family_digest": family.digest}
        about |= {"model_digest": encoder.model_digest, "d": family.d, "l0": family.l0}
        self._insert(
            "codes", pa.Table.from_pylist([{**about, "n_parameters": family.n_parameters}])
        )
        return int(row[0])

    def _add(self, text_ids: Sequence[int], codes: dict[int, Float32[np.ndarray, "n _"]]) -> None:
        """Add the codes of some texts, all or none."""
        tables: list[pa.Table] = []
        for code_id, x in codes.items():
            flat = pa.array(np.ascontiguousarray(x, np.float32).ravel())
            ends = pa.array(np.arange(len(x) + 1, dtype=np.int64) * x.shape[1])
            columns = {
                "code_id": pa.array(np.full(len(x), code_id, np.int32)),
                "text_id": pa.array(np.asarray(text_ids, np.int64)),
                "vector": pa.LargeListArray.from_arrays(ends, flat),
            }
            tables.append(pa.table(columns))
        self._insert("code_vectors", pa.concat_tables(tables))

    def _insert(self, table: str, rows: pa.Table) -> None:
        """Add rows in one transaction."""
        self._con.register("rows_to_add", rows)
        self._con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM rows_to_add")
        self._con.unregister("rows_to_add")

    def _read(self, code_id: int, text_ids: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Return the stored codes of texts, in the order asked for."""
        query = """SELECT text_id, vector FROM code_vectors
            WHERE code_id = $code AND text_id IN (SELECT unnest($ids::BIGINT[]))"""
        asked = {"code": code_id, "ids": sorted(set(text_ids))}
        rows = self._con.execute(query, asked).to_arrow_table().combine_chunks()
        stored_ids = rows["text_id"].to_numpy()
        flat = rows["vector"].combine_chunks().flatten().to_numpy()
        vectors = np.asarray(flat, np.float32).reshape(len(stored_ids), -1)
        order = np.argsort(stored_ids, kind="stable")
        return vectors[order[np.searchsorted(stored_ids[order], np.asarray(text_ids))]]
