"""Which tokens stand around a document, and at the start of a row: as the model learned it.

    auto, tokenizer adds a BOS        <s> a document <s> another one ...
    auto, tokenizer adds none         a document <eos> another one <eos> ...
    bos: rows                         the same as the first, and every row starts with <s>

stories260K (a Llama) on 433 rows of 127 tokens that begin inside a story, same targets: 1.64 nats
as they are, 1.76 after a BOS, 1.92 after an end-of-text. So a row that a document continues into
gets no BOS of its own, unless the model has learned that.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32
from transformers import PreTrainedTokenizerFast

from lmmono.errors import DataError
from lmmono.recipe.sections import Data

EVERY_ROW = ("<bos>",)
"""BOS tokens of tokenizers whose models saw one at the start of every row: Gemma's, whose card asks
for it. Nothing in a tokenizer's files says so."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Ids that are added to documents and rows."""

    before: int | None
    """Before each document."""
    after: int | None
    """After each document."""
    row_start: int | None
    """At the start of each row that a document continues into."""
    padding: int
    """Fills rows up; such tokens belong to no document."""

    def around(self, ids: UInt32[np.ndarray, "n"]) -> UInt32[np.ndarray, "m"]:
        """Return a document's ids with what belongs around them, where they lack it."""
        parts: list[Any] = [ids]
        if self.before is not None and ids[:1].tolist() != [self.before]:
            parts.insert(0, [self.before])
        if self.after is not None and ids[-1:].tolist() != [self.after]:
            parts.append([self.after])
        return np.concatenate(parts).astype(np.uint32)


def frame_of(tokenizer: PreTrainedTokenizerFast, section: Data) -> Frame:
    """Return what the settings add to documents of a tokenizer.

    Raises:
        DataError: A BOS is asked for and the tokenizer has none.
    """
    bos: Any = tokenizer.bos_token_id
    end: Any = tokenizer.eos_token_id
    adds_bos, adds_eos = _adds(tokenizer)
    if section.bos in ("always", "rows") and bos is None:
        raise DataError(f"data.bos: {section.bos}: the tokenizer has no BOS token; want never")
    with_bos = section.bos in ("always", "rows") or (section.bos == "auto" and adds_bos)
    in_rows = section.bos == "rows" or (with_bos and tokenizer.bos_token in EVERY_ROW)
    with_end = section.eos == "always" or (section.eos == "auto" and (adds_eos or not with_bos))
    if with_end and end is None:
        raise DataError(
            'the tokenizer names no end-of-text token: set "eos_token" in its tokenizer_config.json'
        )
    padding: Any = tokenizer.pad_token_id if end is None else end
    return Frame(
        before=bos if with_bos else None,
        after=end if with_end else None,
        row_start=bos if in_rows else None,
        padding=padding or 0,
    )


def text_start(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id that a model reads before a text: BOS as the tokenizer adds it, or the end."""
    start: Any = tokenizer.bos_token_id if _adds(tokenizer)[0] else tokenizer.eos_token_id
    return start


def _adds(tokenizer: PreTrainedTokenizerFast) -> tuple[bool, bool]:
    """Return whether the tokenizer itself puts BOS before and end-of-text after a text."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=special) for special in (True, False))
    n_added = len(whole) - len(bare)
    return (
        n_added > 0 and whole[0] == tokenizer.bos_token_id,
        n_added > 0 and whole[-1] == tokenizer.eos_token_id,
    )
