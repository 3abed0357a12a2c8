"""Characters of several tokens read as characters, in Python and in SQL, and the mark stays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_store as astore
from activation_store import Rows
from activation_store.read.characters import whole_characters

TEXT = "家 é🙂 a<b>鸟\n"


def pieces(text: str, cuts: set[int]) -> list[str]:
    """Cut the bytes of a text into tokens, as a byte-level vocabulary shows them."""
    raw, tokens, begin = text.encode(), [], 0
    for end in sorted({*cuts, len(raw)}):
        part, token = raw[begin:end], ""
        while part:
            try:
                token, part = token + part.decode(), b""
            except UnicodeDecodeError as fault:
                bad = part[fault.start : fault.end]
                token += part[: fault.start].decode() + "".join(f"<0x{b:02X}>" for b in bad)
                part = part[fault.end :]
        tokens.append(token)
        begin = end
    return [token for token in tokens if token]


@given(cuts=st.sets(st.integers(1, len(TEXT.encode()) - 1)), peak=st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_tokens_of_a_text_read_as_the_text_and_the_peak_has_its_character(cuts, peak):
    tokens = pieces(TEXT, cuts)
    peak = min(peak, len(tokens) - 1)
    shown = whole_characters(tokens, peak)
    assert len(shown) == len(tokens)
    assert "".join(shown) == TEXT
    assert shown[peak]


def test_bytes_that_are_no_character_stay_as_they_are():
    assert whole_characters(["<0xAE>", "<0xB6>x", "<0xE5>", "<0xAE>"]) == [
        "<0xAE>",
        "<0xB6>x",
        "<0xE5>",
        "<0xAE>",
    ]
    assert whole_characters(["<0x0A>", "<0xED><0xA0>", "<0x80>"]) == [
        "\n",
        "<0xED><0xA0>",
        "<0x80>",
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_exemplars_show_characters_in_python_sql_and_html(tmp_path, size):
    tokens = pieces(TEXT, set(range(size, len(TEXT.encode()), size)))
    n = len(tokens)
    with astore.open(tmp_path, "w") as store:
        store.add_vocabulary(tokens)
        ids, docs = np.arange(n)[None], np.zeros((1, n), int)
        acts = np.eye(n, dtype=np.float32)[None]
        with store.writer(rows=[Rows("h", n, max_density=1.0)], n_ctx=n) as writer:
            writer.add(np.array([0]), ids, docs, "all", {"h": acts})
        for unit in range(n):
            (exemplar,) = store.unit("h", unit).exemplars(before=n, after=n)
            ((excerpt, text),) = store.sql(
                "SELECT e.excerpt, x.text FROM exemplars('h', $unit, before := 40, after := 40) e,"
                " excerpt(0, $unit, before := 40, after := 40) x",
                unit=unit,
            ).fetchall()
            assert exemplar.text == excerpt == text
            assert text.replace("«", "").replace("»", "") == TEXT
            marked = text[text.index("«") + 1 : text.index("»")]
            assert marked and marked in whole_characters(tokens, unit)[unit]
            assert "&lt;0x" not in exemplar._repr_html_()
