"""Servers and replay: real HTTP on loopback, limits kept, failures typed, nothing paid twice."""

import asyncio
import gzip
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llm_server import Calls, Drip, Refusal, asked, hosting, said, serving
from small_clients import CHAT, byte_tokens, reader_of_bytes

import lmmono
from lmmono.clients.client import Answer, Client, Message, Prompt, final_answer
from lmmono.clients.local import LocalClient
from lmmono.clients.replayed import ReplayClient
from lmmono.clients.server import Limits, Price, ServerClient
from lmmono.errors import ClientError

KEY = "sk-a-secret-of-ours"


def chats(*texts: str) -> list[Prompt]:
    return [Prompt((Message("user", text),)) for text in texts]


def at(calls: Calls, **settings: Any) -> ServerClient:
    return ServerClient("judge", **{"base_url": calls.base_url, "n_retries": 0, **settings})


def echo(_: str, body: dict[str, Any]) -> Any:
    return said("re: " + asked(body))


def test_answers_come_in_the_order_of_prompts_from_no_more_threads_than_allowed() -> None:
    def slower_first(path: str, body: dict[str, Any]) -> Any:
        time.sleep(0.1 if asked(body) in "01" else 0.01)
        return echo(path, body)

    with serving(slower_first) as calls:
        client = at(calls, n_at_once=3)
        answers = client.complete(chats(*"0123456789"), max_tokens=5)
    assert [each.text for each in answers] == [f"re: {i}" for i in range(10)]
    assert 2 <= calls.most_open <= 3
    assert isinstance(client, Client)
    assert client.name == "judge@127.0.0.1"
    assert (client.spent.n_calls, client.spent.n_prompt_tokens) == (10, 100)


def test_every_way_to_fail_is_one_typed_failure_and_costs_one_answer() -> None:
    over = threading.Event()
    ways: dict[str, Any] = {
        "500": lambda: Refusal(500, {"error": {"message": "out of order"}}),
        "429": lambda: Refusal(429, {"error": {"message": "too fast"}}),
        "400": lambda: Refusal(400, {"error": {"message": "too long"}}),
        "time out": lambda: over.wait(30),
        "not JSON": lambda: b"{not json",
        "a page": lambda: b"<html>busy</html>",
        "no choices": lambda: said("x") | {"choices": []},
        "null": lambda: said(None),
        "nothing": lambda: said(""),
        "wrong type": lambda: said("x") | {"choices": "abc"},
        "wrong usage": lambda: said("x", n_prompt_tokens=-1),
        "fine": lambda: said("good"),
    }
    with serving(lambda _, body: ways[asked(body)]()) as calls:
        client = at(calls, timeout_seconds=3.0, n_retries=1, n_at_once=12)
        answers = dict(zip(ways, client.complete(chats(*ways), max_tokens=5), strict=True))
        over.set()
    failures = Counter(each.failure for each in answers.values())
    assert failures == {"no_answer": 4, "unparsed": 7, None: 1}
    assert answers["fine"].text == "good"
    assert answers["500"].detail.startswith("HTTP 500")
    assert "out of order" in answers["500"].detail
    assert answers["time out"].detail == "no answer within 3 s"
    assert all(each.text is None and each.detail for each in answers.values() if each.failure)
    tries = Counter(calls.asked)
    assert (tries["500"], tries["429"], tries["time out"]) == (2, 2, 2)
    assert (tries["400"], tries["not JSON"], tries["fine"]) == (1, 1, 1)
    assert client.spent.n_calls == 12


def test_a_reading_that_does_not_line_up_is_a_failure() -> None:
    lined_up = {"tokens": ["a", " b"], "token_logprobs": [None, -1.0]}
    best = [None, {" b": -1.0}]
    ways: dict[str, Any] = {
        "fine": lined_up | {"top_logprobs": best},
        "with a beginning": {
            "tokens": ["<s>", "a", " b", "!"],
            "token_logprobs": [None, -2.0, -1.0, -0.1],
            "top_logprobs": [None, {"a": -2.0}, {" b": -1.0}, {"!": -0.1}],
        },
        "by offsets": lined_up | {"tokens": ["a", "bytes:\\x20b"], "text_offset": [0, 1]},
        "wrong length": lined_up | {"top_logprobs": best[:1]},
        "another text": lined_up | {"tokens": ["a", "c"]},
        "offsets that go back": lined_up | {"tokens": ["a", "?"], "text_offset": [1, 0]},
    }
    names = iter(ways)

    def script(_: str, body: dict[str, Any]) -> Any:
        assert (body["max_tokens"], body["echo"]) == (0, True)
        sent = said("a b", 2, 0)
        sent["choices"][0]["logprobs"] = ways[next(names)]
        return sent

    with serving(script) as calls:
        client = at(calls, n_at_once=1)
        found = dict(zip(ways, client.read(["a b"] * 6, n_alternatives=1), strict=True))
    assert found["fine"].tokens == ("a", " b")
    assert found["fine"].alternatives == ({}, {" b": -1.0})
    assert found["with a beginning"].tokens == ("a", " b")
    assert found["with a beginning"].logprobs == (-2.0, -1.0)
    assert found["by offsets"].tokens == ("a", " b")
    assert [each.failure for each in found.values()] == [None] * 3 + ["unparsed"] * 3
    with serving(lambda *_: said("a b")) as calls, pytest.raises(ClientError, match="LocalClient"):
        at(calls).read(["a b"])


def test_what_is_wrong_with_the_settings_is_told_at_once() -> None:
    with serving(lambda *_: Refusal(404)) as calls:
        with pytest.raises(ClientError, match=r"check model= and base_url="):
            at(calls).complete(chats("a"), max_tokens=5)
        url = calls.base_url
    with pytest.raises(ClientError, match="cannot be reached"):
        ServerClient("judge", base_url=url, n_retries=0).complete(chats("a"), max_tokens=5)
    for url in (
        "",
        "localhost:8000/v1",
        "file:///v1",
        "http://[::1",
        "http://a:99999",
        "http:///v1",
    ):
        with pytest.raises(ClientError, match=r"base_url: want an address like http://localhost"):
            ServerClient("judge", base_url=url)


def test_the_key_is_sent_and_nowhere_else(tmp_path, monkeypatch, caplog) -> None:
    def script(_: str, body: dict[str, Any]) -> Any:
        told = {"error": {"message": f"Incorrect API key provided: {KEY}"}}
        return {"401": Refusal(401, told), "400": Refusal(400, told)}.get(asked(body), said("x"))

    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with serving(script) as calls:
        server = at(calls, key_variable="JUDGE_KEY")
        with pytest.raises(ClientError, match="environment variable JUDGE_KEY is not set"):
            server.complete(chats("a"), max_tokens=5)
        monkeypatch.setenv("JUDGE_KEY", KEY)
        client = ReplayClient(server, tmp_path / "answers.sqlite")
        answers = client.complete(chats("a", "400"), max_tokens=5)
        with pytest.raises(ClientError, match="the key is refused") as caught:
            client.complete(chats("401"), max_tokens=5)
        assert [each["authorization"] for each in calls.headers] == [f"Bearer {KEY}"] * 3
        at(calls).complete(chats("b"), max_tokens=5)
        assert KEY not in calls.headers[-1]["authorization"]
    said_anywhere = [repr(server), server.name, repr(client), repr(answers), caplog.text]
    said_anywhere += traceback.format_exception(caught.value)
    said_anywhere += [repr({k: v for k, v in vars(server).items() if k != "_server"})]
    assert not [text for text in said_anywhere if KEY in text]
    assert "***" in answers[1].detail
    assert KEY.encode() not in (tmp_path / "answers.sqlite").read_bytes()


def test_limits_refuse_further_calls_and_keep_what_is_done() -> None:
    with serving(echo) as calls:
        client = at(calls, limits=Limits(max_calls=4))
        answers = client.complete(chats(*"0123456789"), max_tokens=5)
        assert Counter(each.failure for each in answers) == {None: 4, "refused": 6}
        assert client.complete(chats("x"), max_tokens=5)[0].failure == "refused"
    assert len(calls.bodies) == 4


@pytest.mark.parametrize("n_at_once", [1, 8])
def test_a_limit_on_cost_is_never_passed(n_at_once: int) -> None:
    prices = {"judge": Price(prompt_usd=10.0, completion_usd=20.0)}
    text = "t" * 20  # at most 36 tokens with the turn, 5 received: 460e-6; real cost 200e-6
    with serving(echo) as calls:
        limits = Limits(max_cost_usd=1e-3)
        client = at(calls, prices=prices, limits=limits, n_at_once=n_at_once)
        answers = client.complete(chats(*[text] * 10), max_tokens=5)
    spent = client.spent.cost_usd
    assert spent == pytest.approx(2e-4 * len(calls.bodies))
    assert spent <= 1e-3
    if n_at_once == 1:  # 0, 200, 400: another 460 fits within 1,000; at 600 it does not
        assert Counter(each.failure for each in answers) == {None: 3, "refused": 7}
        assert answers[0].usage.cost_usd == pytest.approx(2e-4)
    with pytest.raises(ClientError, match="pass prices="):
        at(calls, limits=Limits(max_cost_usd=1.0))


def test_calls_begin_no_faster_than_allowed() -> None:
    with serving(echo) as calls:
        client = at(calls, limits=Limits(calls_per_minute=1200.0))
        began = time.monotonic()
        client.complete(chats(*"012345"), max_tokens=5)
        assert time.monotonic() - began >= 5 * 0.05


def test_a_server_gives_what_the_model_behind_it_gives() -> None:
    local = LocalClient(reader_of_bytes(), byte_tokens(CHAT))
    turns = [Prompt((Message("system", "be brief"), Message("user", each))) for each in "ab"]
    prompts = [*turns, Prompt(text="the cat")]
    with serving(hosting(local)) as calls:
        served = at(calls)
        for settings in ({}, {"temperature": 1.0, "seed": 5}, {"n_alternatives": 2}):
            here = local.complete(prompts, max_tokens=8, **settings)
            there = served.complete(prompts, max_tokens=8, **settings)
            assert [each.text for each in there] == [each.text for each in here]
            assert [each.tokens for each in there] == [each.tokens for each in here]
        texts = ["the cat", "a dog"]
        here, there = (each.read(texts, n_alternatives=2) for each in (local, served))
        for a, b in zip(here, there, strict=True):
            assert a.tokens == b.tokens
            assert list(a.logprobs[1:]) == pytest.approx(list(b.logprobs[1:]), abs=1e-4)
            assert [set(each) for each in a.alternatives] == [set(each) for each in b.alternatives]


def test_replay_asks_each_question_once(tmp_path) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(echo) as calls:
        prices = {"judge": Price(1.0, 1.0)}
        client = ReplayClient(at(calls, prices=prices), path)
        first = client.complete(chats("a", "b", "a"), max_tokens=5)
        assert [each.text for each in first] == ["re: a", "re: b", "re: a"]
        assert [each.usage.n_calls for each in first] == [1, 1, 0]
        heard: dict[int, Answer] = {}
        again = client.complete(chats("b", "c", "a"), max_tokens=5, on_answer=heard.__setitem__)
        assert heard == dict(enumerate(again))
        assert sorted(calls.asked) == ["a", "b", "c"]
        assert [each.usage.n_calls for each in again] == [0, 1, 0]
        assert [each.usage.cost_usd for each in again] == [0.0, pytest.approx(15e-6), 0.0]
        assert (len(client), client.n_found) == (3, 2)
        client.complete(chats("a"), max_tokens=6)
        client.complete(chats("a"), max_tokens=5, temperature=1.0, seed=0)
        client.complete(chats("a"), max_tokens=5, temperature=1.0, seed=1)
        client.complete(chats("a"), max_tokens=5, seed=1)  # no sampling, so no new question
        assert len(calls.bodies) == 6
        name = client.name
    offline = ReplayClient(name, path)
    answers = offline.complete(chats("a", "never asked"), max_tokens=5)
    assert [each.text for each in answers] == ["re: a", None]
    assert answers[1].failure == "refused"
    assert "nothing is asked" in repr(offline)


def test_replay_keeps_readings_and_no_failures(tmp_path) -> None:
    local = LocalClient(reader_of_bytes(), byte_tokens())
    client = ReplayClient(local, tmp_path / "answers.sqlite")
    fresh = client.read(["the cat", "é"], n_alternatives=2)
    before = local.n_tokens_run
    again = client.read(["the cat", "é"], n_alternatives=2)
    assert local.n_tokens_run == before
    for a, b in zip(fresh, again, strict=True):
        assert (a.tokens, a.logprobs, a.alternatives) == (b.tokens, b.logprobs, b.alternatives)
    with serving(lambda *_: Refusal(500)) as calls:
        failing = ReplayClient(at(calls), tmp_path / "failing.sqlite")
        for _ in range(2):
            assert failing.complete(chats("a"), max_tokens=5)[0].failure == "no_answer"
        assert (len(calls.bodies), len(failing)) == (2, 0)


def test_replay_files_are_shared_and_others_are_left_alone(tmp_path) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(echo) as calls:
        clients = [ReplayClient(at(calls), path) for _ in range(4)]
        prompts = chats(*map(str, range(20)))
        threads = [
            threading.Thread(target=each.complete, args=(prompts,), kwargs={"max_tokens": 5})
            for each in clients
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(clients[0]) == 20
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()
    foreign = tmp_path / "notes.txt"
    foreign.write_text("no database " * 100)
    with pytest.raises(ClientError, match="cannot be used"):
        ReplayClient("judge", foreign)
    assert foreign.read_text() == "no database " * 100


@pytest.mark.parametrize("n_retries", [0, 1])
def test_a_call_ends_at_its_deadline_however_slowly_bytes_come(n_retries: int) -> None:
    with serving(lambda *_: Drip(said("slow"))) as calls:  # 0.05 s a byte: 12 s in all
        client = at(calls, timeout_seconds=1.0, n_retries=n_retries)
        began = time.monotonic()
        (answer,) = client.complete(chats("a"), max_tokens=5)
        took = time.monotonic() - began
    assert (answer.failure, answer.detail) == ("no_answer", "no answer within 1 s")
    assert 1.0 <= took < 1.0 + 1.5 * n_retries + 2.0


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_answer_without_end_is_read_up_to_a_bound(is_packed: bool, monkeypatch) -> None:
    """A packed one counts unpacked: a thousand bytes may stand for a million."""
    monkeypatch.setattr("lmmono.clients.server.MAX_BODY_BYTES", 100_000)
    headers = {"Content-Encoding": "gzip"} if is_packed else {}

    def script(path: str, body: dict[str, Any]) -> Any:
        raw = json.dumps(said("x" * (1_000_000 if asked(body) == "long" else 1_000))).encode()
        return Refusal(200, gzip.compress(raw) if is_packed else raw, headers)

    with serving(script) as calls:
        client = at(calls, n_retries=0)
        long, short = client.complete(chats("long", "short"), max_tokens=5)
    assert (long.failure, long.text) == ("unparsed", None)
    assert long.detail == "the server sent more than 100,000 bytes; read no further"
    assert short.text == "x" * 1_000


def test_a_redirect_takes_the_prompt_nowhere() -> None:
    with serving(echo) as other, serving(lambda *_: None) as calls:
        target = f"{other.base_url}/chat/completions"
        with (
            serving(lambda *_: Refusal(307, headers={"Location": target})) as calls,
            pytest.raises(ClientError, match=r"judge@127.0.0.1: .*HTTP 307.*base_url="),
        ):
            at(calls).complete(chats("a secret text"), max_tokens=5)
    assert other.bodies == []


def test_absurd_numbers_cost_one_answer_and_no_other() -> None:
    def with_usage(number: str) -> bytes:
        usage = f'"usage": {{"prompt_tokens": {number}, "completion_tokens": 1}}'
        return f'{{"choices": [{{"message": {{"content": "x"}}}}], {usage}}}'.encode()

    def with_logprob(number: str) -> bytes:
        token = f'{{"token": "x", "logprob": {number}, "top_logprobs": []}}'
        logprobs = f'"logprobs": {{"content": [{token}]}}'
        return f'{{"choices": [{{"message": {{"content": "x"}}, {logprobs}}}]}}'.encode()

    ways = {f"usage {n}": with_usage(n) for n in ("1" + "0" * 400, "1e400", "NaN", "2.5")}
    ways |= {f"logprob {n}": with_logprob(n) for n in ("NaN", "Infinity", "1000", "0.1")}
    ways |= {"fine": with_logprob("-0.5"), "rounded": with_logprob("1e-7")}
    prices = {"judge": Price(1.0, 1.0)}
    with serving(lambda _, body: ways[asked(body)]) as calls:
        client = at(calls, prices=prices, limits=Limits(max_cost_usd=1.0))
        answers = dict(zip(ways, client.complete(chats(*ways), max_tokens=5), strict=True))
    failed = {name for name, answer in answers.items() if answer.failure == "unparsed"}
    assert failed == set(ways) - {"fine", "rounded"}
    assert all(answers[name].text == "x" for name in ("fine", "rounded"))


def test_alternatives_that_cannot_be_are_left_out_of_a_reading() -> None:
    def script(*_: Any) -> Any:
        best = [None, {" b": -1.0, "c": None, "d": -9999.0}]
        sent = said("a b", 2, 0)
        sent["choices"][0]["logprobs"] = {
            "tokens": ["a", " b"],
            "token_logprobs": [None, 1e-6],
            "top_logprobs": best,
        }
        return sent

    with serving(script) as calls:
        (reading,) = at(calls).read(["a b"], n_alternatives=3)
    assert reading.alternatives == ({}, {" b": -1.0, "d": -9999.0})
    assert reading.logprobs == (None, 0.0)


def test_a_server_that_sends_the_key_back_gets_it_into_no_answer_and_no_file(
    tmp_path, monkeypatch
) -> None:
    def script(_: str, body: dict[str, Any]) -> Any:
        sent = said(f"your key is {KEY}")
        pieces = ["your key is ", KEY[:7], KEY[7:]]
        content = [{"token": p, "logprob": -0.1, "top_logprobs": []} for p in pieces]
        sent["choices"][0]["logprobs"] = {"content": content}
        return sent

    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(script) as calls:
        client = ReplayClient(at(calls, key_variable="JUDGE_KEY"), tmp_path / "answers.sqlite")
        (answer,) = client.complete(chats("a"), max_tokens=5, n_alternatives=1)
    assert answer.text == "your key is ***"
    assert answer.tokens == ()
    with sqlite3.connect(tmp_path / "answers.sqlite") as file:
        ((packed,),) = file.execute("SELECT answer FROM answers").fetchall()
    file.close()
    assert KEY[7:] not in zlib.decompress(packed).decode()


@pytest.mark.parametrize("key", [KEY + "\n", "sk-ключ", "two keys"])
def test_a_key_that_no_header_can_hold_is_told_without_being_sent(key, monkeypatch, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", key)
    with serving(echo) as calls:
        with pytest.raises(
            ClientError, match="environment variable JUDGE_KEY holds a blank"
        ) as told:
            at(calls, key_variable="JUDGE_KEY").complete(chats("a"), max_tokens=5)
        assert calls.bodies == []
    assert key.strip() not in f"{told.value}{caplog.text}"


def test_a_server_that_wants_another_name_for_the_length_gets_it() -> None:
    def script(path: str, body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Refusal(400, {"error": {"message": told}})
        return said(f"{body['max_completion_tokens']} tokens")

    with serving(script) as calls:
        client = at(calls, n_at_once=4)
        answers = client.complete(chats(*"abcdefgh"), max_tokens=7)
        assert [answer.text for answer in answers] == ["7 tokens"] * 8
        n_calls = len(calls.bodies)
        client.complete(chats("i"), max_tokens=7)
        assert len(calls.bodies) == n_calls + 1, "it is remembered"
    assert client.spent.n_calls == 9


def test_what_else_is_sent_is_a_setting_and_part_of_the_name() -> None:
    with serving(echo) as calls:
        plain = at(calls)
        extra = {"reasoning_effort": "low", "temperature": None}
        thinking = at(calls, extra_body=extra)
        thinking.complete(chats("a"), max_tokens=5)
        assert calls.bodies[0]["reasoning_effort"] == "low"
        assert "temperature" not in calls.bodies[0]
    assert thinking.name.startswith("judge@127.0.0.1+")
    assert len({plain.name, thinking.name, at(calls, extra_body={"top_p": 0.9}).name}) == 3
    bases = ("http://a/v1", "http://a:9/v1/", "http://a/team/v1", "http://a/other/v1", "http://a")
    names = [ServerClient("m", base_url=base).name for base in bases]
    assert names == ["m@a", "m@a", "m@a/team", "m@a/other", "m@a"]


def test_a_caller_with_an_event_loop_of_its_own_may_ask() -> None:
    async def notebook(client: ServerClient) -> list[Answer]:
        return client.complete(chats("a"), max_tokens=5)

    with serving(echo) as calls:
        assert asyncio.run(notebook(at(calls)))[0].text == "re: a"


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("plain", "plain"),
        ("<think>a [1]\nb</think>\n\nthe answer", "the answer"),
        ("the template opened it</think>the answer", "the answer"),
        ("<think>never done", ""),
        ("```json\n[0, 1]\n```", "[0, 1]"),
        ("<think>x</think>\n```\nlines\nof text\n```\n", "lines\nof text"),
        ("text with ```code``` in it", "text with ```code``` in it"),
        ("it fires on <think>", "it fires on <think>"),
        ("", ""),
    ],
)
def test_the_final_answer_is_what_follows_thinking_inside_a_fence(answer: str, final: str) -> None:
    assert final_answer(answer) == final


@pytest.mark.parametrize(
    "damage",
    [
        b"no zlib",
        zlib.compress(b"{not json"),
        zlib.compress(b"{}"),
        zlib.compress(b'{"text": 5}'),
        zlib.compress(b'{"text": "x", "usage": {"n_calls": "many"}}'),
        zlib.compress(b'{"text": "x", "tokens": 3}'),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b'{"text": "\xff"}'),
        "text",
        None,
    ],
)
def test_a_damaged_row_of_a_replay_file_is_named_with_the_way_out(tmp_path, damage) -> None:
    path = tmp_path / "answers.sqlite"
    with serving(echo) as calls:
        client = ReplayClient(at(calls), path)
        client.complete(chats("a"), max_tokens=5)
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE loose AS SELECT * FROM answers")
            file.execute("DROP TABLE answers")
            file.execute("ALTER TABLE loose RENAME TO answers")
            file.execute("UPDATE answers SET answer = ?", (damage,))
        file.close()
        with pytest.raises(
            ClientError, match=r"answers\.sqlite: .*is damaged.*DELETE FROM answers"
        ):
            client.complete(chats("a"), max_tokens=5)


PROGRAM = """
import sys
from lmmono.clients.client import Message, Prompt
from lmmono.clients.replayed import ReplayClient
from lmmono.clients.server import ServerClient
client = ReplayClient(ServerClient("judge", base_url=sys.argv[1], n_at_once=3), sys.argv[2])
client.complete([Prompt((Message("user", str(i)),)) for i in range(20)], max_tokens=5)
assert "torch" not in sys.modules
"""


def test_after_a_kill_no_answered_call_is_repeated(tmp_path) -> None:
    held, free = threading.Semaphore(0), threading.Event()
    answered: list[str] = []

    def script(path: str, body: dict[str, Any]) -> Any:
        if int(asked(body)) >= 9 and not free.is_set():
            held.release()
            free.wait(60)
            return Refusal(503)  # the client is dead by now
        answered.append(asked(body))
        return echo(path, body)

    with serving(script) as calls:
        command = [sys.executable, "-c", PROGRAM, calls.base_url, str(tmp_path / "a.sqlite")]
        with subprocess.Popen(command) as process:
            for _ in range(3):  # each thread keeps an answer before its next call is made
                assert held.acquire(timeout=60)
            process.kill()
        assert sorted(map(int, answered)) == list(range(9))
        free.set()
        assert subprocess.run(command, check=False).returncode == 0
    counts = Counter(answered)
    assert {int(each) for each in counts} == set(range(20))
    assert set(counts.values()) == {1}


def test_the_clients_are_public() -> None:
    assert lmmono.LocalClient is LocalClient
    assert lmmono.ServerClient is ServerClient
    assert lmmono.ReplayClient is ReplayClient
    assert Path(lmmono.__file__).parent.name == "lmmono"
