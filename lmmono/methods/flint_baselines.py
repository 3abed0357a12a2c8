"""What FLINT is compared with: other ways to explain a classifier's classes by a few numbers.

Each learns from the classifier's own classes on training texts and gives an `Interpretation` of
test texts, so that one set of measures serves all. Heads are logistic regressions without an
intercept: contributions then add up to the score. `lime_classes` explains text by text, without
attributes.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray

from lmmono.dictionaries.sae import SAE
from lmmono.errors import RobustnessError
from lmmono.methods.flint import Interpretation, TextsWithLabels
from lmmono.methods.flint_interpreter import counted_tokens
from lmmono.models.hooks import bare, recording
from lmmono.probes.finetuning import Classifier

ONE_CLASS = (
    "the classifier puts all training texts in one class, so there is nothing to explain; tune it "
    "longer"
)

CONCEPTS = 10
"""Concepts per class, words that are more frequent there than elsewhere."""

LIME_MASKS = 100
"""Texts with words left out that a local surrogate is fitted to."""

LIME_WIDTH = 0.25
"""Width of LIME's kernel on cosine distance; Ribeiro et al. 2016 take 25 on 100 times that."""


def linear_probe(
    classifier: Classifier, hooks: Sequence[str], train: TextsWithLabels, test: TextsWithLabels
) -> Interpretation:
    """Return a logistic regression on the pooled activations that FLINT reads."""
    ours, theirs = (pooled(classifier, hooks, data.texts) for data in (train, test))
    centre, scale = ours.mean(axis=0), ours.std(axis=0) + 1e-6
    return _linear(classifier, train, test, (ours - centre) / scale, (theirs - centre) / scale)


def topics(
    classifier: Classifier,
    train: TextsWithLabels,
    test: TextsWithLabels,
    *,
    n_attributes: int,
    seed: int = 0,
) -> Interpretation:
    """Return topics of the texts by NMF of tf-idf with a logistic regression: no model is read."""
    from sklearn.decomposition import NMF
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(stop_words="english", min_df=2, max_features=10_000)
    counts = vectorizer.fit_transform(train.texts)
    n_topics = min(n_attributes, *counts.shape)
    model: Any = NMF(cast(Any, n_topics), init="nndsvda", random_state=seed, max_iter=400, tol=1e-3)
    ours = model.fit_transform(counts)
    theirs = model.transform(vectorizer.transform(test.texts))
    scale = ours.std() + 1e-12
    return _linear(classifier, train, test, ours / scale, theirs / scale)


def sae_head(
    classifier: Classifier,
    hook: str,
    train: TextsWithLabels,
    test: TextsWithLabels,
    *,
    n_attributes: int,
    seed: int = 0,
    k: int = 16,
    steps: int = 300,
) -> Interpretation:
    """Return a TopK SAE's latents, the best of them by an F test, with a logistic regression."""
    rows = token_rows(classifier, hook, train.texts)
    d = rows[0].shape[1]
    sae = SAE("topk", d_sae=4 * d, k=min(k, d), steps=steps, seed=seed).fit(np.concatenate(rows))
    ours, theirs = (
        np.stack([sae.encode(torch.from_numpy(text)).mean(0).numpy() for text in texts])
        for texts in (rows, token_rows(classifier, hook, test.texts))
    )
    return _selected(classifier, train, test, ours, theirs, n_attributes)


def neurons_head(
    classifier: Classifier,
    hook: str,
    train: TextsWithLabels,
    test: TextsWithLabels,
    *,
    n_attributes: int,
) -> Interpretation:
    """Return the neurons of a hook's layer, the best by an F test, with a logistic regression.

    In CRATE they are its sparse code, not negative: an interpreter that is free.
    """
    block = re.match(r"blocks\.\d+", hook)
    if block is None:
        raise RobustnessError(f"neurons: {hook} is in no block; give layers of FLINT by number")
    place = f"{block[0]}.mlp.hook_post"
    ours, theirs = (
        np.stack([rows.mean(axis=0) for rows in token_rows(classifier, place, data.texts)])
        for data in (train, test)
    )
    return _selected(classifier, train, test, ours, theirs, n_attributes)


def _selected(
    classifier: Classifier,
    train: TextsWithLabels,
    test: TextsWithLabels,
    ours: Float[ndarray, "n d"],
    theirs: Float[ndarray, "m d"],
    n_attributes: int,
) -> Interpretation:
    """Return the coordinates that tell the classifier's classes best, with a head on them."""
    from sklearn.feature_selection import SelectKBest, f_classif

    varies = np.flatnonzero(ours.std(axis=0) > 0)
    labels = classifier.predict(train.texts).argmax(axis=1)
    if len(np.unique(labels)) < 2 or not len(varies):
        raise RobustnessError(ONE_CLASS)
    chosen = SelectKBest(f_classif, k=min(n_attributes, len(varies))).fit(ours[:, varies], labels)
    best = varies[chosen.get_support(indices=True)]
    scale = ours[:, best].std(axis=0)
    return _linear(classifier, train, test, ours[:, best] / scale, theirs[:, best] / scale)


def concept_bottleneck(
    classifier: Classifier,
    hooks: Sequence[str],
    train: TextsWithLabels,
    test: TextsWithLabels,
    *,
    corrected: bool,
    per_class: int = CONCEPTS,
) -> Interpretation:
    """Return concepts scored by embeddings and told from activations: CB-LLM's steps, made small.

    Sun et al. 2025 (arXiv 2412.07992): a concept's score of a text is the cosine of their
    embeddings; corrected, it is 0 where it is negative or the concept is of another class than the
    text; a layer learns the scores from the model, a linear head the classes from it. There a
    language model writes the concepts and a sentence encoder embeds; here concepts are the words
    whose frequency tells a class best, embeddings are means of the model's token embeddings, and
    the layer is a ridge regression. Reported there, of far larger encoders: SST-2 0.9012 without
    and 0.9407 with correction, AG News 0.9009 and 0.9453.

    Args:
        classifier: What is explained.
        hooks: Activations that concepts are told from.
        train: Texts with their true classes, which the correction needs.
        test: Texts to explain.
        corrected: Whether scores are corrected.
        per_class: Concepts of each class.
    """
    from sklearn.linear_model import Ridge

    concepts, of_class = class_words(train, classifier.n_classes, per_class)
    embedded = text_embeddings(classifier, [*train.texts, *concepts])
    scores = concept_scores(embedded[: len(train.texts)], embedded[len(train.texts) :])
    if corrected:
        scores = corrected_scores(scores, np.asarray(train.labels), of_class)
    ours, theirs = (pooled(classifier, hooks, data.texts) for data in (train, test))
    layer = Ridge(alpha=1.0).fit(ours, scores)
    layers_out = [np.maximum(layer.predict(x), 0.0) for x in (ours, theirs)]
    scale = layers_out[0].std() + 1e-12
    return _linear(classifier, train, test, layers_out[0] / scale, layers_out[1] / scale)


def concept_scores(
    texts: Float[ndarray, "n d"], concepts: Float[ndarray, "k d"]
) -> Float[ndarray, "n k"]:
    """Return the cosine of every text's embedding with every concept's."""

    def unit(x: ndarray) -> ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)

    return unit(texts) @ unit(concepts).T


def corrected_scores(
    scores: Float[ndarray, "n k"], labels: Int64[ndarray, " n"], of_class: Int64[ndarray, " k"]
) -> Float[ndarray, "n k"]:
    """Return scores with 0 where they are negative or the concept is of another class."""
    return np.where((labels[:, None] == of_class) & (scores > 0), scores, 0.0)


def class_words(
    data: TextsWithLabels, n_classes: int, per_class: int
) -> tuple[list[str], Int64[ndarray, " k"]]:
    """Return the words that tell each class best, by log odds with one added, and their class."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(stop_words="english", binary=True, min_df=2)
    has = vectorizer.fit_transform(data.texts)
    words, labels = vectorizer.get_feature_names_out(), np.asarray(data.labels)
    chosen: list[str] = []
    of_class: list[int] = []
    for label in range(n_classes):
        inside = np.asarray(has[labels == label].sum(axis=0)).ravel() + 1.0
        outside = np.asarray(has[labels != label].sum(axis=0)).ravel() + 1.0
        n_in, n_out = (labels == label).sum() + 2.0, (labels != label).sum() + 2.0
        odds = np.log(inside / (n_in - inside)) - np.log(outside / (n_out - outside))
        best = np.argsort(-odds, kind="stable")[:per_class]
        chosen += words[best].tolist()
        of_class += [label] * len(best)
    return chosen, np.array(of_class)


def lime_classes(
    classifier: Classifier, texts: Sequence[str], *, n_masks: int = LIME_MASKS, seed: int = 0
) -> Int64[ndarray, " n"]:
    """Return the classes that LIME's local surrogates give texts; agreement is its fidelity.

    Ribeiro et al. 2016: words are left out at random, and a ridge regression weighted by
    exp(-distance^2 / width^2), distance the cosine's to the whole text, learns the probabilities.
    """
    from sklearn.linear_model import Ridge

    classes: list[int] = []
    for number, text in enumerate(texts):
        words = text.split()
        kept = np.random.default_rng((seed, number)).random((n_masks, len(words))) < 0.5
        kept[0] = True
        kept[~kept.any(axis=1), 0] = True  # a text has one word at least
        masked = [" ".join(w for w, k in zip(words, row, strict=True) if k) for row in kept]
        p = np.exp(classifier.predict(masked))
        distance = 1.0 - np.sqrt(kept.mean(axis=1))
        weights = np.exp(-((distance / LIME_WIDTH) ** 2))
        surrogate = Ridge(alpha=1.0).fit(kept.astype(float), p, sample_weight=weights)
        classes.append(int(surrogate.predict(np.ones((1, len(words)))).argmax()))
    return np.array(classes, np.int64)


@torch.no_grad()
def token_rows(
    classifier: Classifier, hook: str, texts: Sequence[str], *, batch_texts: int = 32
) -> list[Float[ndarray, "_ d"]]:
    """Return the activations of a hook on the tokens of each text that count."""
    network, rows = classifier.network.eval(), list[ndarray]()
    ids = classifier.reader.read(texts)[0]
    for first in range(0, len(ids), batch_texts):
        batch = ids[first : first + batch_texts]
        lengths = torch.tensor([len(row) for row in batch])
        with recording(network.body, hook) as acts:
            classifier.logits(batch)
        used = counted_tokens(torch.arange(int(lengths.max())) < lengths[:, None])
        values = acts[hook].flatten(2).float().cpu()
        rows += [values[i, used[i]].numpy() for i in range(len(batch))]
    return rows


def pooled(
    classifier: Classifier, hooks: Sequence[str], texts: Sequence[str]
) -> Float[ndarray, "n d"]:
    """Return the activations of hooks, pooled over each text as the classifier pools."""
    last = classifier.settings.pooling == "last"
    by_hook = [
        np.stack(
            [rows[-1] if last else rows.mean(axis=0) for rows in token_rows(classifier, h, texts)]
        )
        for h in hooks
    ]
    return np.concatenate(by_hook, axis=1)


def text_embeddings(classifier: Classifier, texts: Sequence[str]) -> Float[ndarray, "n d"]:
    """Return the mean token embedding of each text."""
    body: Any = bare(classifier.network.body)
    table = body.get_input_embeddings().weight.detach().float().cpu().numpy()
    ids = classifier.reader.read(texts)[0]
    return np.stack([table[row[1:] if len(row) > 1 else row].mean(axis=0) for row in ids])


def _linear(
    classifier: Classifier,
    train: TextsWithLabels,
    test: TextsWithLabels,
    ours: Float[ndarray, "n j"],
    theirs: Float[ndarray, "m j"],
) -> Interpretation:
    """Return a logistic regression of the classifier's classes on some numbers of a text."""
    from sklearn.linear_model import LogisticRegression

    labels = classifier.predict(train.texts).argmax(axis=1)
    present = np.unique(labels)
    if len(present) < 2:
        raise RobustnessError(ONE_CLASS)
    head = LogisticRegression(C=10.0, fit_intercept=False, max_iter=2000).fit(ours, labels)
    weight = np.zeros((ours.shape[1], classifier.n_classes))
    weight[:, present] = (
        np.stack([-head.coef_[0], head.coef_[0]], axis=1) / 2 if len(present) == 2 else head.coef_.T
    )
    log_p, phi = classifier.predict(test.texts), theirs.astype(np.float32)
    weight = weight.astype(np.float32)
    return Interpretation((), (), phi, log_p, phi @ weight, weight)
