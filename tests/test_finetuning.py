"""A model tuned to classify texts under wrong labels: whole, and by LoRA."""

import copy
import sys

import lookup_model
import numpy as np
import pytest
import torch
from small_models import tiny

from lmmono.errors import RobustnessError
from lmmono.probes.finetuning import LOSSES, FineTuning, LabelledTexts, finetune

TOKENIZER = lookup_model.tokenizer()
HOW = {
    "full": FineTuning(epochs=4, lr=1e-2),
    "lora": FineTuning("lora", epochs=4, lr=2e-2, dropout=0.0, pooling="last"),
}


def drawn(seed: int, n: int = 64, wrong: float = 0.0) -> LabelledTexts:
    """Texts of words 1 to 19 or of words 20 to 38, which are the classes; some labels are wrong."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    words = rng.integers(1, 20, (n, 5)) + 19 * labels[:, None]
    flipped = rng.permutation(n)[: round(wrong * n)]
    labels[flipped] = 1 - labels[flipped]
    return LabelledTexts([" ".join(f"w{i}" for i in row) for row in words], labels)


TRAIN, VAL, TEST = drawn(0, wrong=0.1), drawn(1, 40, wrong=0.1), drawn(2, 100)


def tuned(family="gpt2", how=HOW["lora"], train=TRAIN, seed=0, model=None):
    return finetune(
        tiny(family) if model is None else model,
        train,
        VAL,
        n_classes=2,
        seed=seed,
        settings=how,
        tokenizer=TOKENIZER,
    )


@pytest.fixture(scope="module")
def lora():
    """A model tuned by the defaults of `tuned`."""
    return tuned()


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "crate"])
def test_a_model_learns_and_the_one_given_stays(family, method):
    model = tiny(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = tuned(family, HOW[method], model=model)
    assert found.accuracy(TEST) > 0.6  # sixteen steps; chance is 0.5
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert not any("lora" in name for name, _ in model.named_modules())
    n_body = sum(p.numel() for p in model.base_model.parameters())
    n_head = 2 * 16 + 2
    assert found.n_trained == n_body + n_head if method == "full" else found.n_trained < n_body
    assert np.allclose(np.exp(found.predict(TEST.texts)).sum(axis=1), 1, atol=1e-5)


def test_a_model_that_was_frozen_to_be_studied_is_tuned_whole():
    model = tiny("gpt2").requires_grad_(False)
    frozen, plain = tuned(how=HOW["full"], model=model), tuned(how=HOW["full"])
    assert frozen.n_trained == plain.n_trained and frozen.history == plain.history
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "crate"])
def test_a_model_in_peft_is_tuned_from_what_its_adapter_computes(family, method):
    peft = pytest.importorskip("peft")
    kind = peft.LoraConfig(
        r=2, target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    wrapped = peft.get_peft_model(tiny(family), kind).eval()
    names = set(wrapped.state_dict())
    merged = copy.deepcopy(wrapped).merge_and_unload()
    found, plain = (tuned(how=HOW[method], model=model) for model in (wrapped, merged))
    assert found.n_trained == plain.n_trained
    np.testing.assert_allclose(found.predict(TEST.texts), plain.predict(TEST.texts), atol=1e-5)
    assert set(wrapped.state_dict()) == names, "the model given is left as it was"


def test_equal_seeds_give_equal_bits_and_others_do_not(lora):
    one, again, other = lora, tuned(), tuned(seed=1)
    assert np.array_equal(one.predict(TEST.texts), again.predict(TEST.texts))
    assert not np.array_equal(one.predict(TEST.texts), other.predict(TEST.texts))
    assert one.history == again.history


def test_the_epoch_is_the_best_on_given_validation_labels(lora):
    found = lora
    values = [epoch.val_accuracy for epoch in found.history]
    assert len(values) == 4 and found.chosen_epoch == values.index(max(values))
    assert found.accuracy(VAL) == max(values)
    assert f"epoch {found.chosen_epoch + 1} of 4" in repr(found)


def test_texts_do_not_depend_on_those_beside_them(lora):
    found = lora
    together = found.predict([*TEST.texts[:3], "w1 w2 w3 w4 w5 w6 w7 w8"])
    alone = np.concatenate([found.predict([text]) for text in TEST.texts[:3]])
    np.testing.assert_allclose(together[:3], alone, atol=1e-5)


def test_texts_over_the_context_are_cut_and_counted():
    long = " ".join(["w3"] * 100)
    texts = LabelledTexts([*TRAIN.texts, long], np.append(TRAIN.labels, 1))
    found = tuned(how=FineTuning(epochs=1), train=texts)
    assert found.n_truncated == 1
    assert np.isfinite(found.predict([long, ""])).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_tuned_with(loss):
    assert np.isfinite(tuned(how=FineTuning(loss=loss, epochs=1)).history[0].train_loss)


def test_what_cannot_be_learned_is_an_error():
    one = LabelledTexts(TRAIN.texts, np.zeros(len(TRAIN.texts), np.int64))
    with pytest.raises(RobustnessError, match="train: no label is of class 1"):
        tuned(train=one)
    with pytest.raises(RobustnessError, match="train: labels 0 to 3, want 0 to 1"):
        tuned(train=LabelledTexts(["w1", "w2"], np.array([0, 3])))
    with pytest.raises(RobustnessError, match="train: 2 texts, 1 labels"):
        tuned(train=LabelledTexts(["w1", "w2"], np.array([0])))
    with pytest.raises(RobustnessError, match="train: no text"):
        tuned(train=LabelledTexts([], np.zeros(0, np.int64)))
    with pytest.raises(RobustnessError, match="pass tokenizer="):
        finetune(tiny("gpt2"), TRAIN, VAL, n_classes=2, seed=0)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RobustnessError, match=r"lora needs.*lmmono\[noise\]"):
        tuned()
