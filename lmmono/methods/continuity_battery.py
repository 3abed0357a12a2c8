"""How continuous a tuned classifier is: outputs, gradients and saliency under changes of its texts.

Each number stands beside what it could be mistaken for: distances under changes that leave the
meaning beside those under changes that do not (a constant model is continuous everywhere),
gradients beside confidence (they vanish where a model saturates), attacks beside edits that were
chosen against another model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from numpy import ndarray
from scipy import stats
from torch import Tensor

from lmmono.data.corruption.synonyms import Synonyms
from lmmono.data.corruption.text_noise import corrupt_texts
from lmmono.data.planted.graded_edits import Attribute, graded_edit
from lmmono.data.tasks.task import Labelled
from lmmono.errors import DataError
from lmmono.methods.distances import aligned, symmetric_kl
from lmmono.methods.smoothness import per_text_norm
from lmmono.probes.finetuning import Classifier, ClassifierTrainee
from lmmono.stats.bootstrap import DocumentDraws, ratio
from lmmono.stats.estimate import LEVEL, Estimate
from lmmono.suites.attacks import AttackReport, attack
from lmmono.training.objectives import Step, TrainingBatch

N_RESAMPLES = 999
"""Redraws of texts behind an interval; its ends are the 25th and 975th of them."""

BATCH_TEXTS = 32
"""Texts per pass."""

GRADED_WORDS = 3
"""Words that every graded edit of a planted text replaces; the distances are 0 to this."""

SMOOTH_SIZE = 0.05
"""Noise at which gradients are taken again, over the root mean square of embeddings."""

TOP_SHARE = 0.1
"""Share of a text's tokens that count as its most salient."""

ASCENT_STEPS = 10
"""Steps of the attack on embeddings, each 2.5 radii over their number, as is usual for PGD."""


@dataclass(frozen=True, slots=True)
class BatteryValue:
    """One number of the battery."""

    metric: str
    """Name in `lmmono.registry.metrics.METRICS`."""
    group: str
    """What was done to the texts: `typos`, `graded`, `characters`, ..., or nothing: `clean`."""
    level: float | None
    """How strongly."""
    estimate: Estimate
    """The number, its interval over texts."""


def clean_values(classifier: Classifier, data: Labelled, *, seed: int) -> Iterator[BatteryValue]:
    """Yield confidence and what gradients by token embeddings are like on clean texts.

    `gradient_norm` is |d loss / d e| |e|, which has no scale; `gradient_change` how much the
    gradient differs, over its norm, under noise of 0.05 on embeddings.
    """
    columns: dict[str, list[float]] = {"confidence": [], "gradient_norm": [], "gradient_change": []}
    generator = torch.Generator().manual_seed(seed)
    for step in _steps(classifier, data):
        embeds = step.embed(step.batch.ids).detach()
        used = step.batch.is_token[..., None]
        gradient = _loss_gradient(step, embeds)
        noise = torch.randn(embeds.shape, generator=generator).to(embeds) * used
        rms = (embeds * used).square().sum() / (used.sum() * embeds.shape[-1])
        moved = _loss_gradient(step, embeds + SMOOTH_SIZE * rms.sqrt() * noise)
        norm = per_text_norm(gradient)
        columns["gradient_norm"] += (norm * per_text_norm(embeds * used)).flatten().tolist()
        columns["gradient_change"] += (per_text_norm(moved - gradient) / norm).flatten().tolist()
        probabilities = step.outputs.logits.detach().softmax(dim=-1)
        columns["confidence"] += probabilities.amax(dim=-1).tolist()
    for metric, values in columns.items():
        yield BatteryValue(metric, "clean", None, _mean(values, seed))


def changed_values(
    classifier: Classifier,
    data: Labelled,
    changed: Sequence[str],
    group: str,
    level: float | None,
    *,
    seed: int,
    saliency: bool = False,
) -> Iterator[BatteryValue]:
    """Yield distance, flips and, where asked, saliency between texts and the same texts changed.

    Saliency is gradient x input of the class that the clean text gets, on the tokens that both
    have; texts that share fewer than three are left out.
    """
    log_p, log_q = (classifier.predict(texts) for texts in (data.texts, changed))
    distance = symmetric_kl(torch.from_numpy(log_p), torch.from_numpy(log_q)).tolist()
    flips = (log_p.argmax(axis=1) != log_q.argmax(axis=1)).astype(float).tolist()
    yield BatteryValue("continuity_distance", group, level, _mean(distance, seed))
    yield BatteryValue("flip_rate", group, level, _mean(flips, seed))
    if saliency:
        ranks, overlaps = _saliency(classifier, data, changed)
        yield BatteryValue("saliency_spearman", group, level, _mean(ranks, seed))
        yield BatteryValue("saliency_overlap", group, level, _mean(overlaps, seed))


def noise_values(
    classifier: Classifier,
    data: Labelled,
    kinds: Mapping[str, int],
    *,
    seed: int,
    synonyms: Synonyms | None = None,
) -> Iterator[BatteryValue]:
    """Yield `changed_values` of each noise, and the share of texts right under none and all.

    Args:
        classifier: What is judged.
        data: Texts with their true classes.
        kinds: Noises of texts by name, with their severity.
        seed: Seed of the noise.
        synonyms: For noise `synonyms`.
    """
    right = classifier.predict(data.texts).argmax(axis=1) == data.labels
    for kind, severity in kinds.items():
        noisy = corrupt_texts(
            data.texts, kind, severity, seed=seed, synonyms=synonyms, require_change=False
        )
        level = float(severity)
        yield from changed_values(classifier, data, noisy, kind, level, seed=seed, saliency=True)
        right = right & (classifier.predict(noisy).argmax(axis=1) == data.labels)
    if kinds:
        consistent = right.astype(float).tolist()
        yield BatteryValue("consistency", "all noises", float(len(kinds)), _mean(consistent, seed))


def graded_values(
    classifier: Classifier,
    data: Labelled,
    *,
    seed: int,
    n_words: int = GRADED_WORDS,
    attribute: Attribute | None = None,
    saliency: bool = True,
) -> Iterator[BatteryValue]:
    """Yield `changed_values` of planted texts that are 0, 1, ... attributes from their own.

    All replace as many words. `meaning_ratio` is the mean distance of the farthest over that of
    those that mean the same: 1 where a model sees words and no meaning.

    Args:
        classifier: What is judged.
        data: Texts of the planted language.
        seed: Seed of the edits.
        n_words: Words that each edit replaces.
        attribute: Which attribute edits change: that which the classes are made of; None for any.
        saliency: Whether saliency is compared too.

    Raises:
        DataError: No text has so many words that can be replaced.
    """
    edits = [
        [
            graded_edit(text, n_words=n_words, distance=d, seed=seed, attribute=attribute)
            for d in range(n_words + 1)
        ]
        for text in data.texts
    ]
    fit = np.array([i for i, texts in enumerate(edits) if None not in texts], np.int64)
    if not len(fit):
        raise DataError(f"graded edits: no text has {n_words} words that can be replaced")
    some, distances = data.take(fit), list[list[float]]()
    for distance in range(n_words + 1):
        changed = [str(edits[i][distance]) for i in fit.tolist()]
        yield from changed_values(
            classifier, some, changed, "graded", float(distance), seed=seed, saliency=saliency
        )
        logs = (torch.from_numpy(classifier.predict(texts)) for texts in (some.texts, changed))
        distances.append(symmetric_kl(*logs).tolist())
    draws = DocumentDraws(len(fit), len(fit), N_RESAMPLES, seed, LEVEL)
    totals = draws.totals(np.array([distances[-1], distances[0]], float).T)
    ratios = ratio(totals[:, 0], totals[:, 1])
    yield BatteryValue("meaning_ratio", "graded", float(n_words), draws.estimate(ratios))


def pair_values(classifier: Classifier, data: Labelled, *, seed: int) -> Iterator[BatteryValue]:
    """Yield `changed_values` of contrast pairs, which people edited so that the class changes."""
    if data.pairs is None:
        return
    first = np.flatnonzero(data.pairs > np.arange(len(data)))
    if len(first):
        partners = [data.texts[i] for i in data.pairs[first].tolist()]
        some = data.take(first)
        yield from changed_values(classifier, some, partners, "contrast pairs", None, seed=seed)


def attack_values(
    classifier: Classifier,
    data: Labelled,
    methods: Sequence[str],
    *,
    seed: int,
    synonyms: Synonyms | None = None,
    against: Mapping[str, AttackReport] | None = None,
) -> Iterator[tuple[BatteryValue, AttackReport | None]]:
    """Yield accuracy under attacks on texts, with what each attack made.

    Args:
        classifier: What is attacked.
        data: Texts with their true classes.
        methods: Names of `lmmono.suites.attacks.ATTACKS`.
        seed: Seed of the edits.
        synonyms: For attack `words`.
        against: Attacks on another classifier on the same texts, by method: accuracy on what they
            made is told too. Where it is no better than under the own attack, the own one was weak.
    """
    for method in methods:
        report = attack(
            partial(_scores, classifier),
            data.texts,
            data.labels,
            method=method,
            seed=seed,
            synonyms=synonyms,
        )
        withstood = [float(not (r.skipped or r.success)) for r in report.results]
        value = BatteryValue("attacked_accuracy", method, None, _mean(withstood, seed))
        yield value, report
        other = (against or {}).get(method)
        if other is not None:
            texts = [result.adversarial for result in other.results]
            right = classifier.predict(texts).argmax(axis=1) == data.labels
            shares = right.astype(float).tolist()
            yield BatteryValue("transfer_accuracy", method, None, _mean(shares, seed)), None


def embedding_attack_values(
    classifier: Classifier, data: Labelled, radii: Sequence[float], *, seed: int
) -> Iterator[BatteryValue]:
    """Yield accuracy under projected gradient ascent on token embeddings.

    A radius is the norm of a text's change over that of its embeddings. A radius of 10 must bring
    accuracy near 0; where it does not, gradients are masked and no smaller radius says anything.
    """
    for radius in radii:
        right: list[float] = []
        generator = torch.Generator().manual_seed(seed)
        for step in _steps(classifier, data):
            logits = step.again(embeds=_worst(step, radius, generator), grad=False).logits
            right += (logits.argmax(dim=-1) == step.batch.labels).float().tolist()
        yield BatteryValue("attacked_accuracy", "embeddings", radius, _mean(right, seed))


def _scores(classifier: Classifier, texts: list[str]) -> Float[ndarray, "n c"]:
    return classifier.predict(texts)


def _worst(step: Step, radius: float, generator: torch.Generator) -> Tensor:
    """Return embeddings moved uphill within the radius; the first token stays."""
    used = step.batch.is_token.clone()
    used[:, 0] = False
    embeds = step.embed(step.batch.ids).detach()
    size = radius * per_text_norm(embeds * step.batch.is_token[..., None])
    change = torch.randn(embeds.shape, generator=generator).to(embeds) * used[..., None]
    change = size * change / per_text_norm(change)
    for _ in range(ASCENT_STEPS):
        gradient = _loss_gradient(step, embeds + change) * used[..., None]
        change = change + 2.5 * size / ASCENT_STEPS * gradient / per_text_norm(gradient)
        change = change * (size / per_text_norm(change)).clamp_max(1.0)
    return embeds + change


def _steps(classifier: Classifier, data: Labelled) -> Iterator[Step]:
    """Yield batches as steps of the classifier in evaluation mode, with plain cross entropy."""
    classifier.network.eval()
    trainee = ClassifierTrainee(classifier.network, classifier.reader, "ce")
    for first in range(0, len(data), BATCH_TEXTS):
        texts = data.texts[first : first + BATCH_TEXTS]
        labels = torch.from_numpy(data.labels[first : first + BATCH_TEXTS])
        batch = trainee.read(texts, labels)
        with torch.no_grad():
            outputs = trainee.run(batch)
        yield Step(trainee, batch, outputs, 0, 1, {})


def _loss_gradient(step: Step, embeds: Tensor) -> Float[Tensor, "batch pos d"]:
    """Return the gradient of each text's loss by its embeddings."""
    leaf = embeds.detach().requires_grad_()
    loss = step.again(embeds=leaf).loss * len(leaf)
    return torch.autograd.grad(loss, leaf)[0]


def _saliency(
    classifier: Classifier, data: Labelled, changed: Sequence[str]
) -> tuple[list[float], list[float]]:
    """Return rank correlation and overlap of the top tokens of each text's two saliencies."""
    ranks: list[float] = []
    overlaps: list[float] = []
    other = Labelled(tuple(changed), data.labels)
    for one, two in zip(_steps(classifier, data), _steps(classifier, other), strict=True):
        classes = one.outputs.logits.argmax(dim=-1)
        first, second = _input_gradients(one, classes), _input_gradients(two, classes)
        for i in range(len(first)):
            at_a, at_b = _shared(one.batch, two.batch, i)
            if len(at_a) < 3:
                continue
            a, b = first[i, at_a].numpy(), second[i, at_b].numpy()
            fitted: Any = stats.spearmanr(a, b) if np.ptp(a) and np.ptp(b) else None
            ranks.append(0.0 if fitted is None else float(fitted.statistic))
            overlaps.append(_overlap(a, b))
    return ranks, overlaps


def _shared(one: TrainingBatch, two: TrainingBatch, i: int) -> tuple[list[int], list[int]]:
    return aligned(one.ids[i], one.is_token[i], two.ids[i], two.is_token[i])


def _input_gradients(step: Step, classes: Int64[Tensor, "batch"]) -> Float[Tensor, "batch pos"]:
    """Return gradient x input of one class' logit, token by token."""
    leaf = step.embed(step.batch.ids).detach().requires_grad_()
    logits = step.again(embeds=leaf).logits
    (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), leaf)
    return (gradient * leaf).sum(dim=-1).detach().cpu()


def _overlap(a: Float[ndarray, " n"], b: Float[ndarray, " n"]) -> float:
    """Return Jaccard's index of the tokens of largest absolute saliency."""
    k = max(1, math.ceil(TOP_SHARE * len(a)))
    tops = [set(np.argsort(-np.abs(values), kind="stable")[:k].tolist()) for values in (a, b)]
    return len(tops[0] & tops[1]) / len(tops[0] | tops[1])


def _mean(values: Sequence[float], seed: int) -> Estimate:
    """Return a mean over texts with its bootstrap interval; undefined over none."""
    rows: Float64[ndarray, "n 2"] = np.array([[value, 1.0] for value in values]).reshape(-1, 2)
    draws = DocumentDraws(max(1, len(rows)), len(rows), N_RESAMPLES, seed, LEVEL)
    if not len(rows):
        return draws.estimate(np.array([math.nan]), failure="no text can be compared")
    totals = draws.totals(rows)
    return draws.estimate(ratio(totals[:, 0], totals[:, 1]))
