"""The battery on a classifier: graded edits with a known distance, gradients, saliency, attacks."""

import numpy as np
import pytest
import torch

from lmmono.data.planted.graded_edits import attributes_apart, graded_edit
from lmmono.data.planted.lexicon import Lexicon
from lmmono.data.tasks.planted_tasks import planted_task
from lmmono.data.tasks.task import Labelled
from lmmono.data.tokenizers import build_tokenizer
from lmmono.methods import continuity_battery as battery
from lmmono.models.build import build_model
from lmmono.probes.finetuning import Classifier, FineTuning, LabelledTexts, finetune
from lmmono.recipe.sections import Gpt2Model, PlantedCorpus, Splits, WordTokenizer

TASK = planted_task("planted_polarity", n_train=128, n_val=64, n_test=48)


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    """A tiny GPT-2 tuned to tell praise from blame."""
    corpus = PlantedCorpus(n_documents=300)
    tokenizer = build_tokenizer(WordTokenizer(), corpus, Splits())
    section = Gpt2Model(arch="gpt2", n_layers=1, d_model=16, n_heads=2)
    model = build_model(section, d_vocab=len(tokenizer), n_ctx=64, seed=0)
    train, val = (
        LabelledTexts(TASK.part(name).texts, TASK.part(name).labels) for name in ("train", "val")
    )
    how = FineTuning(epochs=4, lr=2e-2)
    return finetune(model, train, val, n_classes=2, seed=0, settings=how, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def data() -> Labelled:
    return TASK.part("test").take(np.arange(16))


def by_metric(values, group=None):
    return {
        (value.metric, value.level): value.estimate
        for value in values
        if group is None or value.group == group
    }


def test_graded_edits_are_as_many_attributes_apart_as_they_say():
    words = {word.form: word for word in Lexicon().words}
    text = max(TASK.part("train").texts, key=len)
    for distance in range(4):
        edited = graded_edit(text, n_words=3, distance=distance, seed=1)
        assert edited is not None
        pairs = [(a, b) for a, b in zip(text.split(), edited.split(), strict=True) if a != b]
        apart = [attributes_apart(words[a], words[b]) for a, b in pairs]
        assert len(pairs) == 3 and sorted(map(len, apart)) == [0] * (3 - distance) + [1] * distance
        classes = [words[a].word_class == words[b].word_class for a, b in pairs]
        assert all(classes)
    assert graded_edit("the", n_words=3, distance=0, seed=1) is None
    same = [graded_edit(text, n_words=3, distance=1, seed=1) for _ in range(2)]
    assert same[0] == same[1]


def test_outputs_under_changes_are_those_of_predict(classifier, data):
    changed = list(reversed(data.texts))
    found = by_metric(battery.changed_values(classifier, data, changed, "reversed", 1.0, seed=0))
    p, q = (np.exp(classifier.predict(texts)) for texts in (data.texts, changed))
    wanted = ((p - q) * (np.log(p) - np.log(q))).sum(axis=1)
    assert found["continuity_distance", 1.0].value == pytest.approx(wanted.mean(), abs=1e-5)
    flips = (p.argmax(axis=1) != q.argmax(axis=1)).mean()
    assert found["flip_rate", 1.0].value == flips
    assert found["flip_rate", 1.0].low <= flips <= found["flip_rate", 1.0].high


def test_texts_that_did_not_change_are_at_distance_0_with_equal_saliency(classifier, data):
    values = battery.changed_values(
        classifier, data, data.texts, "none", 0.0, seed=0, saliency=True
    )
    found = by_metric(values)
    assert found["continuity_distance", 0.0].value == pytest.approx(0, abs=1e-7)
    assert found["flip_rate", 0.0].value == 0
    assert found["saliency_spearman", 0.0].value == pytest.approx(1)
    assert found["saliency_overlap", 0.0].value == 1


class Reader(Classifier):
    """Stands for a classifier that reads polarity, and a little the words themselves."""

    def __init__(self) -> None: ...

    def predict(self, texts, *, batch_texts=32):
        words = {word.form: (i, word.polarity) for i, word in enumerate(Lexicon().words)}
        read = [[words[form] for form in text.split()] for text in texts]
        logits = [sum(p + 0.01 * (i % 7) for i, p in row) for row in read]
        both = torch.tensor([[0.0, logit] for logit in logits])
        return both.log_softmax(dim=-1).numpy()


def test_meaning_costs_more_than_words_where_a_model_reads_it(data):
    how = {"seed": 0, "n_words": 1, "saliency": False}
    values = battery.graded_values(Reader(), data, attribute="polarity", **how)
    found = by_metric(values)
    assert found["meaning_ratio", 1.0].value > 10 and found["meaning_ratio", 1.0].low > 1
    assert found["continuity_distance", 0.0].value < found["continuity_distance", 1.0].value
    blind = by_metric(battery.graded_values(Reader(), data, attribute="topics", **how))
    assert blind["continuity_distance", 1.0].value < found["continuity_distance", 1.0].value


def test_gradients_and_confidence_of_clean_texts(classifier, data):
    found = by_metric(battery.clean_values(classifier, data, seed=0))
    p = np.exp(classifier.predict(data.texts)).max(axis=1).mean()
    assert found["confidence", None].value == pytest.approx(p, abs=1e-5)
    # |g||e| of a text by a difference quotient along the gradient
    (step,) = battery._steps(classifier, data.take(np.arange(1)))
    embeds = step.embed(step.batch.ids).detach()
    gradient = battery._loss_gradient(step, embeds)
    unit = gradient / gradient.norm()
    up, down = (
        float(step.again(embeds=embeds + sign * 2e-3 * unit).loss.detach()) for sign in (1, -1)
    )
    assert (up - down) / 4e-3 == pytest.approx(float(gradient.norm()), rel=0.02)
    assert found["gradient_change", None].value > 0


def test_attacks_and_their_transfer(classifier, data):
    own = list(battery.attack_values(classifier, data, ("characters",), seed=0))
    (value, report), *_ = own
    assert value.estimate.value == pytest.approx(report.accuracy_under_attack)
    again = battery.attack_values(
        classifier, data, ("characters",), seed=0, against={"characters": report}
    )
    transferred = [v for v, _ in again if v.metric == "transfer_accuracy"]
    # what was made against it works on it
    assert transferred[0].estimate.value == pytest.approx(report.accuracy_under_attack)
    small, large = battery.embedding_attack_values(classifier, data, (0.01, 10.0), seed=0)
    assert large.estimate.value <= small.estimate.value and large.estimate.value < 0.2


def test_noises_say_each_and_all_together(classifier, data):
    kinds = {"word_drop": 2, "word_shuffle": 5}
    values = list(battery.noise_values(classifier, data, kinds, seed=0))
    metrics = {(value.metric, value.group) for value in values}
    assert ("saliency_spearman", "word_shuffle") in metrics
    together = by_metric(values, "all noises")["consistency", 2.0].value
    assert together <= classifier.accuracy(LabelledTexts(data.texts, data.labels)) + 1e-9
    assert torch.is_grad_enabled()
