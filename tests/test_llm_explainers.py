"""LLM explainers: what is shown, how answers are read, and which of several is best."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm_server import asked, said, serving
from planted_store import RARE, SILENT, planted_store
from reading_judge import expecting, explains_by_token, ten_on_the_token
from scripted_judges import Scripted
from small_store import HOOK, WORDS

import activation_store as astore
import lmmono as lm
from lmmono.clients.server import Price, ServerClient
from lmmono.errors import ExplainError
from lmmono.explanations.llm_explainers import Ranking
from lmmono.explanations.llm_prompts import characters_of, levels, pairs_prompt, parse_explanation
from lmmono.explanations.stored_explanations import read_explanations, stored_explainer

EXPLAINERS = ("llm_token_act_pair", "llm_max_act", "llm_contrastive")
READ = expecting(ten_on_the_token)


def truthful(path: str, body: dict[str, Any]) -> Any:
    if path == "/completions":
        return READ(path, body)
    return said(f"Explanation: the token {explains_by_token(body)}.", 100, 7)


@pytest.fixture
def store(tmp_path: Path):
    with astore.open(planted_store(tmp_path / "run"), mode="a") as opened:
        yield opened


def client_of(calls: Any) -> ServerClient:
    prices = {"judge": Price(1.0, 5.0)}
    return ServerClient("judge", base_url=calls.base_url, n_retries=0, prices=prices)


def test_activations_are_shown_as_whole_numbers_of_0_to_10() -> None:
    acts = np.array([[-1.0, 0.0, 0.39, 0.4, 1.99], [2.0, 4.0, 3.99, 0.1, 0.0]])
    assert levels(acts).tolist() == [[0, 0, 0, 1, 4], [5, 10, 9, 0, 0]]
    assert not levels(np.zeros((1, 3))).any()
    assert levels(np.array([[8.0]]), 4.0).tolist() == [[10]]


def test_pairs_are_one_token_a_line_and_sparse_ones_once_more() -> None:
    sparse = tuple((f"t{i}", 10 * (i == 3)) for i in range(9)) + (("\n", 0),)
    asked_last = pairs_prompt([sparse]).messages[-1].content
    assert asked_last.splitlines()[:5] == ["Excerpt 1", "t0\t0", "t1\t0", "t2\t0", "t3\t10"]
    assert "\\n\t0" in asked_last
    assert asked_last.endswith("once more\nt3\t10")
    dense = pairs_prompt([(("a", 3), ("b", 0))]).messages[-1].content
    assert dense == "Excerpt 1\na\t3\nb\t0"


MANY_BYTES = ("a", "<0xE5><0xAE>", "<0xB6>", " <0xF0><0x9F>", "<0x99><0x82>", "b", "<0xE5>")
"""Letters and an emoji of several tokens, one of them after a blank, and a byte that is cut off."""


def test_characters_of_several_tokens_are_shown_whole() -> None:
    pieces, owners = characters_of(MANY_BYTES)
    assert pieces == ["a", "家", " 🙂", "b", "<0xE5>"]
    assert owners == [0, 1, 1, 2, 2, 3, 4]
    assert "".join(characters_of(["plain", " text"])[0]) == "plain text"
    assert characters_of([]) == ([], [])


def test_prompts_show_a_character_as_strong_as_the_strongest_of_its_tokens(tmp_path) -> None:
    ids = np.tile(np.arange(7, dtype=np.int32), (12, 2))[:, :13]
    ids[:, 0] = np.arange(12) % 7  # texts that differ
    acts = np.where(ids == 2, 4.0, 0.0) + np.where(ids == 5, 2.0, 0.0)
    acts = acts[..., None].astype(np.float32)
    with astore.open(tmp_path / "run", mode="w") as store:
        store.add_vocabulary(list(MANY_BYTES))
        with store.writer(rows=[astore.Rows(HOOK, 1, max_density=1.0)], n_ctx=13) as writer:
            docs = np.broadcast_to(np.arange(12)[:, None], ids.shape)
            writer.add(np.arange(12), ids, docs, "explain", {HOOK: acts})
    with astore.open(tmp_path / "run", mode="a") as store:
        client = Scripted(lambda _: "Explanation: a house")
        lm.explain(store, HOOK, explainer="llm_max_act", client=client)
        lm.explain(store, HOOK, explainer="llm_token_act_pair", client=client)
    marked, pairs = (prompt.messages[-1].content for prompt in client.prompts)
    assert "a[[家]] 🙂[[b]]" in marked
    assert '"家" 10' in marked and '"b" 5' in marked
    assert "a\t0\n家\t10\n 🙂\t0\nb\t5" in pairs


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Explanation: names of rivers.", "names of rivers"),
        ("\n**Explanation:** 'years'\n", "years"),
        ("explanation: a\nsecond line", "a"),
        ("", None),
        ("names of rivers", None),
        ("Sure! Explanation: rivers", None),
        ("I think:\nExplanation: rivers", None),
        ("Explanation: a\nExplanation: b", None),
        ("Explanation:", None),
        ("Explanation: ...", None),
        ("Explanation: " + "x" * 401, None),
        ("<think>\nExplanation: not this\n</think>\n\nExplanation: rivers", "rivers"),
        ("Explanation: not this</think>Explanation: rivers", "rivers"),
        ("<think>\nExplanation: not this", None),
        ("```\nExplanation: rivers\n```", "rivers"),
        ("```text\n**Explanation:**\nrivers.\n```", "rivers"),
        ("Explanation:\n\n  'rivers'", "rivers"),
        ("Explanation:\nExplanation: rivers", None),
    ],
)
def test_an_answer_has_the_form_asked_for_or_is_none(answer: str, text: str | None) -> None:
    assert parse_explanation(answer) == text


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_a_truthful_model_explains_every_planted_unit(store, explainer: str) -> None:
    with serving(truthful) as calls:
        made = lm.explain(store, HOOK, explainer=explainer, client=client_of(calls))
        n_calls = len(calls.bodies)
    found = made.of(HOOK)
    for unit in range(4):
        assert found[unit].text == f"the token {WORDS[unit].strip()}"
        assert found[unit].model == "judge@127.0.0.1"
        assert len(found[unit].prompt_hash or "") == 64
    assert (found[SILENT].failure, found[RARE].failure) == ("silent", "too_few_records")
    assert n_calls == 4  # none for units without records
    query = """SELECT sum(n_calls), sum(n_prompt_tokens), sum(n_completion_tokens), sum(cost_usd)
        FROM explanations"""
    # 400 tokens at 1 and 28 at 5 dollars per million
    assert store.sql(query).fetchall()[0] == (4, 400, 28, pytest.approx(540e-6))


def test_a_model_is_shown_the_explain_split_and_contrast_where_it_is_asked(store) -> None:
    with serving(truthful) as calls:
        lm.explain(store, HOOK, units=[1], explainer="llm_contrastive", client=client_of(calls))
    text = asked(calls.bodies[0])
    fires = [line for line in text.splitlines() if line.startswith("Fires")]
    silent = [line for line in text.splitlines() if line.startswith("Silent")]
    assert len(fires) == 10
    assert all("[[ cat]]" in line or ": [[ cat]]" in line for line in fires)
    assert 1 <= len(silent) <= 5
    assert not any("cat" in line for line in silent)
    rows = store.sql("""SELECT string_agg(token, '' ORDER BY pos) FROM tokens
        WHERE split = 'score' GROUP BY doc_id""").fetchall()
    plain = text.replace("[[", "").replace("]]", "")
    assert not any(row.strip().replace("\n", "\\n") in plain for (row,) in rows)


def test_what_is_no_explanation_is_a_failure_in_the_store(store) -> None:
    answers = {" the": "I cannot help.", " cat": "", " sat": "Explanation: fine"}

    def script(path: str, body: dict[str, Any]) -> Any:
        token = explains_by_token(body)
        return said({k.strip(): v for k, v in answers.items()}.get(token, "Explanation: "))

    with serving(script) as calls:
        made = lm.explain(store, HOOK, explainer=EXPLAINERS[0], client=client_of(calls))
    assert made.failures == {"unparsed": 3, "silent": 1, "too_few_records": 1}
    assert made.n_explained == 1
    rows = store.sql("SELECT unit, text FROM explanations WHERE text IS NOT NULL").fetchall()
    assert rows == [(2, "fine")]


def test_another_model_is_asked_and_both_answers_are_kept(store) -> None:
    asked_of: dict[str, list[int]] = {"A": [], "B": []}
    for name in ("A", "B", "A"):
        client = Scripted(lambda _, name=name: f"Explanation: by {name}", name=name)
        made = lm.explain(store, HOOK, units=[0, 1], explainer="llm_max_act", client=client)
        asked_of[name].append(len(client.prompts))
        assert made.explainer == f"llm_max_act:model={name}"
        assert made.of(HOOK)[1].text == f"by {name}"
    assert asked_of == {"A": [2, 0], "B": [2]}, "A is known by then"
    rows = store.sql("SELECT model, text FROM explanations WHERE unit = 1 ORDER BY 1").fetchall()
    assert rows == [("A", "by A"), ("B", "by B")]
    of = {"explainer": "random_explanation", "units": [0, 1]}
    taken = lm.explain(store, HOOK, **of, of="llm_max_act:model=B")
    assert taken.of(HOOK)[1].text == "by B"
    with pytest.raises(ExplainError, match="several language models"):
        lm.explain(store, HOOK, **of, of="llm_max_act")
    with pytest.raises(ExplainError, match=r"several language models.*model=A' or .*model=B'"):
        read_explanations(store, HOOK, "llm_max_act", 0)


def test_the_only_model_need_not_be_named(store) -> None:
    client = Scripted(lambda _: "Explanation: x", name="A,b:c")
    settings = {"explainer": "llm_max_act", "client": client, "units": [0, 1]}
    lm.explain(store, HOOK, **settings)
    lm.explain(store, HOOK, **settings, max_tokens=9, temperature=0.5)
    lm.explain(store, HOOK, **settings, preset="openai")
    for name in ("llm_max_act", "llm_max_act:max_tokens=9,temperature=0.5", "llm_max_act:openai"):
        stored = stored_explainer(store, name, HOOK)
        assert stored != name and "model=A%2Cb:c" in stored
        assert read_explanations(store, HOOK, name, 0)[1].explainer == stored
    assert stored_explainer(store, "llm_max_act:max_tokens=8") == "llm_max_act:max_tokens=8"
    taken = lm.explain(store, HOOK, explainer="random_explanation", units=[0], of="llm_max_act")
    assert taken.explainer == "random_explanation:of=llm_max_act:model=A%2Cb:c"


@pytest.mark.parametrize("failure", ["no_answer", "refused"])
def test_units_without_an_answer_are_asked_about_again_and_others_are_not(store, failure) -> None:
    def rule(question: str) -> str | None:
        if "[[ cat]]" in question:
            return None  # an outage
        return "no explanation" if "[[ sat]]" in question else "Explanation: x"

    settings = {"explainer": "llm_max_act", "units": [0, 1, 2]}
    down = Scripted(rule, failure=failure, detail="HTTP 503: down")
    made = lm.explain(store, HOOK, **settings, client=down)
    assert made.failures == {failure: 1, "unparsed": 1}
    assert "HTTP 503: down" in repr(made) and "no explanation" in repr(made)
    query = "SELECT reason FROM explanations WHERE failure = $failure"
    assert store.sql(query, failure=failure).fetchall() == [("HTTP 503: down",)]
    ((why,),) = store.sql(query, failure="unparsed").fetchall()
    assert "no line begins with" in why and made.of(HOOK)[2].reason == why
    back = Scripted(lambda _: "Explanation: back")
    made = lm.explain(store, HOOK, **settings, client=back)
    assert (len(back.prompts), made.n_found, made.failures) == (1, 2, {"unparsed": 1})
    rows = store.sql("SELECT unit, text, failure FROM explanations ORDER BY unit").fetchall()
    assert rows == [(0, "x", None), (1, "back", None), (2, None, "unparsed")]
    lm.explain(store, HOOK, **settings, client=back)
    assert len(back.prompts) == 1, "all is done"


def test_a_unit_of_which_one_candidate_is_missing_is_asked_about_again(store) -> None:
    calls: list[str] = []

    def rule(_: str) -> str | None:
        calls.append("")
        return None if len(calls) == 2 else f"Explanation: {'x' * len(calls)}"

    ranking = Ranking("longest", lambda text, *_: float(len(text)))
    settings = {"n_candidates": 3, "temperature": 1.0, "rank_by": ranking, "units": [1]}
    client = Scripted(rule)
    for n_calls in (3, 6, 6):
        made = lm.explain(store, HOOK, explainer="llm_max_act", client=client, **settings)
        assert len(calls) == n_calls
    assert made.failures == {}
    rows = store.sql("SELECT rank, text FROM explanations ORDER BY rank").fetchall()
    assert rows == [(1, "xxxxxx"), (2, "xxxxx"), (3, "xxxx")]


def test_tokens_that_end_while_a_model_thinks_are_said(store) -> None:
    client = Scripted(lambda _: "<think>\nso many words")
    made = lm.explain(store, HOOK, units=[1], explainer="llm_max_act", client=client)
    assert made.failures == {"unparsed": 1}
    assert "max_tokens=" in repr(made)


def test_the_best_of_several_is_the_one_that_predicts_records_not_shown(store) -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        if path == "/completions":
            return READ(path, body)
        candidates = ["Explanation: the token nothing", "sorry", truthful(path, body)]
        answer = candidates[body["seed"] % 1009]
        return answer if isinstance(answer, dict) else said(answer)

    settings = {"n_candidates": 3, "temperature": 1.0}
    with serving(script) as calls:
        given = {"explainer": EXPLAINERS[0], "client": client_of(calls)}
        made = lm.explain(store, HOOK, units=[1], **given, **settings)
        with pytest.raises(ExplainError, match="at temperature 0 are all the same"):
            lm.explain(store, HOOK, units=[1], **given, n_candidates=2)
        with pytest.raises(ExplainError, match="want 'simulation' or a Ranking"):
            lm.explain(store, HOOK, units=[1], **given, **settings, rank_by="luck")
    assert made.of(HOOK)[1].text == "the token cat"
    rows = store.sql("""SELECT rank, text, failure, n_calls FROM explanations
        WHERE unit = 1 ORDER BY rank""").fetchall()
    assert rows[0] == (1, "the token cat", None, 11)
    assert rows[1] == (2, "the token nothing", None, 11)
    assert rows[2] == (3, None, "unparsed", 1)


def test_what_ranks_sees_other_documents_than_the_prompt_and_none_that_score(store) -> None:
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []

    def length(text: str, token_ids: np.ndarray, acts: np.ndarray) -> float:
        seen.append((text, token_ids, acts))
        return float(len(text))

    def script(path: str, body: dict[str, Any]) -> Any:
        return said("Explanation: " + "ab"[body["seed"] % 1009] * (1 + body["seed"] % 1009))

    with serving(script) as calls:
        made = lm.explain(
            store,
            HOOK,
            units=[1],
            explainer=EXPLAINERS[0],
            client=client_of(calls),
            n_candidates=2,
            temperature=1.0,
            rank_by=Ranking("longest", length),
        )
        shown = asked(calls.bodies[0])
    assert made.of(HOOK)[1].text == "bb"
    assert "rank_by=longest" in made.explainer
    query = "SELECT split, list(token_id ORDER BY pos) FROM token_ids GROUP BY doc_id, split"
    splits = {tuple(ids): split for split, ids in store.sql(query).fetchall()}
    for _, token_ids, acts in seen:
        assert acts.shape == token_ids.shape
        assert len(token_ids) == 10
        for ids in token_ids:
            ids = ids[ids >= 0]
            assert splits[tuple(ids.tolist())] == "explain"
            lines = "\n".join(
                f"{WORDS[i]}\t{10 * int(i == 1)}".replace("\n\t", "\\n\t") for i in ids
            )
            assert lines not in shown


def test_true_explanations_score_one_by_the_simulator_that_reads(store) -> None:
    with serving(truthful) as calls:
        given = {"explainer": EXPLAINERS[0], "client": client_of(calls)}
        lm.explain(store, HOOK, units=[0, 1, 2, 3], **given)
        lm.score(store, HOOK, units=[0, 1, 2, 3], **given, simulator="llm")
    rows = store.sql("""SELECT control, min(value), max(value) FROM all_scores
        WHERE metric = 'simulation_tar' AND unit IS NOT NULL GROUP BY control""").fetchall()
    found = {control: (low, high) for control, low, high in rows}
    assert found[None] == pytest.approx((1.0, 1.0))
    assert found["random_explanation"][1] < 0.5
