"""The SQL cookbook: every query runs, and answers what the page says."""

import pytest
from cookbook_store import BLOCK, PAGE, cookbook_store, shown

RECIPES = BLOCK.findall(PAGE.read_text("utf-8"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with cookbook_store(tmp_path_factory.mktemp("cookbook")) as opened:
        yield opened


def test_the_page_has_twenty_five_questions_and_an_answer_to_each():
    text = PAGE.read_text("utf-8")
    assert len(RECIPES) == text.count("\n## ") == text.count("```sql") == 25


@pytest.mark.parametrize("number", range(1, 26))
def test_a_query_of_the_cookbook_answers_as_the_page_says(store, number):
    query, answer = RECIPES[number - 1]
    assert shown(store, query) == answer
    assert len(answer.splitlines()) > 1  # a question whose answer is empty shows nothing
