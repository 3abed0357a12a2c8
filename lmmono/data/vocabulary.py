"""Token ids as people read them."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


def shown_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return each token as it reads inside a text: with its blank before it, where it has one.

    Joined, the tokens of a text read as the text. Bytes that are no text alone show as `<0xE2>`;
    added tokens show as they are.
    """
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(i) or "" for i in range(len(tokenizer))]
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    plain = [i for i in range(len(tokens)) if i not in added]
    parts = json.loads(backend.to_str())
    # some vocabularies come without a decoder
    if "ByteLevel" in json.dumps([parts["decoder"], parts["pre_tokenizer"]]):
        shown = {i: _shown_bytes(_bytes_of(tokens[i])) for i in plain}
    else:
        shown = _shown_after_a_word(backend, plain)
    shown |= added
    return [shown[i] for i in range(len(tokens))]


def _bytes_of(token: str) -> bytes:
    """Return the bytes that a token stands for; its own where it is not written in GPT-2's table.

    Some vocabularies list special tokens among the others, such as `<｜begin▁of▁text｜>`.
    """
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode()


def _shown_bytes(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        broken = "".join(f"<0x{byte:02X}>" for byte in raw[error.start : error.end])
        return raw[: error.start].decode("utf-8") + broken + _shown_bytes(raw[error.end :])


def _shown_after_a_word(backend: Tokenizer, ids: list[int]) -> dict[int, str]:
    """Decode each token after a word, so that marks of blanks and joints are resolved."""
    word = next((i for i in ids if backend.decode([i]).strip().isalpha()), None)
    shown: dict[int, str] = {}
    for i in ids:
        token = backend.id_to_token(i) or ""
        if word is None:
            shown[i] = token
            continue
        before, joined = backend.decode([word]), backend.decode([word, i])
        is_text = joined.startswith(before) and "\ufffd" not in joined
        shown[i] = joined.removeprefix(before) if is_text else token
    return shown


def _bytes_of_characters() -> dict[str, int]:
    """Return GPT-2's table: printable bytes stand for themselves, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


BYTES = _bytes_of_characters()
