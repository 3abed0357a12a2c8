"""Splits: a pure function of the text, in the shares asked for."""

import hashlib
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmmono.data.document import PIECE_CHARACTERS, pieces
from lmmono.data.splits import normalised, split_of
from lmmono.recipe.sections import Splits
from lmmono.types import SPLITS

N_TEXTS = 20_000
TEXTS = [f"document number {i} of many" for i in range(N_TEXTS)]


@given(st.floats(0, 0.3), st.floats(0, 0.3), st.floats(0, 0.3))
@settings(max_examples=5)
def test_each_split_gets_its_share_of_documents(val: float, explain: float, score: float) -> None:
    splits = Splits(val_fraction=val, explain_fraction=explain, score_fraction=score)
    drawn = [split_of(text, splits) for text in TEXTS]
    for split, share in zip(SPLITS, (1 - val - explain - score, val, explain, score), strict=True):
        deviation = 5 * (share * (1 - share) / N_TEXTS) ** 0.5
        assert abs(drawn.count(split) / N_TEXTS - share) <= deviation + 1e-9


@given(st.text(), st.sampled_from(["{}", " {}\n", "\t{}", "{} "]))
def test_identical_text_falls_into_the_same_split_whatever_its_case_and_white_space(
    text: str, frame: str
) -> None:
    splits = Splits(val_fraction=0.25, explain_fraction=0.25, score_fraction=0.25)
    assert split_of(frame.format(text), splits) == split_of(text, splits)
    assert split_of("The Cat  sat" + text, splits) == split_of("the cat sat" + text, splits)


def test_changing_a_later_fraction_moves_no_document_between_earlier_splits() -> None:
    few = Splits(score_fraction=0.05)
    many = Splits(score_fraction=0.4)
    for text in TEXTS[:2000]:
        if (split := split_of(text, few)) != "train":
            assert split_of(text, many) == split


def test_a_fraction_of_zero_gives_an_empty_split() -> None:
    none = Splits(val_fraction=0.0, explain_fraction=0.0, score_fraction=0.0)
    assert {split_of(text, none) for text in TEXTS[:1000]} == {"train"}


def test_the_split_of_a_text_never_changes_between_versions() -> None:
    digest = hashlib.sha256(b"the cat sat.").hexdigest()
    position = int(digest[:16], 16) / 2**64
    below = Splits(val_fraction=position - 1e-6, explain_fraction=0.0, score_fraction=0.0)
    above = Splits(val_fraction=position + 1e-6, explain_fraction=0.0, score_fraction=0.0)
    assert split_of("The cat sat.", below) == "train"
    assert split_of("The cat sat.", above) == "val"


@pytest.mark.parametrize("blank", [" ", "  \n"])
def test_a_long_text_is_normalised_in_pieces_as_if_it_were_whole(blank: str) -> None:
    text = blank.join(["Ａ Ǆ ﬁne", "Straße"] * PIECE_CHARACTERS)[: 3 * PIECE_CHARACTERS]
    cut = list(pieces(text))
    assert "".join(cut) == text
    assert len(cut) > 1
    assert normalised(text) == " ".join(unicodedata.normalize("NFKC", text).casefold().split())
