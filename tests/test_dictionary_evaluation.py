"""Reports of dictionaries, against the same computed by hand, sae-lens, SciPy and planted truth."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from small_dictionaries import Given, as_ids, small_rows
from small_models import small, tiny
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import cosine_similarity, cross_entropy

import activation_store as astore
import lmmono as lm
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.evaluation import dead_fraction, recovered
from lmmono.errors import DictionaryError
from lmmono.models.hooks import Edit, attached, run_with_cache, run_with_edit
from lmmono.registry.metrics import METRICS
from lmmono.stats.bootstrap import DocumentDraws, ratio

POST, RESID = "blocks.0.mlp.hook_post", "blocks.1.hook_resid_post"


def loss_of(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def trained_to_predict(rows: lm.data.TokenRows) -> torch.nn.Module:
    """Return a model that knows the rows well, so that ablations hurt."""
    torch.manual_seed(0)
    model, ids = tiny("gpt2"), as_ids(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        logits = model(ids).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval()


def test_every_measure_is_what_its_formula_gives_by_hand():
    rows = small_rows()
    model, ids, given = trained_to_predict(rows), as_ids(rows), Given(64, 30, hook=POST)
    report = lm.evaluate(given, model, rows, batch_tokens=48)
    clean, cache = run_with_cache(model, ids, POST)
    x = cache[POST].flatten(0, 1).double()
    acts, hat = given.encode(x.float()), given.reconstruct(x.float()).double()
    assert report.l0.value == pytest.approx((acts != 0).sum(1).double().mean().item())
    fvu = (x - hat).square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu.value == pytest.approx(fvu.item(), rel=1e-6)
    assert report.cosine.value == pytest.approx(cosine_similarity(x, hat).mean().item(), rel=1e-6)
    shrinkage = hat.square().sum() / (x * hat).sum()
    assert report.shrinkage.value == pytest.approx(shrinkage.item(), rel=1e-6)
    assert report.dead_fraction.value == pytest.approx(((acts != 0).sum(0) == 0).double().mean())
    assert report.dead_fraction.value >= 2 / 30
    assert report.n_active.tolist() == (acts != 0).sum(0).tolist()

    def with_in_place(value: torch.Tensor | float) -> torch.Tensor:
        return run_with_edit(model, ids, Edit(POST, "set", value))

    spliced = with_in_place(hat.float().view(9, 16, 64))
    losses = {"clean": clean, "spliced": spliced, "zero": with_in_place(0.0)}
    losses["mean"] = with_in_place(x.mean(0).float())
    loss = {name: loss_of(logits, ids) for name, logits in losses.items()}
    for name, value in loss.items():
        assert getattr(report, f"loss_{name}").value == pytest.approx(value, rel=1e-5)
    for name in ("zero", "mean"):
        by_hand = (loss[name] - loss["spliced"]) / (loss[name] - loss["clean"])
        found = getattr(report, f"ce_loss_recovered_{name}")
        assert found.value == pytest.approx(by_hand, rel=1e-4) and found.low < found.high
    kl = kl_divergence(Categorical(logits=clean), Categorical(logits=spliced)).mean().item()
    assert report.kl.value == pytest.approx(kl, rel=1e-4)
    assert (report.n_tokens, report.n_documents) == (144, 14)
    assert report.loss_clean.n == 9 * 15


def test_an_identity_dictionary_reconstructs_all_and_costs_nothing():
    rows = small_rows()
    model = trained_to_predict(rows)
    identity = Control("raw").fit(np.eye(64, dtype=np.float32))
    report = lm.evaluate(identity, model, rows, hook=POST)
    assert report.fvu.value == 0.0
    assert report.loss_spliced.value == pytest.approx(report.loss_clean.value, abs=1e-7)
    assert report.kl.value == pytest.approx(0.0, abs=1e-7)
    assert report.shrinkage.value == pytest.approx(1.0)
    assert report.cosine.value == pytest.approx(1.0)
    assert report.ce_loss_recovered_zero.value == pytest.approx(1.0, abs=1e-6)
    assert report.ce_loss_recovered_mean.value == pytest.approx(1.0, abs=1e-6)
    assert report.loss_zero.value > report.loss_clean.value


class LensModel:
    """What sae-lens asks of a model, answered by one of ours."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def __call__(self, tokens, return_type, loss_per_token):
        logits = self.model(tokens).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return logits, losses

    def run_with_cache(self, tokens, names_filter, **_):
        return run_with_cache(self.model, tokens, names_filter)

    def run_with_hooks(self, tokens, fwd_hooks, **options):
        (name, function) = fwd_hooks[0]
        with attached(self.model, {name: lambda acts: function(acts, hook=None)}):
            return self(tokens, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_definitions_coincide_sae_lens_finds_the_same():
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.evals import get_eval_everything_config, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    rows = small_rows()
    model, given = trained_to_predict(rows), Given(64, 30, hook=POST)
    with torch.no_grad():
        sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=30, apply_b_dec_to_input=False))
        sae.load_state_dict(
            {"W_enc": given.weights["W_enc"], "W_dec": given.weights["W_dec"]}
            | {"b_enc": given.weights["b"], "b_dec": torch.zeros(64)}
        )
    sae.cfg.metadata.hook_name = POST
    store = SimpleNamespace(
        store_batch_size_prompts=9,
        context_size=16,
        get_batch_tokens=lambda _: as_ids(rows),
        reset_input_dataset=lambda: None,
    )
    config = get_eval_everything_config(9, 1, 1)
    with torch.no_grad():
        theirs, features = run_evals(
            sae, store, LensModel(model), ActivationScaler(), config, exclude_special_tokens=False
        )
    ours = lm.evaluate(given, model, rows)
    quality, loss = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    assert 1 - ours.fvu.value == pytest.approx(quality["explained_variance"], rel=1e-4)
    assert ours.cosine.value == pytest.approx(quality["cossim"], rel=1e-4)
    assert ours.l0.value == pytest.approx(theirs["sparsity"]["l0"])
    bias = theirs["shrinkage"]["relative_reconstruction_bias"]
    assert ours.shrinkage.value == pytest.approx(bias, rel=1e-4)
    assert ours.ce_loss_recovered_zero.value == pytest.approx(loss["ce_loss_score"], rel=1e-3)
    assert ours.loss_zero.value == pytest.approx(loss["ce_loss_with_ablation"], rel=1e-4)
    assert ours.loss_spliced.value == pytest.approx(loss["ce_loss_with_sae"], rel=1e-4)
    kl = theirs["model_behavior_preservation"]["kl_div_with_sae"]
    assert ours.kl.value == pytest.approx(kl, rel=1e-3)
    assert ours.n_active / ours.n_tokens == pytest.approx(features["feature_density"])


def test_several_dictionaries_share_the_clean_and_the_ablated_passes():
    model, rows = small(), small_rows()
    given = [Given(64, 30, 0, POST), Given(64, 20, 1, POST), Given(16, 30, 2, RESID)]
    alone = [lm.evaluate(each, model, rows, max_tokens=96) for each in given]
    passes: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: passes.append(1))
    together = lm.evaluate(given, model, rows, max_tokens=96, batch_tokens=32)
    handle.remove()
    widths = len(given)  # one token through the model says how wide a hook is
    assert len(passes) == widths + 3 * (1 + 2 * 2 + len(given))
    for one, other in zip(alone, together, strict=True):
        assert other.hook == one.hook
        for mine, theirs in zip(one.rows(), other.rows(), strict=True):
            numbers = [mine["value"], mine["ci_low"], mine["ci_high"]]
            found = [theirs["value"], theirs["ci_low"], theirs["ci_high"]]
            assert (mine["metric"], mine["preset"]) == (theirs["metric"], theirs["preset"])
            if numbers[0] is None:
                assert theirs["failure"] == mine["failure"]
            else:
                assert found == pytest.approx(numbers, rel=1e-4, abs=1e-6)


def test_what_is_not_lost_cannot_be_recovered():
    model, rows = tiny("gpt2"), small_rows()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight.zero_()
        model.transformer.h[0].mlp.c_proj.bias.zero_()
    report = lm.evaluate(Given(16, 20, hook="blocks.0.hook_mlp_out"), model, rows)
    assert np.isnan(report.ce_loss_recovered_zero.value)
    assert report.ce_loss_recovered_zero.failure == "ablation does no clear harm"
    assert report.fvu.failure == "vectors do not vary"
    assert report.cosine.failure == "all vectors are zero" and report.cosine.nan_fraction == 1.0
    values = {(row["metric"], row["preset"]): row for row in report.rows()}
    assert values["fvu", None]["value"] is None
    assert values["ce_loss_recovered", "mean"]["failure"] == "ablation does no clear harm"
    assert "undefined (vectors do not vary)" in repr(report)


def test_recovery_needs_an_ablation_that_hurts_on_every_redraw():
    draws = DocumentDraws(20, 20, 2, 0, 0.95)
    clean, spliced = np.array([1.0, 1.0, 1.0]), np.array([1.5, 1.5, 1.25])
    found = recovered(draws, clean, spliced, np.array([2.0, 3.0, 2.0]), 18)
    assert found.value == 0.5 and found.n == 18
    assert found.low == pytest.approx(0.75) and found.high == pytest.approx(0.75)
    assert recovered(draws, clean, spliced, np.array([2.0, 3.0, 0.9]), 18).failure is not None


def test_intervals_of_a_ratio_are_those_of_scipy():
    rng = np.random.default_rng(0)
    below = rng.integers(5, 50, 30).astype(float)
    above = below * rng.uniform(0.2, 0.6, 30)
    draws = DocumentDraws(30, int(below.sum()), 20_000, 0, 0.9)
    ours = draws.estimate(ratio(draws.totals(above), draws.totals(below)))
    theirs = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        n_resamples=20_000,
        confidence_level=0.9,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert ours.value == above.sum() / below.sum()
    width = ours.high - ours.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_intervals_over_documents_cover_and_those_over_tokens_would_not():
    rng, truth, hits, token_hits = np.random.default_rng(0), 0.4, 0, 0
    repeats, n_documents = 300, 40
    for _ in range(repeats):
        lengths = rng.integers(10, 60, n_documents)
        rates = rng.beta(4, 6, n_documents)  # tokens of a document hang together
        counts = rng.binomial(lengths, rates).astype(float)
        draws = DocumentDraws(
            n_documents, int(lengths.sum()), 400, int(rng.integers(1 << 30)), 0.95
        )
        found = draws.estimate(draws.totals(counts) / draws.totals(lengths.astype(float)))
        hits += found.low <= truth <= found.high
        half = 1.96 * np.sqrt(found.value * (1 - found.value) / lengths.sum())
        token_hits += abs(found.value - truth) <= half
    assert 0.90 <= hits / repeats <= 0.98
    assert token_hits / repeats < 0.75


def test_the_interval_of_the_dead_share_covers_what_other_documents_would_give():
    rng, repeats, hits = np.random.default_rng(0), 300, 0
    rates = 10 ** rng.uniform(-4, -0.5, 200)  # chance that a latent fires in a document
    expected = ((1 - rates) ** 50).mean()
    for _ in range(repeats):
        fired = rng.random((50, 200)) < rates
        found = dead_fraction(DocumentDraws(50, 1000, 0, 0, 0.95), fired)
        assert found.value == (~fired.any(0)).mean()
        hits += found.low <= expected <= found.high
    assert hits / repeats >= 0.93


def test_one_document_gives_numbers_without_intervals():
    report = lm.evaluate(Given(64, 30, hook=POST), small(), small_rows(document=10_000))
    assert report.n_documents == 1
    for row in report.rows():
        assert row["ci_low"] is None and row["ci_high"] is None
    assert report.l0.value > 0


def test_a_report_goes_into_a_store_and_keeps_what_the_store_knew(tmp_path):
    report = lm.evaluate(Given(64, 30, hook=POST), small(), small_rows())
    with astore.open(tmp_path / "run", "w") as store:
        known = {**report.dictionary_row("given"), "l0": None, "latents_hook": "x.hook_sae"}
        store.append("dictionaries", [known])
        for _ in range(2):
            report.save_to(store, "given", path="dictionaries/given")
        row = store.sql("FROM dictionaries").df().iloc[0]
        scores = store.sql("FROM all_scores").df()
        joined = store.sql(
            """SELECT s.value FROM all_scores s JOIN dictionaries d ON s.dictionary = d.name
            WHERE metric = 'fvu' AND d.fvu = s.value"""
        ).fetchall()
    assert (row.l0, row.latents_hook, row.path) == (
        report.l0.value,
        "x.hook_sae",
        "dictionaries/given",
    )
    assert len(scores) == len(report.rows()) == 13
    assert joined == [(report.fvu.value,)]
    assert set(scores.metric) <= set(METRICS) and set(scores.n_documents) == {14}
    presets = set(scores[scores.metric == "ce_loss_recovered"].preset)
    assert presets == {"zero", "mean"}
    histogram = json.loads(scores[scores.metric == "density"].details.iloc[0])
    assert sum(histogram["n_latents"]) + histogram["n_dead"] == 30
    assert len(histogram["log10_edges"]) == len(histogram["n_latents"]) + 1


def test_a_name_of_other_weights_is_refused_and_nothing_is_written(tmp_path):
    model, rows = small(), small_rows()
    first, second = lm.evaluate([Given(64, 30, s, POST) for s in (0, 1)], model, rows)
    with astore.open(tmp_path / "run", "w") as store:
        first.save_to(store, "given")
        before = store.sql("FROM all_scores ORDER BY ALL").fetchall()
        with pytest.raises(DictionaryError, match="with other weights; give another name"):
            second.save_to(store, "given")
        assert store.sql("FROM all_scores ORDER BY ALL").fetchall() == before


def test_activations_that_are_not_finite_are_refused():
    model = small()
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = float("nan")
    with pytest.raises(DictionaryError, match="activations are NaN or infinite"):
        lm.evaluate(Given(64, 30, hook=POST), model, small_rows())
    assert not model.training


@pytest.mark.parametrize("arch", ["gpt2", "crate"])
def test_padding_changes_no_measure(arch):
    short = lm.data.TokenRows(small_rows().ids[:, :10], small_rows().doc_ids[:, :10], 0, "score")
    ids, docs = np.zeros((len(short), 16), np.uint16), np.full((len(short), 16), -1, np.int32)
    ids[:, 6:], docs[:, 6:] = short.ids, short.doc_ids
    padded = lm.data.TokenRows(ids, docs, 0, "score")
    model, given = tiny(arch), Given(64, 30, hook=POST)
    options = {"batch_tokens": 48, "n_resamples": 20}
    alone, report = (lm.evaluate(given, model, part, **options) for part in (short, padded))
    assert (report.n_tokens, report.n_documents) == (alone.n_tokens, alone.n_documents)
    for ours, theirs in zip(report.rows(), alone.rows(), strict=True):
        if theirs["value"] is None:  # an untrained model, which an ablation does no clear harm
            assert ours["value"] is None
        else:
            assert ours["value"] == pytest.approx(theirs["value"], rel=1e-4), ours
        assert ours["n"] == theirs["n"]


def test_skipped_tokens_keep_their_activation_and_count_nowhere():
    rows = small_rows()
    model, ids, given = trained_to_predict(rows), as_ids(rows), Given(64, 30, hook=POST)
    skip = astore.Skip(token_ids=(int(rows.ids[0, 3]),), first=2)
    report = lm.evaluate(given, model, rows, skip=skip, n_resamples=20)
    counts = torch.from_numpy(~skip.mask(rows.ids, rows.doc_ids))
    _, cache = run_with_cache(model, ids, POST)
    x = cache[POST][counts].double()
    hat = given.reconstruct(cache[POST].flatten(0, 1)).view_as(cache[POST])
    assert report.n_tokens == int(counts.sum()) < counts.numel()
    fvu = (x - hat[counts].double()).square().sum() / (x - x.mean(0)).square().sum()
    assert report.fvu.value == pytest.approx(fvu.item(), rel=1e-5)

    def loss(value: torch.Tensor) -> float:
        whole = torch.where(counts[..., None], value, cache[POST])
        logits = run_with_edit(model, ids, Edit(POST, "set", whole))
        each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return each.view(len(ids), -1)[counts[:, :-1]].mean().item()

    assert report.loss_spliced.value == pytest.approx(loss(hat), rel=1e-5)
    assert report.loss_zero.value == pytest.approx(loss(torch.zeros_like(hat)), rel=1e-5)
    assert report.loss_mean.value == pytest.approx(loss(x.mean(0).float().expand_as(hat)), rel=1e-5)
    assert report.loss_clean.value == pytest.approx(loss(cache[POST]), rel=1e-5)
    assert report.loss_clean.n == int(counts[:, :-1].sum())
