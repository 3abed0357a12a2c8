"""Explanations with their scores as OpenAI's `NeuronSimulationResults`, record by record.

The layout of Bills et al. 2023 (neuron_explainer): what an explanation predicts beside the truth,
and the three formulas over each record and over all. Of the store's rows it keeps nothing else, so
intervals and controls stay behind; Neuronpedia's layout has room for them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

import activation_store as astore
from activation_store.read.exporting import check_shards, layer_of, whole_folder
from lmmono.clients.client import Client, Failed
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.explanations.stored_explanations import kept_explanations, read_vocabulary
from lmmono.records.record_reader import RecordReader
from lmmono.records.sampler import Records
from lmmono.registry.scorer_settings import SimulationSettings
from lmmono.registry.scorers import find_scorer
from lmmono.scores.score_job import ScoreJob
from lmmono.scores.simulation import UNITS_AT_ONCE, scored_records
from lmmono.scores.simulators import predictions
from lmmono.stats.agreement import AGREEMENTS, record_sums

_FORMULAS = {
    "ev_correlation_score": "pearson",
    "rsquared_score": "uncentred_r2",
    "absolute_dev_explained_score": "deviation",
}
"""Their field by our measure."""

Json = dict[str, Any]


def export_simulations(
    store: astore.Store,
    out: str | os.PathLike[str],
    hook: str,
    *,
    explainers: Sequence[str] | None = None,
    units: Sequence[int] | None = None,
    preset: str | None = None,
    simulator: str = "program",
    seed: int = 0,
    client: Client | None = None,
    layer: int | None = None,
) -> Path:
    """Write what explanations predict of a hook's units beside the truth, and return the folder.

        <layer>/<unit>.jsonl   one line: a NeuronSimulationResults

    The records are those of `simulation_tar`, so the scores of a unit are those in the store of the
    same seed and preset. A score that is not defined is null. An explanation that failed, or whose
    simulation did, is left out. A program's distribution is all at its value; a language model's
    is not kept: its lists are empty.

    Args:
        store: An open store with explanations.
        out: Folder to write.
        hook: A hook stored as rows.
        explainers: As stored; None takes all of the hook, with a program alone those that have one.
        units: Units; None takes all that are explained.
        preset: Records as in a paper; None takes 20 top and 20 random ones.
        simulator: As the setting of the scorer: `program`, `llm` or `llm_calibrated`.
        seed: Seed of the records and the explanations.
        client: Language model that simulates.
        layer: Number of the layer; by default the N in `blocks.N.`.

    Raises:
        ExplainError: No such explanations, or no program where one is wanted.
        StoreError: `out` holds something already, the hook's name has no layer, or a shard is
            damaged.
    """
    check_shards(store, [hook])  # first: what is simulated is read from them
    scorer, reader = find_scorer("simulation_tar"), RecordReader(store, seed=seed)
    settings = scorer.with_settings(preset, {"simulator": simulator})
    names = list(explainers or _explainers(store, hook, simulator))
    stored = {name: kept_explanations(reader, hook, name) for name in names}
    wanted = sorted({unit for of_explainer in stored.values() for unit in of_explainer})
    chosen = wanted if units is None else [unit for unit in wanted if unit in set(units)]
    job = ScoreJob(store, hook, reader, tuple(chosen), settings, seed=seed, client=client)
    records, words = scored_records(job, ("top", "random")), read_vocabulary(store)
    number = layer_of(hook) if layer is None else layer
    with whole_folder(out) as folder:
        at = folder / str(number)
        at.mkdir()
        for unit, scored in _scored(job, records, stored, words):
            neuron = _named("NeuronId", layer_index=number, neuron_index=unit)
            line = _named("NeuronSimulationResults", neuron_id=neuron, scored_explanations=scored)
            text = json.dumps(line, allow_nan=False) + "\n"
            (at / f"{unit}.jsonl").write_text(text, encoding="utf-8")
    return Path(out)


def _explainers(store: astore.Store, hook: str, simulator: str) -> list[str]:
    query = """SELECT DISTINCT explainer FROM explanations
        WHERE hook = $hook AND (program IS NOT NULL OR $reads) ORDER BY explainer"""
    reads = simulator != "program"
    names = [name for (name,) in store.sql(query, hook=hook, reads=reads).fetchall()]
    if not names:
        raise ExplainError(f"{store.path}: no explanations of {hook!r} to simulate by {simulator}")
    return names


def _scored(
    job: ScoreJob,
    records: Records,
    stored: dict[str, dict[int, Explanation]],
    words: tuple[str, ...],
) -> Iterator[tuple[int, list[Json]]]:
    """Yield each unit with its scored explanations."""
    for first in range(0, len(records.units), UNITS_AT_ONCE):
        block = np.arange(first, min(first + UNITS_AT_ONCE, len(records.units)))
        index, units = records.index[block], [int(unit) for unit in records.units[block]]
        present = (index >= 0)[:, :, None]
        ids = np.where(present, records.excerpts.token_ids[index], np.int32(-1))
        lines: dict[int, list[Json]] = {unit: [] for unit in units}
        for of_explainer in stored.values():
            rows = [i for i, unit in enumerate(units) if unit in of_explainer]
            explanations = [of_explainer[units[i]] for i in rows]
            predicted, answers = predictions(job, explanations, ids[rows])
            sums = record_sums(records.acts[block][rows], predicted, ids[rows] >= 0)
            for k, (i, explanation) in enumerate(zip(rows, explanations, strict=True)):
                if explanation.text is not None and not isinstance(answers[k], Failed):
                    truth = records.acts[block[i]]
                    parts = _sequences(job, ids[i], truth, predicted[k], sums[k], words)
                    lines[units[i]].append(_explanation(explanation.text, parts, sums[k]))
        yield from lines.items()


def _explanation(text: str, parts: list[Json], sums: Float[ndarray, "records sums"]) -> Json:
    whole = _named(
        "ScoredSimulation", scored_sequence_simulations=parts, **_scores(sums.sum(axis=0))
    )
    return _named("ScoredExplanation", explanation=text, scored_simulation=whole)


def _sequences(
    job: ScoreJob,
    ids: Int[ndarray, "records window"],
    truth: Float[ndarray, "records window"],
    predicted: Float[ndarray, "records window"],
    sums: Float[ndarray, "records sums"],
    words: tuple[str, ...],
) -> list[Json]:
    """Return the records that there are, each with its own scores."""
    simulator = job.settings_as(SimulationSettings).simulator
    normalised, by_program = simulator == "llm", simulator == "program"
    sequences: list[Json] = []
    for record in np.flatnonzero((ids >= 0).any(axis=1)):
        is_token = ids[record] >= 0
        values = [float(value) for value in predicted[record][is_token]]
        simulation = _named(
            "SequenceSimulation",
            tokens=[
                words[i] if i < len(words) else f"[{i}]" for i in ids[record][is_token].tolist()
            ],
            expected_activations=values,
            activation_scale=(
                "simulated_normalized_activations" if normalised else "neuron_activations"
            ),
            distribution_values=[[value] if by_program else [] for value in values],
            distribution_probabilities=[[1.0] if by_program else [] for _ in values],
            uncalibrated_simulation=None,
        )
        acts = [float(act) for act in truth[record][is_token]]
        scores = _scores(sums[record])
        sequences.append(
            _named(
                "ScoredSequenceSimulation", simulation=simulation, true_activations=acts, **scores
            )
        )
    return sequences


def _scores(sums: Float[ndarray, " sums"]) -> Json:
    values = {field: float(AGREEMENTS[name].of(sums[None])[0]) for field, name in _FORMULAS.items()}
    return {field: None if np.isnan(value) else value for field, value in values.items()}


def _named(dataclass_name: str, **fields: Any) -> Json:
    return {"dataclass_name": dataclass_name, **fields}
