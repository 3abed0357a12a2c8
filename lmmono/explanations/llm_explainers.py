"""Explainers that ask a language model to put into words what a unit does.

What cannot be read as an explanation is the failure `unparsed`, a row of its own. Of several
candidates the best is chosen by records of split `explain` that their writer did not see; records
of split `score` are never read here: what chooses an explanation must not score it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.clients.client import Answer, Prompt, Usage, final_answer
from lmmono.errors import ExplainError
from lmmono.explanations.explain_task import ExplainTask
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.llm_prompts import (
    ANSWER,
    Shown,
    characters_of,
    contrastive_prompt,
    levels,
    max_act_prompt,
    pairs_prompt,
    parse_explanation,
)
from lmmono.explanations.llm_simulation import Simulation, simulate
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import Counts, Kind, Records

FIRING: tuple[Kind, ...] = ("top", "quantile", "firing")
"""Kinds of records that are shown as firing."""

SILENT: tuple[Kind, ...] = ("near_miss", "random")
"""Kinds of records that are shown as silent, where the unit is."""

MOST_SILENT = 5
"""Silent excerpts that are shown, near misses first."""

SEEDS_PER_CALL = 1009
"""Candidates of two explain seeds never share a seed, up to so many of them."""

N_TOP, N_RANDOM = 5, 5
"""Records that rank candidates, of those that were not shown (as many as Bills et al. 2023 score
with)."""

Score = Callable[[str, Int[ndarray, "records window"], Float[ndarray, "records window"]], float]
"""How good an explanation is on tokens and their activations; more is better, NaN is worst."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """What ranks explanations, given by the caller."""

    name: str
    """Name in tables."""
    score: Score
    """Explanation, tokens and activations to a number."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class AskSettings:
    """What may be set of an explainer that asks a language model."""

    n_candidates: int
    """Explanations asked for."""
    temperature: float
    """Temperature of the sampling; 0 takes the likeliest token."""
    max_tokens: int
    """Most tokens of an answer; models that think aloud want thousands."""
    rank_by: Ranking | str
    """What chooses among several: `simulation`, the correlation of activations that the client
    expects with the true ones; or the caller's own."""


def explain_by_pairs(task: ExplainTask) -> list[Explanation]:
    """Explain by tokens and their activations, line by line; see `explain_by`."""
    return explain_by(task, lambda i: pairs_prompt(shown_records(task, i, FIRING)))


def explain_by_max_act(task: ExplainTask) -> list[Explanation]:
    """Explain by excerpts with the tokens that fire marked; see `explain_by`."""
    return explain_by(task, lambda i: max_act_prompt(shown_records(task, i, FIRING)))


def explain_by_contrast(task: ExplainTask) -> list[Explanation]:
    """Explain by excerpts that fire against excerpts that do not; see `explain_by`."""

    def prompt_of(i: int) -> Prompt:
        others = shown_records(task, i, SILENT)
        silent = [record for record in others if not any(act for _, act in record)]
        return contrastive_prompt(shown_records(task, i, FIRING), silent[:MOST_SILENT])

    return explain_by(task, prompt_of)


def shown_records(task: ExplainTask, i: int, kinds: tuple[Kind, ...]) -> list[Shown]:
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
    shown: list[Shown] = []
    for tokens, strengths in zip(ids, acts, strict=True):
        is_token = tokens >= 0
        pieces, owners = characters_of([task.vocabulary[token] for token in tokens[is_token]])
        # a character of several tokens is as strong as the strongest of them
        strongest = np.zeros(len(pieces), np.int64)
        np.maximum.at(strongest, owners, strengths[is_token])
        shown.append(tuple(zip(pieces, strongest.tolist(), strict=True)))
    return shown


def explain_by(task: ExplainTask, prompt_of: Callable[[int], Prompt]) -> list[Explanation]:
    """Ask for an explanation of each unit; return one, or all candidates, best first.

    Settings: those of `AskSettings`.

    Raises:
        ExplainError: Several candidates at temperature 0, which would be the same; or an unknown
            ranking.
        ClientError: The model cannot be asked.
    """
    assert task.client is not None
    settings = AskSettings(**task.settings)
    n, temperature = int(settings.n_candidates), float(settings.temperature)
    if n > 1 and temperature == 0:
        raise ExplainError(f"{task.explainer}: {n} candidates at temperature 0 are all the same")
    explanations: list[list[Explanation]] = [
        [] if refused is None else [refused]
        for refused in (task.refused(i) for i in range(len(task.records.units)))
    ]
    asked = [i for i, some in enumerate(explanations) if not some]
    prompts = [prompt_of(i) for i in asked]
    for k in range(n):
        answers = task.client.complete(
            prompts,
            max_tokens=int(settings.max_tokens),
            temperature=temperature,
            seed=task.seed * SEEDS_PER_CALL + k,
        )
        for i, prompt, answer in zip(asked, prompts, answers, strict=True):
            explanations[i].append(_explanation(task, i, prompt, answer))
        task.progress(f"ask {task.client.name}", k + 1, n)
    if n > 1:
        _rank(task, asked, explanations, settings.rank_by)
    return [explanation for some in explanations for explanation in some]


def _explanation(task: ExplainTask, i: int, prompt: Prompt, answer: Answer) -> Explanation:
    facts: dict[str, Any] = {"prompt_hash": prompt.sha256, "usage": answer.usage}
    if answer.text is None:
        return task.failed(i, answer.failure or "no_answer", reason=answer.detail or None, **facts)
    text = parse_explanation(answer.text)
    if text is not None:
        return task.explained(i, text, None, **facts)
    last = final_answer(answer.text)
    reason = f"no line begins with {ANSWER!r} in {last[:80]!r}"
    if not last:
        reason = "it was still thinking when its tokens ended; give it more (max_tokens=)"
    return task.failed(i, "unparsed", reason=reason, **facts)


def _rank(
    task: ExplainTask,
    asked: Sequence[int],
    explanations: list[list[Explanation]],
    by: Ranking | str,
) -> None:
    """Put the candidates of each unit that was asked in order, best first, failures last."""
    candidates: list[list[Explanation]] = [[] for _ in explanations]
    for i in asked:
        candidates[i] = [candidate for candidate in explanations[i] if candidate.text]
    texts = [[candidate.text or "" for candidate in some] for some in candidates]
    values = rank_values(task, by, texts)
    for i in asked:
        worth = np.array([value for value, _ in values[i]], np.float64)
        order = np.argsort(-np.nan_to_num(worth, nan=-np.inf), kind="stable")
        with_cost = [
            replace(candidate, usage=candidate.usage + usage)
            for candidate, (_, usage) in zip(candidates[i], values[i], strict=True)
        ]
        failures = [candidate for candidate in explanations[i] if not candidate.text]
        ordered = [with_cost[place] for place in order] + failures
        explanations[i] = [replace(one, rank=rank) for rank, one in enumerate(ordered, start=1)]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Records of one unit that were not shown."""

    token_ids: Int[ndarray, "records window"]
    """Tokens; negative where there is none."""
    acts: Float[ndarray, "records window"]
    """Activations, in units of the hook."""


def held_out(task: ExplainTask) -> list[HeldOut]:
    """Return, for each unit of a task, records of split `explain` that are not the task's own.

    Raises:
        ExplainError: The task has no store.
    """
    if task.store is None:
        raise ExplainError(f"{task.explainer}: ranking explanations reads records from a store")
    shown = task.records
    # so many more are drawn that enough are left when all that were shown are among them
    n_top = N_TOP + len(shown.columns("top")) + len(shown.columns("firing", "quantile"))
    counts = Counts(top=n_top, random=N_RANDOM + len(shown.kinds))
    units = [int(unit) for unit in shown.units]
    records = RecordReader(task.store, seed=task.seed).records(
        shown.hook, "explain", counts, window=shown.excerpts.window, units=units
    )
    return [_unseen(records, i, _places(shown, i)) for i in range(len(units))]


def _places(records: Records, i: int) -> set[tuple[int, int]]:
    """Return where the records of a unit begin: row and position."""
    index = records.index[i][records.index[i] >= 0]
    excerpts = records.excerpts
    return set(
        zip(excerpts.seq_ids[index].tolist(), excerpts.first_pos[index].tolist(), strict=True)
    )


def _unseen(records: Records, i: int, seen: set[tuple[int, int]]) -> HeldOut:
    excerpts, taken = records.excerpts, list[int]()
    wanted: dict[Kind, int] = {"top": N_TOP, "random": N_RANDOM}
    for kind, n in wanted.items():
        free: list[int] = []
        for column in records.columns(kind):
            excerpt = int(records.index[i, column])
            place = (int(excerpts.seq_ids[excerpt]), int(excerpts.first_pos[excerpt]))
            if excerpt >= 0 and place not in seen:
                free.append(int(column))
                seen = seen | {place}
        taken += free[:n]
    return HeldOut(records.token_ids(i)[taken], records.acts[i][taken])


def rank_values(
    task: ExplainTask, by: Ranking | str, texts: Sequence[Sequence[str]]
) -> list[list[tuple[float, Usage]]]:
    """Return the value of each candidate of each unit, and what finding it took.

    Args:
        task: The units.
        by: See `AskSettings.rank_by`.
        texts: Candidates of each unit.

    Raises:
        ExplainError: There is no such ranking.
        ClientError: The client gives no log-probabilities of its prompt.
    """
    records = held_out(task)
    if isinstance(by, Ranking):
        return [
            [(by.score(text, own.token_ids, own.acts), Usage()) for text in candidates]
            for own, candidates in zip(records, texts, strict=True)
        ]
    if by != "simulation":
        raise ExplainError(f"rank_by: want 'simulation' or a Ranking, got {by!r}")
    assert task.client is not None
    pairs = [(text, own) for own, some in zip(records, texts, strict=True) for text in some]
    ids = [own.token_ids for _, own in pairs]
    simulations = simulate(task.client, [text for text, _ in pairs], ids, task.vocabulary)
    values = iter(
        (_correlation(simulation, own), simulation.usage)
        for simulation, (_, own) in zip(simulations, pairs, strict=True)
    )
    return [[next(values) for _ in candidates] for candidates in texts]


def _correlation(simulation: Simulation, own: HeldOut) -> float:
    """Return Pearson's correlation of expected and true activations; NaN where there is none."""
    is_token = own.token_ids >= 0
    expected, true = simulation.acts[is_token], own.acts[is_token].astype(np.float64)
    if simulation.failed or not (np.ptp(expected) > 0 and np.ptp(true) > 0):
        return float("nan")
    return float(np.corrcoef(expected, true)[0, 1])
