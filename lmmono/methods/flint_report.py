"""What a fitted FLINT is worth on held-out texts: every measure, with its number of texts.

Faithfulness is to the classifier, not to the interpreter: tokens on which the relevant attributes
act are taken out of the text, or kept alone, and the classifier reads again. Beside them stand as
many random tokens, tokens of the other attributes, and those of largest integrated gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray

from lmmono.methods import flint_measures as measures
from lmmono.methods.flint import Flint, Interpretation, TextsWithLabels
from lmmono.methods.flint_gradients import class_gradients, gradient_agreement

TAU = 3.0
"""Attributes with r > 1 / 3 explain a text, where one threshold is wanted."""

HIGHLIGHTED = 0.2
"""Share of a text's tokens that are taken out or kept alone."""


@dataclass(frozen=True, slots=True)
class FlintValue:
    """One measure."""

    metric: str
    """Name in `METRICS`."""
    value: float
    """NaN where it is not defined, such as the agreement on errors that there are none of."""
    n: int
    """Texts that it is over."""


@dataclass(frozen=True, slots=True)
class FlintReport:
    """Measures of an interpreter."""

    values: tuple[FlintValue, ...]

    def __getitem__(self, metric: str) -> float:
        return next(row.value for row in self.values if row.metric == metric)

    def __repr__(self) -> str:
        lines = [f"  {row.metric} {row.value:.3f} (n {row.n})" for row in self.values]
        return "\n".join(["FlintReport", *lines])


def evaluate(
    flint: Flint,
    test: TextsWithLabels,
    *,
    ood: Sequence[str] = (),
    edited: Sequence[str] = (),
    n_explained: int = 50,
    fraction: float = HIGHLIGHTED,
    seed: int = 0,
) -> FlintReport:
    """Return the measures of a fitted interpreter on test texts.

    Args:
        flint: Fitted.
        test: Texts with their classes.
        ood: Texts of another domain, for agreement there.
        edited: The same test texts after edits that keep their meaning, such as typos or synonyms:
            for agreement there, and for what edits do to the explanation.
        n_explained: Texts that are taken apart for faithfulness and gradients.
        fraction: Share of a text's tokens that are taken out.
        seed: Seed of the random tokens.
    """
    read = flint.interpret(test.texts)
    values = shared_measures(read, np.asarray(test.labels))
    if len(ood):
        values.append(_fidelity("fidelity_ood", flint.interpret(ood)))
    if len(edited):
        after = flint.interpret(edited)
        values += [_fidelity("fidelity_noisy", after), *edit_values(read, after)]
    explained = np.flatnonzero(read.agree)[:n_explained].tolist()
    values += faithfulness(flint, read, explained, fraction=fraction, seed=seed)
    agreement, n = gradient_agreement(flint, read, explained)
    values.append(FlintValue("gradient_agreement", agreement, n))
    if flint.settings.decoder == "bow":
        values.append(word_gain(flint, read))
    return FlintReport(tuple(values))


def shared_measures(read: Interpretation, labels: Int64[ndarray, " n"]) -> list[FlintValue]:
    """Return the measures that any interpreter by contributions has, those of baselines too."""
    n = len(labels)
    use = measures.use(read.phi, read.relevance[read.agree], read.matrix)
    values = [
        FlintValue("accuracy", float((read.classes == labels).mean()), n),
        _fidelity("fidelity", read),
        _fidelity("fidelity_errors", read, read.log_p.argmax(axis=1) != labels),
        FlintValue("fidelity_kl", measures.divergence(read.log_p, read.own_log_p), n),
    ]
    r = read.relevance[read.agree]
    values += [
        FlintValue(
            f"conciseness_{f'{tau:g}'.replace('.', '_')}",
            measures.conciseness_at(r, tau),
            len(r),
        )
        for tau in measures.TAUS
    ]
    shares = ("dead", "effective", "exclusivity", "redundancy", "absent")
    values += [FlintValue(f"attribute_{name}", getattr(use, name), n) for name in shares]
    norm = float(np.abs(read.phi).sum(axis=1).mean())
    return [*values, FlintValue("attribute_norm", norm, n)]


def edit_values(before: Interpretation, after: Interpretation) -> list[FlintValue]:
    """Return what edits that keep the meaning do to explanations, text by text.

    An interpreter that explains anew after every synonym explains nothing. Attributes that are all
    small change little too, so their norm stands beside.
    """
    ours, theirs, n = before.relevance, after.relevance, len(before.phi)
    norm = float(np.abs(after.phi).sum(axis=1).mean())
    distance = measures.attribute_distance(before.phi, after.phi)
    return [
        FlintValue("attribute_flips", measures.flips(ours, theirs), n),
        FlintValue("attribute_overlap", measures.overlap(ours, theirs, TAU), n),
        FlintValue("attribute_distance", float(distance.mean()), n),
        FlintValue(
            "relevance_distance", float(measures.relevance_distance(ours, theirs).mean()), n
        ),
        FlintValue("edited_norm", norm, n),
    ]


def _fidelity(metric: str, read: Interpretation, where: ndarray | None = None) -> FlintValue:
    return FlintValue(metric, *measures.fidelity(read.scores, read.log_p, where))


def word_gain(flint: Flint, read: Interpretation) -> FlintValue:
    """Return how many nats per word attributes tell more of a text than word frequencies do."""
    interpreter, gains = flint.interpreter, list[float]()
    with torch.no_grad():
        for i, ids in enumerate(read.ids):
            row = torch.from_numpy(ids)[None].to(interpreter.word_ids.device)
            used = torch.ones_like(row, dtype=torch.bool)
            used[:, 0] = False
            counts = interpreter.counts(row, used)[0]
            if not counts.sum():
                continue
            phi = torch.from_numpy(read.phi[i : i + 1]).to(row.device)
            gained = interpreter.word_log_p(phi)[0] - interpreter.log_frequency
            gains.append(float((counts * gained).sum() / counts.sum()))
    return FlintValue("word_gain", float(np.mean(gains)) if gains else float("nan"), len(gains))


def faithfulness(
    flint: Flint,
    read: Interpretation,
    texts: Sequence[int],
    *,
    tau: float = TAU,
    fraction: float = HIGHLIGHTED,
    seed: int = 0,
    with_gradients: bool = True,
) -> list[FlintValue]:
    """Return comprehensiveness and sufficiency, medians over texts, with their controls.

    Args:
        flint: Fitted.
        read: What it makes of texts.
        texts: Numbers of those that are taken apart; those of fewer than two tokens are left out.
        tau: Attributes with r > 1 / tau are relevant.
        fraction: Share of tokens taken, one at least and not all.
        seed: Seed of the random tokens.
        with_gradients: Also take the tokens of largest integrated gradient.
    """
    texts = [i for i in texts if len(read.ids[i]) > 2]
    random = np.random.default_rng(seed)
    chosen: dict[str, Callable[[int], Float[ndarray, " pos"]]] = {
        "": lambda i: read.acts[i] @ _relevant_part(read, i, tau),
        "_random": lambda i: random.random(len(read.ids[i])),
        "_irrelevant": lambda i: read.acts[i] @ (~measures.relevant(read.relevance[i], tau)),
    }
    if with_gradients:
        gradients: Mapping[int, ndarray] = dict(
            zip(texts, class_gradients(flint, read, texts), strict=True)
        )
        chosen["_gradients"] = lambda i: gradients[i]
    labels = read.log_p.argmax(axis=1)
    values: list[FlintValue] = []
    for end, weight_of in chosen.items():
        without: list[ndarray] = []
        only: list[ndarray] = []
        for i in texts:
            ids, weights = read.ids[i], np.array(weight_of(i), float)
            weights[0] = np.inf  # the token before the text stays, whatever is taken
            k = min(max(1, round(fraction * (len(ids) - 1))), len(ids) - 2)
            order = np.argsort(-weights, kind="stable")
            without.append(ids[np.sort(np.append(order[k + 1 :], 0))])
            only.append(ids[np.sort(order[: k + 1])])
        for name, edited in (("comprehensiveness", without), ("sufficiency", only)):
            drops = _drops(flint, read, texts, edited, labels)
            median = float(np.median(drops)) if len(drops) else float("nan")
            values.append(FlintValue(f"{name}{end}", median, len(drops)))
    return values


def _relevant_part(read: Interpretation, i: int, tau: float) -> Float[ndarray, " attribute"]:
    r = read.relevance[i]
    return r * measures.relevant(r, tau)


def _drops(
    flint: Flint,
    read: Interpretation,
    texts: Sequence[int],
    edited: Sequence[ndarray],
    labels: Int64[ndarray, " n"],
) -> Float[ndarray, " texts"]:
    """Return by how much the classifier's probability of its class falls."""
    if not texts:
        return np.zeros(0)
    after: Any = flint.interpret(edited).log_p
    here = labels[list(texts)]
    before = read.log_p[list(texts), here]
    return np.exp(before) - np.exp(after[np.arange(len(texts)), here])
