"""Explainers that ask a language model to put into words what a unit does.

What cannot be read as an explanation is the failure `unparsed`, a row of its own.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lmmono.clients.client import Answer, Prompt
from lmmono.errors import ExplainError
from lmmono.explanations.explainer_registry import Task
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_examples import Shown
from lmmono.explanations.llm_prompts import (
    contrastive_prompt,
    levels,
    max_act_prompt,
    pairs_prompt,
    parse_explanation,
)
from lmmono.explanations.llm_ranking import rank_values
from lmmono.records.sampler import Kind

FIRING: tuple[Kind, ...] = ("top", "quantile", "firing")
"""Kinds of records that are shown as firing."""

SILENT: tuple[Kind, ...] = ("near_miss", "random")
"""Kinds of records that are shown as silent, where the unit is."""

MOST_SILENT = 5
"""Silent excerpts that are shown, near misses first."""


def explain_by_pairs(task: Task) -> list[Explanation]:
    """Explain by tokens and their activations, line by line; see `explain_by`."""
    return explain_by(task, lambda i: pairs_prompt(shown_records(task, i, FIRING)))


def explain_by_max_act(task: Task) -> list[Explanation]:
    """Explain by excerpts with the tokens that fire marked; see `explain_by`."""
    return explain_by(task, lambda i: max_act_prompt(shown_records(task, i, FIRING)))


def explain_by_contrast(task: Task) -> list[Explanation]:
    """Explain by excerpts that fire against excerpts that do not; see `explain_by`."""
    return explain_by(task, lambda i: _contrast(task, i))


def _contrast(task: Task, i: int) -> Prompt:
    others = shown_records(task, i, SILENT)
    silent = [record for record in others if not any(act for _, act in record)]
    return contrastive_prompt(shown_records(task, i, FIRING), silent[:MOST_SILENT])


def shown_records(task: Task, i: int, kinds: tuple[Kind, ...]) -> list[Shown]:
    """Return the i-th unit's records of some kinds, in the order of kinds, activations 0 to 10.

    Raises:
        ExplainError: The store has no strings of tokens.
    """
    records = task.records
    if not task.vocabulary:
        raise ExplainError(f"{task.explainer}: the store has no vocabulary; capture it anew")
    columns = [int(c) for kind in kinds for c in records.columns(kind) if records.index[i, c] >= 0]
    ids = records.token_ids(i)[columns]
    acts = levels(records.acts[i][columns], float(records.acts[i].max(initial=0.0)))
    return [
        tuple((task.vocabulary[t], int(act)) for t, act in zip(*row, strict=True) if t >= 0)
        for row in zip(ids, acts, strict=True)
    ]


def explain_by(task: Task, prompt_of: Callable[[int], Prompt]) -> list[Explanation]:
    """Ask for an explanation of each unit; return one, or all candidates, best first.

    Settings: `n_candidates`, how many are asked for; `temperature` of the sampling; `max_tokens` of
    an answer; `rank_by`, what ranks several (`simulation`, or a `Ranking`).

    Raises:
        ExplainError: Several candidates at temperature 0, which would be the same; or an unknown
            ranking.
        ClientError: The model cannot be asked.
    """
    client, settings = task.client, task.settings
    assert client is not None
    n, temperature = int(settings["n_candidates"]), float(settings["temperature"])
    if n > 1 and temperature == 0:
        raise ExplainError(f"{task.explainer}: {n} candidates at temperature 0 are all the same")
    refused = [task.refused(i) for i in range(len(task.records.units))]
    asked = [i for i, each in enumerate(refused) if each is None]
    prompts = [prompt_of(i) for i in asked]
    candidates: dict[int, list[Explanation]] = {i: [] for i in asked}
    for k in range(n):
        answers = client.complete(
            prompts,
            max_tokens=int(settings["max_tokens"]),
            temperature=temperature,
            seed=task.seed * 1009 + k,
        )
        for i, prompt, answer in zip(asked, prompts, answers, strict=True):
            candidates[i].append(_explanation(task, i, prompt, answer))
        task.progress(f"ask {client.name}", k + 1, n)
    if n > 1:
        candidates = _ranked(task, candidates, settings["rank_by"])
    found = [[each] if each is not None else candidates[i] for i, each in enumerate(refused)]
    return [each for some in found for each in some]


def _explanation(task: Task, i: int, prompt: Prompt, answer: Answer) -> Explanation:
    assert task.client is not None
    facts: dict[str, Any] = {"model": task.client.name, "prompt_hash": prompt.sha256}
    facts |= {"usage": answer.usage}
    if answer.text is None:
        return task.failed(i, answer.failure or "no_answer", **facts)
    text = parse_explanation(answer.text)
    if text is None:
        return task.failed(i, "unparsed", **facts)
    return task.explained(i, text, None, **facts)


def _ranked(
    task: Task, candidates: dict[int, list[Explanation]], by: Any
) -> dict[int, list[Explanation]]:
    """Return the candidates of each unit with their ranks, best first, failures last."""
    n_units = len(task.records.units)
    good = [[each for each in candidates.get(i, []) if each.text] for i in range(n_units)]
    texts = [[each.text or "" for each in some] for some in good]
    values = rank_values(task, by, texts)
    ranked: dict[int, list[Explanation]] = {}
    for i, some in candidates.items():
        worth = np.array([value for value, _ in values[i]], np.float64)
        order = np.argsort(-np.nan_to_num(worth, nan=-np.inf), kind="stable")
        costed = [
            replace(each, usage=each.usage + usage)
            for each, (_, usage) in zip(good[i], values[i], strict=True)
        ]
        first = [costed[place] for place in order] + [each for each in some if not each.text]
        ranked[i] = [replace(each, rank=rank) for rank, each in enumerate(first, start=1)]
    return ranked
