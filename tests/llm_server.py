"""An OpenAI-compatible server on loopback whose answers a test writes: HTTP as it is, no model.

A script takes path and body of a call and returns what is sent: a value (JSON), bytes as they are,
a `Refusal`, a `Drip`, or it may sleep or wait before that.
"""

import json
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmmono.clients.client import Message, Prompt
from lmmono.clients.local import LocalClient


@dataclass(frozen=True)
class Refusal:
    """An HTTP error."""

    status: int
    body: Any = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drip:
    """An answer whose bytes come one by one, from the first header on."""

    body: Any
    pause_seconds: float = 0.05


Script = Callable[[str, dict[str, Any]], Any]


@dataclass
class Calls:
    """What came to the server."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    n_open: int = 0
    most_open: int = 0

    @property
    def asked(self) -> list[str]:
        """What was asked, in the order of arrival: the last turn, or the text."""
        return [asked(body) for body in self.bodies]


def asked(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def said(text: str | None, n_prompt_tokens: int = 10, n_completion_tokens: int = 5) -> Any:
    """Return the body that answers a chat or a bare text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "text": text}
    usage = {"prompt_tokens": n_prompt_tokens, "completion_tokens": n_completion_tokens}
    return {"id": "1", "choices": [choice], "usage": usage}


@contextmanager
def serving(script: Script) -> Generator[Calls, None, None]:
    """Serve a script on a free port of this machine."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                calls.bodies.append(body)
                calls.headers.append({k.lower(): v for k, v in self.headers.items()})
                calls.n_open += 1
                calls.most_open = max(calls.most_open, calls.n_open)
            sent = script(self.path.removeprefix("/v1"), body)
            status = sent.status if isinstance(sent, Refusal) else 200
            content = sent.body if isinstance(sent, Refusal | Drip) else sent
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            with lock:
                calls.n_open -= 1
            try:
                if isinstance(sent, Drip):
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
                    for byte in head + raw:
                        self.wfile.write(bytes([byte]))
                        time.sleep(sent.pause_seconds)
                    return
                self.send_response(status)
                for name, value in getattr(sent, "headers", {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                pass  # the client has gone

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    calls = Calls(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hosting(client: LocalClient) -> Script:
    """Return a script that answers with a local model, as a real server would."""

    def script(path: str, body: dict[str, Any]) -> Any:
        k = int(body.get("top_logprobs") or body.get("logprobs") or 0)
        if body.get("echo"):
            return _echo(client, body["prompt"], k)
        turns = tuple(Message(m["role"], m["content"]) for m in body.get("messages", []))
        prompt = Prompt(turns, "" if turns else body["prompt"])
        (answer,) = client.complete(
            [prompt],
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body.get("seed", 0),
            n_alternatives=k,
        )
        if answer.failure:
            return Refusal(400, {"error": {"message": answer.detail}})
        sent = said(answer.text, answer.usage.n_prompt_tokens, answer.usage.n_completion_tokens)
        pairs = list(zip(answer.tokens, answer.alternatives, strict=True))
        if path == "/chat/completions" and k:
            content = [
                {
                    "token": token,
                    "logprob": found[token],
                    "top_logprobs": [{"token": t, "logprob": p} for t, p in found.items()],
                }
                for token, found in pairs
            ]
            sent["choices"][0]["logprobs"] = {"content": content}
        elif k:
            sent["choices"][0]["logprobs"] = {
                "tokens": list(answer.tokens),
                "token_logprobs": [found[token] for token, found in pairs],
                "top_logprobs": list(answer.alternatives),
            }
        return sent

    return script


def _echo(client: LocalClient, text: str, k: int) -> Any:
    (reading,) = client.read([text], n_alternatives=k)
    if reading.failure:
        return Refusal(400, {"error": {"message": reading.detail}})
    sent = said(text, reading.usage.n_prompt_tokens, 0)
    sent["choices"][0]["logprobs"] = {
        "tokens": list(reading.tokens),
        "token_logprobs": list(reading.logprobs),
        "top_logprobs": [found or None for found in reading.alternatives],
    }
    return sent
