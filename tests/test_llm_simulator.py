"""The all-at-once simulator: expected values by hand, and against a model run directly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llm_server import Refusal, asked, hosting, serving
from planted_store import planted_store
from reading_judge import expecting, ten_on_the_token
from small_clients import byte_tokens, reader_of_bytes
from small_store import HOOK

import activation_store as astore
import lmmono as lm
from lmmono.clients.local import LocalClient
from lmmono.clients.server import Price, ServerClient
from lmmono.errors import ClientError, ExplainError
from lmmono.explanations import llm_simulation
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_simulation import Simulation, simulate, simulation_text
from lmmono.records.record_reader import RecordReader
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.simulators import (
    simulate_by_reading,
    simulate_calibrated,
    straight_line,
)

WORDS = (" the", " cat", "\n", "\t1", " 10", "unknown")
RECORDS = np.array([[0, 1, 2, -1], [3, 4, 5, 0]])


def asked_of(script: Any, records: np.ndarray = RECORDS) -> tuple[Simulation, int]:
    with serving(script) as calls:
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0, n_at_once=2)
        (found,) = simulate(client, ["cats"], [records], WORDS)
        return found, len(calls.bodies)


def test_a_slot_is_where_each_tokens_number_would_stand() -> None:
    text, slots = simulation_text("words for\ncats", [" the", "\t1", "unknown"])
    assert text.endswith(
        "fires on: words for cats\nActivations:\n the\tunknown\n\\t1\tunknown\nunknown\tunknown\n"
    )
    assert [text[slot - 1 : slot + 8] for slot in slots] == ["\tunknown\n"] * 3
    assert slots == sorted(slots)


def test_expected_values_are_over_the_numbers_among_the_alternatives() -> None:
    def expected(_: str, token: str) -> dict[str, float]:
        return {
            " the": {"7": 0.6, "5": 0.2, "x": 0.2},
            " cat": {"10": 0.5, "1": 0.25, "0": 0.25},
            "\\n": {"unknown": 0.9, "3": 0.1},
        }.get(token, {"11": 0.5, "x": 0.5})

    found, n_calls = asked_of(expecting(expected))
    want = [[5.2 / 0.8, 5.25, 3.0, 0.0], [0.0] * 4]
    want[1][3] = 6.5
    assert found.acts == pytest.approx(np.array(want))
    assert (found.n_slots, found.n_fallback) == (7, 3)
    assert found.fallback_fraction == pytest.approx(3 / 7)
    assert n_calls == found.usage.n_calls == 2
    assert np.array_equal(np.asarray(found), found.acts)


def test_a_character_of_several_tokens_has_one_slot_and_all_its_tokens_its_value() -> None:
    words = ("a", "<0xE5><0xAE>", "<0xB6>", "b")

    def expected(_: str, token: str) -> dict[str, float]:
        return {"7": 1.0} if token == "家" else {"0": 1.0}

    with serving(expecting(expected)) as calls:
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        (simulation,) = simulate(client, ["houses"], [np.array([[0, 1, 2, 3, -1]])], words)
        assert "家\tunknown" in asked(calls.bodies[0])
    assert simulation.acts == pytest.approx(np.array([[0.0, 7.0, 7.0, 0.0, 0.0]]))
    assert simulation.n_slots == 3


def test_a_one_that_begins_a_ten_is_a_ten() -> None:
    def expected(_: str, token: str) -> dict[str, float]:
        return {"1": 0.6, "0": 0.4} if token == " cat" else {"1": 0.01, "0": 0.99}

    script = expecting(expected, ten=False, zero_after_one=0.5)
    found, n_calls = asked_of(script)
    # 10 has 0.6 x 0.5 and 1 has 0.6 x 0.5; counted as 1 alone it would be 0.6
    assert found.acts[0, 1] == pytest.approx(10 * 0.3 + 1 * 0.3)
    assert found.acts[0, 0] == pytest.approx(0.01)  # too little to look into
    assert n_calls == found.usage.n_calls == 3
    whole, n_calls = asked_of(expecting(expected, ten=True))
    assert whole.acts[0, 1] == pytest.approx(0.6)  # where 10 is a token, "1" is 1
    assert n_calls == 2


def test_expected_values_are_those_of_the_model_run_directly(monkeypatch) -> None:
    monkeypatch.setattr(llm_simulation, "N_ALTERNATIVES", 256)
    model, tokenizer = reader_of_bytes(), byte_tokens()
    local = LocalClient(model, tokenizer)
    with serving(hosting(local)) as calls:
        served = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        here, there = (simulate(each, ["cats"], [RECORDS], WORDS)[0] for each in (local, served))
    assert here.acts == pytest.approx(there.acts, abs=1e-4)
    text, slots = simulation_text("cats", [" the", " cat", "\n"])
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]

    def shares(prefix: str) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prefix)["input_ids"]])).logits[0, -1]
        return torch.softmax(logits.double(), dim=-1)

    for n, slot in enumerate(slots):
        p = shares(text[:slot])[digits]
        ten = p[1] * shares(text[:slot] + "1")[digits[0]]
        value = (p @ torch.arange(10.0, dtype=torch.float64) + 9 * ten) / p.sum()
        assert here.acts[0, n] == pytest.approx(value.item(), abs=1e-3)
    assert here.n_fallback == 0


def test_one_text_that_cannot_be_read_fails_its_explanation_and_no_other() -> None:
    good = expecting(ten_on_the_token)

    def script(path: str, body: dict[str, Any]) -> Any:
        return Refusal(500) if "fires on: dogs" in asked(body) else good(path, body)

    with serving(script) as calls:
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        cats, dogs = simulate(client, ["the token cat", "dogs"], [RECORDS, RECORDS], WORDS)
    assert cats.failed is None and dogs.failed.failure == "no_answer"
    assert dogs.failed.reason.startswith("HTTP 500")
    assert cats.acts.tolist() == [[0, 10, 0, 0], [0, 0, 0, 0]]
    assert not dogs.acts.any()
    with pytest.raises(ExplainError, match="no vocabulary"):
        simulate(client, ["cats"], [RECORDS], ())
    with serving(lambda *_: {"choices": [{"text": "x"}]}) as calls:
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        with pytest.raises(ClientError, match="no log-probabilities"):
            simulate(client, ["cats"], [RECORDS], WORDS)


def test_a_straight_line_is_that_of_least_squares() -> None:
    x, y = np.array([0.0, 1.0, 4.0, 10.0]), np.array([1.0, 0.5, 3.0, 9.0])
    slope, intercept = np.polyfit(x, y, 1)
    assert straight_line(x, y) == pytest.approx((intercept, slope))
    assert straight_line(np.zeros(3), y[:3]) == (1.5, 0.0)


def test_calibration_gives_units_of_the_hook(tmp_path: Path) -> None:
    explanations = [Explanation(HOOK, 1, "llm", "the token cat"), Explanation(HOOK, 2, "llm", "x")]
    with (
        serving(expecting(ten_on_the_token)) as calls,
        astore.open(planted_store(tmp_path / "run")) as store,
    ):
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        reader = RecordReader(store)
        job = ScoreJob(store, HOOK, reader, client=client)
        ranks = {"top": (0, 1, 2), "random": (0, 1)}
        records = reader.ranked(HOOK, "score", ranks, units=[1, 2])
        ids = records.all_token_ids()
        plain = simulate_by_reading(job, explanations, ids)
        calibrated = simulate_calibrated(job, explanations, ids)
    cat = ids[0] == 1
    assert np.asarray(plain[0])[cat] == pytest.approx(10.0)
    assert np.asarray(calibrated[0])[cat] == pytest.approx(2.5)
    assert np.asarray(calibrated[0])[~cat] == pytest.approx(0.0)
    flat = np.asarray(calibrated[1])[ids[1] >= 0]  # nothing varies, so the mean of what is known
    assert np.ptp(flat) == 0
    assert 0 < flat[0] < 2.5


def test_rows_say_what_asking_took_and_what_was_asked(tmp_path: Path) -> None:
    price = Price(1.0, 2.0)
    with (
        serving(expecting(ten_on_the_token)) as calls,
        astore.open(planted_store(tmp_path / "run"), mode="a") as store,
    ):
        said = [Explanation(HOOK, u, "llm", f"the token {WORDS[u].strip()}") for u in (0, 1)]
        store.append("explanations", [each.row() for each in said])
        client = ServerClient(
            "judge", base_url=calls.base_url, n_retries=0, prices={"judge": price}
        )
        for scorer in ("simulation_tar", "anthropic_intervals"):
            before, spent = len(calls.bodies), client.spent
            lm.score(
                store, HOOK, scorer=scorer, explainer="llm", simulator="llm", client=client, seed=0
            )
            query = """SELECT sum(n_calls), sum(n_prompt_tokens), sum(cost_usd), min(seconds),
                count(DISTINCT prompt_hash), count(*) FILTER (prompt_hash IS NULL) FROM all_scores
                WHERE starts_with(metric, $m) AND unit IS NOT NULL
                AND coalesce(control, '') NOT IN ('shuffled_pairing', 'centre_token')"""
            n_calls, n_tokens, cost, seconds, n_asked, n_silent = store.sql(
                query, m=scorer
            ).fetchone()
            assert n_calls == len(calls.bodies) - before > 0
            assert n_tokens == client.spent.n_prompt_tokens - spent.n_prompt_tokens
            assert cost == pytest.approx(client.spent.cost_usd - (spent.cost_usd or 0.0))
            assert seconds > 0 and n_silent == 0
            assert n_asked == 4, "two units, each with its own explanation and the other's"
        query = """SELECT unit, value FROM all_scores WHERE metric = 'simulation_tar' AND unit < 2
            AND control IS NULL ORDER BY unit"""
        assert store.sql(query).fetchall() == [(0, pytest.approx(1.0)), (1, pytest.approx(1.0))]
        query = """SELECT metric, value IS NULL, failure FROM all_scores
            WHERE unit = 0 AND control IS NULL AND starts_with(metric, 'simulation_tar')"""
        undefined = {row[0]: row[1:] for row in store.sql(query).fetchall()}
        for name in ("r2", "uncentred_r2", "deviation"):  # 0 to 10 is no activation of the hook
            assert undefined[f"simulation_tar_{name}"] == (True, "uncalibrated")
        assert undefined["simulation_tar_spearman"] == (False, None)
