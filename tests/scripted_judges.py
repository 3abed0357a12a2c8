"""Clients that answer by a rule, so that the right score is known."""

import re
from collections.abc import Callable

import numpy as np

from lmmono.clients.client import Answer, AnswerFailure, Reading, Usage


class Scripted:
    """Answers each prompt by a function of its last message."""

    def __init__(
        self,
        rule: Callable[[str], str | None],
        *,
        name: str = "scripted",
        failure: AnswerFailure = "no_answer",
        detail: str = "",
    ):
        self.rule, self.prompts, self.name = rule, [], name
        self.failure, self.detail = failure, detail

    def complete(self, prompts, *, max_tokens, **settings):
        self.prompts += prompts
        return [self._answer(prompt.messages[-1].content) for prompt in prompts]

    def _answer(self, question):
        text = self.rule(question)
        if text is None:
            return Answer(None, self.failure, self.detail, usage=Usage(1, 10, 0))
        return Answer(text, usage=Usage(1, 10, 5))

    def read(self, texts, **settings):
        return [Reading(failure="no_answer", detail=self.detail) for _ in texts]


def texts_of(question: str) -> list[str]:
    return re.findall(r"^Text \d+:(.*)$", question, flags=re.MULTILINE)


def labels(fires: Callable[[str], bool]) -> Callable[[str], str]:
    """Return a rule that lists 1 for the texts where the function holds."""
    return lambda question: str([int(fires(text)) for text in texts_of(question)])


always, never = labels(lambda _: True), labels(lambda _: False)


def at_random(seed: int = 0) -> Callable[[str], str]:
    rng = np.random.default_rng(seed)
    return labels(lambda _: bool(rng.random() < 0.5))
