"""What an OpenAI-compatible server sends back, as far as it is read here; the rest is ignored."""

from itertools import accumulate, pairwise

from pydantic import BaseModel, Field, ValidationError

from lmmono.clients.client import Answer, Reading, Usage


class MissingLogprobs(Exception):
    """The server sends no log-probabilities of the prompt."""


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int | None = Field(default=0, ge=0)


class _Alternative(BaseModel):
    token: str
    logprob: float


class _Token(_Alternative):
    top_logprobs: list[_Alternative] = []


class _ChatLogprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None


class _ChatChoice(BaseModel):
    message: _Message
    logprobs: _ChatLogprobs | None = None


class _Chat(BaseModel):
    choices: list[_ChatChoice]
    usage: _Usage | None = None


class _TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None
    text_offset: list[int] | None = None


class _TextChoice(BaseModel):
    text: str | None = None
    logprobs: _TextLogprobs | None = None


class _Text(BaseModel):
    choices: list[_TextChoice]
    usage: _Usage | None = None


def chat_answer(body: bytes) -> Answer:
    """Return the answer in a body of `/v1/chat/completions`."""
    try:
        sent = _Chat.model_validate_json(body)
    except ValidationError as error:
        return Answer(None, "unparsed", _said(error))
    usage = _usage(sent.usage)
    if not sent.choices or not sent.choices[0].message.content:
        return Answer(None, "no_answer", "the answer is empty", usage=usage)
    choice = sent.choices[0]
    content = (choice.logprobs and choice.logprobs.content) or []
    return Answer(
        choice.message.content,
        tokens=tuple(each.token for each in content),
        alternatives=tuple(
            {other.token: other.logprob for other in each.top_logprobs} for each in content
        ),
        usage=usage,
    )


def text_answer(body: bytes) -> Answer:
    """Return the answer in a body of `/v1/completions`."""
    try:
        sent = _Text.model_validate_json(body)
    except ValidationError as error:
        return Answer(None, "unparsed", _said(error))
    usage = _usage(sent.usage)
    if not sent.choices or not sent.choices[0].text:
        return Answer(None, "no_answer", "the answer is empty", usage=usage)
    choice = sent.choices[0]
    if choice.logprobs is None:
        return Answer(choice.text, usage=usage)
    alternatives = tuple(each or {} for each in choice.logprobs.top_logprobs or [])
    return Answer(
        choice.text, tokens=tuple(choice.logprobs.tokens), alternatives=alternatives, usage=usage
    )


def reading(body: bytes, text: str) -> Reading:
    """Return what a body of `/v1/completions` with `echo` says of a text.

    Tokens that a server adds before the text are left out; those after it, too.

    Raises:
        MissingLogprobs: There are no log-probabilities in it.
    """
    try:
        sent = _Text.model_validate_json(body)
    except ValidationError as error:
        return Reading(failure="unparsed", detail=_said(error))
    usage = _usage(sent.usage)
    if not sent.choices:
        return Reading(failure="no_answer", detail="the answer is empty", usage=usage)
    found = sent.choices[0].logprobs
    if found is None:
        raise MissingLogprobs
    alternatives = found.top_logprobs or [None] * len(found.tokens)
    lengths = {len(found.tokens), len(found.token_logprobs), len(alternatives)}
    place = None if len(lengths) > 1 else _place(found, text)
    if place is None:
        detail = "tokens, log-probabilities and text do not line up"
        return Reading(failure="unparsed", detail=detail, usage=usage)
    first, bounds = place
    there = slice(first, first + len(bounds) - 1)
    return Reading(
        tuple(text[a:b] for a, b in pairwise(bounds)),
        tuple(found.token_logprobs[there]),
        tuple(each or {} for each in alternatives[there]),
        usage=usage,
    )


def _place(found: _TextLogprobs, text: str) -> tuple[int, list[int]] | None:
    """Return the first token of the text, and where its tokens begin and the last one ends.

    Joined tokens are not the text where a character is of several tokens; then offsets are needed.
    """
    ends = list(accumulate((len(token) for token in found.tokens), initial=0))
    at = "".join(found.tokens).find(text)
    if at in ends and at + len(text) in ends:
        first, last = ends.index(at), ends.index(at + len(text))
        return first, [end - at for end in ends[first : last + 1]]
    offsets = found.text_offset or []
    inside = [offset for offset in offsets if offset < len(text)]
    ascending = all(a <= b for a, b in pairwise(offsets)) and inside[:1] == [0]
    if len(offsets) != len(found.tokens) or not ascending:
        return None
    return 0, [*inside, len(text)]


def _usage(sent: _Usage | None) -> Usage:
    sent = sent or _Usage()
    return Usage(1, sent.prompt_tokens, sent.completion_tokens or 0)


def _said(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "body"
    return f"the server sent something else than an answer: {where}: {first['msg']}"
