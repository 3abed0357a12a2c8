"""A judge whose every answer is known: it explains by the token that fires, and expects as told."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from llm_server import Script, said

Expected = Callable[[str, str], dict[str, float]]
"""Explanation and token to the probability of each next token at its slot."""


def pieces(text: str, *, ten: bool) -> list[str]:
    """Return tokens: words, numbers (or digits, where "10" is two tokens), single characters."""
    return re.findall((r"\d+" if ten else r"\d") + r"|[^\W\d]+|.", text, re.DOTALL)


def expecting(expected: Expected, *, ten: bool = True, zero_after_one: float = 0.0) -> Script:
    """Return a script that reads texts with these probabilities at each slot."""

    def script(_: str, body: dict[str, Any]) -> Any:
        text, tokens = body["prompt"], pieces(body["prompt"], ten=ten)
        explanation = text.rpartition("This unit fires on: ")[2].partition("\n")[0]
        best: list[dict[str, float] | None] = []
        at = 0
        for token in tokens:
            line = text[:at].rpartition("\n")[2]
            is_slot = line.endswith("\t")
            shares = expected(explanation, line[:-1]) if is_slot else {token: 1.0}
            best.append({each: math.log(share) for each, share in shares.items()})
            at += len(token)
        sent = said(text, len(tokens), 0)
        logprobs: list[float | None] = [None, *[-1.0] * (len(tokens) - 1)]
        if text.endswith("\t10") and not ten:
            logprobs[-1] = math.log(zero_after_one)
        sent["choices"][0]["logprobs"] = {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": [None, *best[1:]],
        }
        return sent

    return script


def explains_by_token(body: dict[str, Any]) -> str:
    """Return the token that fires in the last turn: in lines with a tab, or double brackets."""
    asked = body["messages"][-1]["content"]
    lines = [line.rpartition("\t") for line in asked.splitlines() if "\t" in line]
    firing = [token for token, _, act in lines if act != "0"] or re.findall(r"\[\[(.*?)\]\]", asked)
    return Counter(token.strip() for token in firing).most_common(1)[0][0]


def ten_on_the_token(explanation: str, token: str) -> dict[str, float]:
    """Expect 10 on the token that an explanation names, 0 elsewhere."""
    return {"10": 1.0} if explanation == f"the token {token.strip()}" else {"0": 1.0}
