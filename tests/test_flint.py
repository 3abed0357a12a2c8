"""FLINT on tiny classifiers: by design and post hoc, saved, captured, explained, scored."""

import numpy as np
import pytest
import torch
from small_models import tiny
from test_finetuning import TEST, TOKENIZER, TRAIN, VAL

import activation_store as astore
import lmmono as lm
from activation_store.write.recorder import digest
from lmmono.errors import RobustnessError
from lmmono.methods import flint_losses
from lmmono.methods.flint import ATTRIBUTES, Flint, load_flint
from lmmono.methods.flint_gradients import gradient_agreement, integrated_gradients
from lmmono.methods.flint_interpreter import counted_tokens
from lmmono.methods.flint_objective import FlintObjective, flint_weights
from lmmono.methods.flint_pictures import as_json, class_attribute_rows, decoder_words, pictures
from lmmono.methods.flint_report import evaluate
from lmmono.probes.finetuning import FineTuning, finetune
from lmmono.recipe.objective_settings import (
    AttributeDistance,
    Continuity,
    FlintSettings,
    Perturbation,
)
from lmmono.training.objectives import ObjectiveContext

HOW = FineTuning(epochs=12, lr=1e-2, batch_texts=16)
SMALL = {"n_attributes": 6, "d_hidden": 32, "lr": HOW.lr, "tuning": HOW}


def fitted(family="gpt2", mode="by_design", model=None, **settings):
    flint = Flint(mode=mode, **{**SMALL, **settings})
    return flint.fit(tiny(family) if model is None else model, TRAIN, VAL, tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def flint():
    """Learned by design on a GPT-2."""
    return fitted()


@pytest.fixture(scope="module")
def classifier():
    """A finished classifier."""
    return finetune(
        tiny("gpt2"), TRAIN, VAL, n_classes=2, seed=0, settings=HOW, tokenizer=TOKENIZER
    )


@pytest.fixture(scope="module")
def post_hoc(classifier):
    """An interpreter of it, and what it was before."""
    before, texts = digest(classifier.network), classifier.predict(TEST.texts)
    return Flint(mode="post_hoc", **SMALL).fit(classifier, TRAIN, VAL), before, texts


def test_by_design_learns_the_classes_and_an_interpreter_that_agrees(flint):
    read = flint.interpret(TEST.texts)
    assert flint.classifier.accuracy(TEST) > 0.8 and read.agree.mean() > 0.7
    assert (read.phi >= 0).all() and (read.weight >= 0).all()
    np.testing.assert_allclose(
        read.alpha.sum(axis=1), read.scores.max(axis=1), rtol=1e-4, atol=1e-5
    )
    assert [len(acts) for acts in read.acts] == [len(ids) for ids in read.ids]
    np.testing.assert_allclose(
        read.phi[0], read.acts[0][1:].mean(axis=0), rtol=1e-4, err_msg="the classifier's pooling"
    )
    columns = flint.classifier.history[-1].terms
    assert {f"flint/{name}" for name in FlintObjective.columns} < set(columns)


def test_post_hoc_agrees_and_leaves_the_weights_and_predictions_the_same_bits(post_hoc):
    flint, before, log_p = post_hoc
    assert digest(flint.classifier.network) == before
    assert np.array_equal(flint.classifier.predict(TEST.texts), log_p)
    assert flint.interpret(TEST.texts).agree.mean() > 0.7
    assert len(flint.classifier.history) == HOW.epochs, "what is known of its tuning stays"


@pytest.mark.parametrize("family", ["crate", "llama"])
def test_other_decoders_have_attributes_too(family):
    found = fitted(family, tuning=FineTuning(epochs=1), layers=[0, "blocks.1.mlp.hook_post"])
    assert found.hooks == ("blocks.0.hook_resid_post", "blocks.1.mlp.hook_post")
    assert np.isfinite(found.interpret(TEST.texts[:3]).scores).all()


@pytest.mark.parametrize("decoder", ["embed", "token"])
@pytest.mark.parametrize("pooling", ["last", "max", "lse", "attn"])
def test_every_decoder_and_pooling_gives_finite_losses(decoder, pooling):
    how = FineTuning(epochs=1, steps=3)
    found = fitted(decoder=decoder, pooling=pooling, tuning=how, variant="paper")
    assert np.isfinite(list(found.classifier.history[-1].terms.values())).all()
    assert "agreement suffers" in repr(found)


def test_padding_changes_nothing(flint):
    short, long = TEST.texts[0], " ".join(["w3"] * 20)
    together, alone = flint.interpret([short, long]), flint.interpret([short])
    np.testing.assert_allclose(together.phi[0], alone.phi[0], atol=1e-5)
    np.testing.assert_allclose(together.acts[0], alone.acts[0], atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "lse", "attn"])
def test_tokens_that_do_not_count_have_no_part_in_any_pooling(pooling):
    found = fitted(pooling=pooling, tuning=FineTuning(epochs=1, steps=1)).interpreter
    used = torch.tensor([[False, True, True, False, False]])
    tokens = torch.rand(1, 5, 6) * used[..., None]
    short = found.pool(tokens[:, :3], used[:, :3])
    torch.testing.assert_close(found.pool(tokens, used), short)


def test_the_token_before_a_text_does_not_count_unless_it_is_all():
    is_token = torch.tensor([[True, True, False], [True, False, False]])
    wanted = [[False, True, False], [True, False, False]]
    assert counted_tokens(is_token).tolist() == wanted


def test_detached_inputs_keep_the_losses_from_the_classifier(classifier):
    from lmmono.methods.flint import context_of

    for detach in (True, False):
        settings = FlintSettings(n_attributes=6, detach_inputs=detach)
        objective = FlintObjective(settings, context_of(classifier, TRAIN.texts))
        acts = {hook: torch.randn(2, 4, 16, requires_grad=True) for hook in objective.hooks}
        reading = objective.read(acts, torch.ones(2, 4, dtype=torch.bool))
        flint_losses.output_fidelity(reading.scores, torch.randn(2, 2)).backward()
        got = [x.grad is not None and bool(x.grad.abs().sum() > 0) for x in acts.values()]
        assert got == [not detach] * len(acts)


def test_weights_begin_one_after_the_other():
    at = {share: flint_weights(FlintSettings(), share) for share in (0.0, 0.2, 0.325, 1.0)}
    assert at[0.0] == pytest.approx(
        {"fidelity_loss": 0, "decoder_loss": 0.1, "conciseness": 0, "diversity": 0, "l1": 0}
    )
    assert at[0.2]["fidelity_loss"] == 0.5 and at[0.2]["conciseness"] == 0.0
    assert at[0.325]["conciseness"] == pytest.approx(0.1)
    assert at[1.0]["diversity"] == -0.05
    paper = FlintSettings(variant="paper")
    assert flint_weights(paper, 1.0)["diversity"] == -0.2 and paper.decided("head") == "signed"


def test_the_same_seed_gives_the_same_bits_and_a_saved_one_too(flint, tmp_path):
    again = fitted()
    texts = TEST.texts[:5]
    assert np.array_equal(flint.interpret(texts).scores, again.interpret(texts).scores)
    flint.save(tmp_path / "flint")
    loaded = load_flint(tmp_path / "flint", tiny("gpt2"), TOKENIZER)
    for name in ("scores", "phi", "log_p"):
        ours, theirs = (getattr(each.interpret(texts), name) for each in (flint, loaded))
        assert np.array_equal(ours, theirs), name
    assert repr(loaded) == repr(flint) and loaded.settings == flint.settings
    (tmp_path / "flint/interpreter.safetensors").write_bytes(b"nothing")
    with pytest.raises(RobustnessError, match="fit it again"):
        load_flint(tmp_path / "flint", tiny("gpt2"), TOKENIZER)


@pytest.mark.parametrize("of", ["attributes", "relevance"])
def test_attributes_can_be_held_together_under_noise_by_continuity(of):
    noise, distance = Perturbation(kind="embedding_gaussian"), AttributeDistance(of=of)
    held = Continuity(perturbations=(noise,), distances=(distance,), weight=5.0)
    found = fitted(tuning=FineTuning(epochs=4, lr=1e-2, objectives=(held,)))
    distances = [epoch.terms["continuity/attributes"] for epoch in found.classifier.history]
    assert 0 < distances[-1] < 2 and np.isfinite(found.interpret(TEST.texts[:3]).scores).all()


@pytest.mark.parametrize("mode", ["by_design", "post_hoc"])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(mode, classifier, tmp_path):
    model = classifier if mode == "post_hoc" else tiny("gpt2")
    how = {**SMALL, "tuning": FineTuning(epochs=3, lr=1e-2), "diversity_memory": 0.9}
    whole = Flint(mode=mode, **how).fit(model, TRAIN, VAL, tokenizer=TOKENIZER)

    def stopped(_what, done, _total, **_):
        if done == 2:
            raise KeyboardInterrupt

    for progress in (stopped, None):
        again = Flint(mode=mode, **how)
        given = {} if progress is None else {"progress": progress}
        try:
            again.fit(model, TRAIN, VAL, tokenizer=TOKENIZER, folder=tmp_path, **given)
        except KeyboardInterrupt:
            assert any(tmp_path.rglob("*.safetensors")), "the first epoch is kept"
    texts = TEST.texts[:5]
    assert np.array_equal(whole.interpret(texts).scores, again.interpret(texts).scores)


def test_what_cannot_be_is_refused_with_the_way_out(classifier):
    with pytest.raises(RobustnessError, match="50000 classes on 24 attributes.*fewer classes"):
        Flint().fit(tiny("gpt2"), TRAIN, VAL, n_classes=50_000, tokenizer=TOKENIZER)
    of_language = ObjectiveContext(tiny("gpt2"), False, 10, 0, 16)
    with pytest.raises(RobustnessError, match="this model tells tokens apart; put it into robust"):
        FlintObjective(FlintSettings(), of_language)
    with pytest.raises(RobustnessError, match="layers 7: the model has blocks 0 to 1"):
        fitted(layers=[7])
    with pytest.raises(RobustnessError, match="finished classifier is for mode='post_hoc'"):
        Flint().fit(classifier, TRAIN, VAL)
    with pytest.raises(RobustnessError, match="mode: want by_design or post_hoc"):
        Flint(mode="both")
    with pytest.raises(RobustnessError, match="n_attributes.*got 0"):
        Flint(n_attributes=0)
    with pytest.raises(RobustnessError, match="entropies_full"):
        Flint(entropies_from=0.5)
    with pytest.raises(RobustnessError, match="not fitted"):
        Flint().predict(["w1"])
    with pytest.raises(RobustnessError, match="no content word is in 999"):
        fitted(min_documents=999)


def test_attributes_that_all_died_are_no_interpretation():
    with pytest.raises(RobustnessError, match=r"every attribute is 0 .* was 3: take a lower lr"):
        fitted(lr=3.0, l1_weight=50.0, tuning=FineTuning(epochs=3, lr=1e-2))


def test_what_is_likely_to_go_wrong_is_said():
    found = fitted(n_attributes=70, diversity="mi", tuning=FineTuning(epochs=1, steps=1))
    for text in ("above 64", "diversity mi alone", "batches of 16 texts underestimate"):
        assert text in repr(found)


def test_attributes_are_a_hook_that_is_captured_explained_and_scored(flint, tmp_path):
    texts = [" ".join(TEST.texts[i : i + 3]) for i in range(0, 60, 3)]
    with astore.open(tmp_path / "store.duckdb", "w") as store:
        lm.capture(flint.model, texts, hooks=ATTRIBUTES, into=store, n_ctx=16, max_density=1.0)
        lm.explain(store, explainer="token_lookup")
        lm.score(store, scorer="simulation_random")
        n_units = store.sql("SELECT count(*) FROM unit_stats WHERE hook = $h", h=ATTRIBUTES)
        assert n_units.fetchone() == (6,)
        scores = store.sql("SELECT count(*) FROM scores WHERE metric = 'simulation_random'")
        assert scores.fetchone()[0] > 0
    logits, acts = lm.run_with_cache(
        flint.model, "w1 w2", [ATTRIBUTES, "blocks.0.hook_resid_post"], tokenizer=TOKENIZER
    )
    assert logits.shape == (1, 1, 2) and acts[ATTRIBUTES].shape[-1] == 6
    assert acts["blocks.0.hook_resid_post"].shape[-1] == 16


def test_every_measure_is_taken_and_named_in_the_registry(flint):
    from lmmono.registry.metrics import METRICS

    edited = [text.replace("w1 ", "w2 ") for text in TEST.texts]
    report = evaluate(flint, TEST, ood=TEST.texts[:10], edited=edited, n_explained=6)
    names = [each.metric for each in report.values]
    assert set(names) <= set(METRICS) and len(set(names)) == len(names)
    for name in (
        "fidelity_ood",
        "fidelity_noisy",
        "comprehensiveness_gradients",
        "word_gain",
        "attribute_flips",
    ):
        assert np.isfinite(report[name]), name
    assert report["fidelity"] > 0.7 and 1.0 <= report["conciseness_3"] <= 6.0


def test_integrated_gradients_add_up_to_what_the_text_changes(flint):
    read = flint.interpret(TEST.texts[:4])
    label = int(read.log_p[0].argmax())
    made = integrated_gradients(flint, read.ids[0], label=label, n_steps=64)
    table = flint.model.get_input_embeddings().weight
    network = flint.classifier.network
    with torch.no_grad():
        ids = flint.classifier.reader.block([read.ids[0]])
        lengths = torch.tensor([len(read.ids[0])])
        whole = network(ids, lengths)[0, label]
        blank = flint.model.get_input_embeddings().register_forward_hook(
            lambda m, a, x: table.mean(0).expand_as(x)
        )
        empty = network(ids, lengths)[0, label]
        blank.remove()
    assert made.sum() == pytest.approx(float(whole - empty), abs=0.02 * abs(float(whole)) + 0.02)
    agreement, n = gradient_agreement(flint, read, range(4))
    assert n == 4 and -1 <= agreement <= 1
    with pytest.raises(RobustnessError, match="want a label or an attribute"):
        integrated_gradients(flint, read.ids[0])


def test_pictures_show_windows_words_and_searched_texts_beside_a_control(flint):
    read = flint.interpret(TEST.texts)
    shown = pictures(flint, read, maximise=1, n_words=5)
    assert len(shown) == 6
    first = max(shown, key=lambda each: each.maximised is not None)
    assert first.maximised is not None and first.control is not None
    assert first.maximised.after >= first.maximised.before
    assert len(first.maximised.tokens) == len(first.maximised.start)
    assert len(first.words) == 5 and set(first.words) <= {f"w{i}" for i in range(40)}
    assert first.top[0].phi == pytest.approx(
        read.phi[
            read.classes == np.nanargmax(read.matrix[:, first.attribute]), first.attribute
        ].max()
    )
    texts = [window.text for window in first.top]
    assert len(set(texts)) == len(texts) and len(first.top[0].tokens) == len(first.top[0].acts)
    told = as_json(shown, ["low", "high"], task="words")
    assert told["classes"] == ["low", "high"] and len(told["attributes"]) == 6
    rows = class_attribute_rows(read, ["low", "high"], task="words", feature="flint", seed=0)
    assert len(rows) == 12 and {row["preset"] for row in rows} == {"low", "high"}
    assert decoder_words(flint, 0, 3)[0] == tuple(decoder_words(flint, 0, 5)[0][:3])
