"""Features in a store of their own, `features.duckdb`: texts are encoded once, whoever asks.

A text is a document (and a sequence of one token), known by the SHA-256 of its characters, so sets
that share texts share their features. A feature is a vector hook,
`<hook>.<pooling>.<family>-<8 digits of its digest>@<n>`: what one call computed is capture n,
committed as it goes, so a call that was killed costs the texts after its last commit. Table
`dictionaries` says what each feature is.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Float32

import activation_store as astore
from lmmono.suites.text_codes import Encoded, Encoder, Feature

COMMIT_TEXTS = 2048
"""Texts between commits."""


class FeatureStore:
    """An open store of pooled features of one model; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the store, made now if there is none.

        Raises:
            StoreError: What is there is no store, or cannot be written.
        """
        self._store = astore.open(path, "a" if path.exists() else "w")

    def __enter__(self) -> "FeatureStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._store.close()

    def encode(self, encoder: Encoder, texts: Sequence[str], part: str) -> Encoded:
        """Return the features of texts; those that are not stored are computed and stored.

        Args:
            encoder: Fitted.
            texts: Any texts, repeats included.
            part: What table `documents` calls their split.

        Raises:
            RobustnessError: A feature is not finite.
            StoreError: The store is of another model, or the disk refuses.
        """
        lengths, n_truncated, n_tokenless = encoder.count(texts)
        doc_ids = self._documents(texts, lengths, part)
        names = {feature.name: _hook(feature) for feature in encoder.features.values()}
        self._compute(encoder, texts, doc_ids, part, names)
        features = {name: self._read(hook, doc_ids) for name, hook in names.items()}
        return Encoded(features, n_truncated, n_tokenless)

    def _documents(self, texts: Sequence[str], lengths: Sequence[int], part: str) -> list[int]:
        """Return the number of each text's document; new texts are added to `documents`."""
        keys = [hashlib.sha256(t.encode(errors="surrogatepass")).hexdigest() for t in texts]
        known = dict(self._store.sql("SELECT text_sha256, doc_id FROM documents").fetchall())
        rows: list[dict[str, Any]] = []
        for key, n_tokens in zip(keys, lengths, strict=True):
            if key not in known:
                known[key] = len(known)
                rows.append({"doc_id": known[key], "text_sha256": key, "n_tokens": n_tokens})
        if rows:
            self._store.add_documents([{**row, "split": part} for row in rows])
        return [known[key] for key in keys]

    def _compute(
        self,
        encoder: Encoder,
        texts: Sequence[str],
        doc_ids: Sequence[int],
        part: str,
        names: dict[str, str],
    ) -> None:
        """Compute what is missing: texts that lack the same features go together."""
        place = dict(zip(doc_ids, range(len(doc_ids)), strict=True))
        there = self._there()
        lacking: dict[tuple[str, ...], list[int]] = {}
        for doc_id in place:
            short = tuple(n for n, hook in names.items() if doc_id not in there.get(hook, ()))
            lacking.setdefault(short, []).append(doc_id)
        for short, ids in lacking.items():
            if short:
                self._capture(encoder, short, ids, [texts[place[i]] for i in ids], part)

    def _there(self) -> dict[str, set[int]]:
        """Return the documents of each stored feature."""
        found: dict[str, set[int]] = {}
        query = "SELECT hook, list(seq_id) FROM vectors GROUP BY hook"
        for hook, ids in self._store.sql(query).fetchall():
            found.setdefault(hook.rpartition("@")[0], set()).update(ids)
        return found

    def _capture(
        self,
        encoder: Encoder,
        short: Sequence[str],
        ids: Sequence[int],
        texts: Sequence[str],
        part: str,
    ) -> None:
        """Compute and write some features of some texts, as one capture."""
        features = [encoder.features[name] for name in short]
        used = self._store.sql("SELECT DISTINCT hook FROM hooks WHERE kind = 'vectors'").fetchall()
        number = 1 + max((int(hook.rpartition("@")[2]) for (hook,) in used), default=-1)
        hooks = {feature.name: f"{_hook(feature)}@{number}" for feature in features}
        widths = {feature.name: feature.family.d for feature in features}
        self._store.append("dictionaries", [_described(each) for each in features])
        with self._store.writer(
            vectors=[
                astore.Vectors(hook=hooks[name], d=widths[name], dtype="float32") for name in hooks
            ],
            n_ctx=1,
            commit_tokens=COMMIT_TEXTS,
            model_digest=encoder.model_digest,
        ) as writer:
            for first in range(0, len(ids), COMMIT_TEXTS):
                block = np.array(ids[first : first + COMMIT_TEXTS], np.int64)
                made = encoder.encode(texts[first : first + COMMIT_TEXTS], names=short).features
                acts = {hooks[name]: x[:, None] for name, x in made.items()}
                writer.add(block, np.zeros((len(block), 1), np.int64), block[:, None], part, acts)

    def _read(self, hook: str, doc_ids: Sequence[int]) -> Float32[np.ndarray, "n d"]:
        """Return the stored vectors of documents, in the order asked for."""
        query = """SELECT seq_id, vector FROM vectors
            WHERE regexp_replace(hook, '@[0-9]+$', '') = $hook AND seq_id IN
                (SELECT unnest($ids::BIGINT[]))"""
        found = self._store.sql(query, hook=hook, ids=sorted(set(doc_ids))).to_arrow_table()
        found = found.combine_chunks()
        flat = found["vector"].combine_chunks().flatten().to_numpy()
        seq = found["seq_id"].to_numpy()
        rows = np.asarray(flat, np.float32).reshape(len(seq), -1)
        order = np.argsort(seq, kind="stable")
        return rows[order[np.searchsorted(seq[order], np.asarray(doc_ids))]]


def _hook(feature: Feature) -> str:
    return f"{feature.hook}.{feature.pooling}.{feature.family.name}-{feature.family.digest[:8]}"


def _described(feature: Feature) -> dict[str, Any]:
    """Return the row of table `dictionaries` of a feature."""
    family = feature.family
    return {
        "hook": feature.hook,
        "name": f"{feature.pooling}.{family.name}-{family.digest[:8]}",
        "latents_hook": _hook(feature),
        "arch": family.name,
        "d_in": family.d_in,
        "d_sae": family.d,
        "digest": family.digest,
        "l0": family.l0,
        "settings": {"pooling": feature.pooling, "n_parameters": family.n_parameters},
    }
