"""Text to token ids in bulk: exactly what the tokenizer gives, in bounded memory.

The Rust tokenizer keeps some hundred bytes per token until a text is done, so one text of 64 MB
would take 11 GB. Long texts are therefore cut where the tokenizer breaks anyway.
"""

import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import UInt32
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lmmono.data.document import pieces

BLOCK_CHARACTERS = 2_000_000
"""Text encoded at once: keeps every core busy and stays far below a GB."""

Encoder = Callable[[list[str]], list[UInt32[np.ndarray, "n_tokens"]]]


def exact_backend(tokenizer: PreTrainedTokenizerFast, *, special_tokens: bool = False) -> Tokenizer:
    """Return a copy that neither cuts nor pads, and reads special tokens as such or as text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = not special_tokens
    backend.no_truncation()
    backend.no_padding()
    return backend


def plain_encoder(tokenizer: PreTrainedTokenizerFast, *, special_tokens: bool = False) -> Encoder:
    """Return a batch encoder that adds no token.

    Args:
        tokenizer: The tokenizer.
        special_tokens: Read special tokens as such, as in chats; else as ordinary text.
    """
    backend = exact_backend(tokenizer, special_tokens=special_tokens)
    cut = pieces if _breaks_at_blanks(backend) else _whole

    def encode(texts: list[str]) -> list[UInt32[np.ndarray, "n_tokens"]]:
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        cuts = ((i, piece) for i, text in enumerate(texts) for piece in cut(text))
        for block in _blocks(cuts):
            encodings = backend.encode_batch_fast([p for _, p in block], add_special_tokens=False)
            for (i, _), encoding in zip(block, encodings, strict=True):
                parts[i].append(np.array(encoding.ids, np.uint32))
        return [np.concatenate(part) for part in parts]

    return encode


def _whole(text: str) -> Iterator[str]:
    yield text


def _breaks_at_blanks(backend: Tokenizer) -> bool:
    """Return whether a blank between words always starts a token, so that pieces are exact."""
    parts = json.loads(backend.to_str())
    before = parts["pre_tokenizer"] or {}
    is_known = before.get("type") == "WhitespaceSplit" or (
        before.get("type") == "ByteLevel" and before.get("use_regex", True)
    )
    return is_known and parts["normalizer"] is None


def _blocks(cuts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    size = 0
    for cut in cuts:
        block.append(cut)
        size += len(cut[1])
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block
