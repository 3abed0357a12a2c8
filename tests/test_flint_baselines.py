"""What FLINT is compared with: the same kind of interpretation of the same classifier."""

import numpy as np
import pytest
from small_models import tiny
from test_finetuning import TEST, TOKENIZER, TRAIN, VAL

from lmmono.methods import flint_baselines as baselines
from lmmono.methods.flint_report import shared_measures
from lmmono.probes.finetuning import Classifier, FineTuning, finetune

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def classifier():
    """A classifier that tells words 1 to 19 from words 20 to 38."""
    how = FineTuning(epochs=12, lr=1e-2)
    return finetune(
        tiny("gpt2"), TRAIN, VAL, n_classes=2, seed=0, settings=how, tokenizer=TOKENIZER
    )


def interpretation(name, classifier):
    match name:
        case "linear_probe":
            return baselines.linear_probe(classifier, [HOOK], TRAIN, TEST)
        case "topics":
            return baselines.topics(classifier, TRAIN, TEST, n_attributes=6)
        case "neurons":
            return baselines.neurons_head(classifier, HOOK, TRAIN, TEST, n_attributes=6)
        case "sae_head":
            return baselines.sae_head(classifier, HOOK, TRAIN, TEST, n_attributes=6, k=4, steps=50)
        case _:
            corrected = name == "corrected"
            return baselines.concept_bottleneck(
                classifier, [HOOK], TRAIN, TEST, corrected=corrected, per_class=4
            )


@pytest.mark.parametrize(
    "name", ["linear_probe", "topics", "sae_head", "neurons", "uncorrected", "corrected"]
)
def test_a_baseline_explains_the_classifier_better_than_chance(name, classifier):
    read = interpretation(name, classifier)
    assert np.array_equal(read.log_p, classifier.predict(TEST.texts))
    np.testing.assert_allclose(read.alpha.sum(axis=1), read.scores.max(axis=1), atol=1e-3)
    found = {each.metric: each.value for each in shared_measures(read, TEST.labels)}
    assert found["fidelity"] > (0.55 if name == "uncorrected" else 0.65)
    assert np.isfinite(found["conciseness_3"])


def test_concept_scores_and_their_correction_by_hand():
    texts, concepts = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [-1.0, 0.0]])
    scores = baselines.concept_scores(texts, concepts)
    np.testing.assert_allclose(scores, [[1.0, -1.0], [0.0, 0.0]])
    corrected = baselines.corrected_scores(scores, np.array([0, 1]), np.array([0, 0]))
    np.testing.assert_allclose(corrected, [[1.0, 0.0], [0.0, 0.0]])


def test_class_words_are_those_of_the_class():
    words, of_class = baselines.class_words(TRAIN, 2, 4)
    assert len(words) == 8 and of_class.tolist() == [0] * 4 + [1] * 4
    low = [int(word[1:]) < 20 for word in words]
    assert np.mean(low[:4]) > 0.7 and np.mean(low[4:]) < 0.3


def test_the_surrogate_of_lime_knows_a_classifier_that_adds_up_words():
    class Additive(Classifier):
        """p of class 1 is the share of words from 20 on."""

        def __init__(self):
            """Nothing is tuned."""

        def predict(self, texts, **_):
            shares = [np.mean([int(w[1:]) >= 20 for w in text.split()]) for text in texts]
            p = np.clip(np.array(shares), 0.01, 0.99)
            return np.log(np.stack([1 - p, p], axis=1))

    model, texts = Additive(), TEST.texts[:5]
    assert np.array_equal(baselines.lime_classes(model, texts), model.predict(texts).argmax(axis=1))
