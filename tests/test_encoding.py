"""Texts to features: by hand from the model's own activations; noise; the store of features."""

import subprocess
import sys

import duckdb
import numpy as np
import pytest
import small_models
import torch
from lookup_model import N_WORDS, tokenizer

from lmmono.errors import RobustnessError
from lmmono.models.hooks import run_with_cache
from lmmono.suites.feature_families import FeatureFamily
from lmmono.suites.stored_codes import CodeStore
from lmmono.suites.text_codes import SIGMAS, InputNoise, ProbedCode, TextEncoder, probed_codes

STREAM = "blocks.1.hook_resid_post"
WORDS = [f"w{i}" for i in range(1, 40)]
TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 2 + i % 9)) for i in range(60)]


@pytest.fixture(scope="module")
def model():
    assert N_WORDS > 40
    return small_models.small()


def encoder(model, names=("raw",), poolings=("mean",), hook=STREAM) -> TextEncoder:
    families = {name: FeatureFamily(name) for name in names}
    features = probed_codes(families, model, hook, poolings)
    return TextEncoder(model, tokenizer(), features).fit(TEXTS)


def by_hand(model, text: str, hook: str = STREAM) -> torch.Tensor:
    """The rows of a text's tokens, read after the end-of-text token 0."""
    ids = torch.tensor([[0, *(int(word[1:]) for word in text.split())]])
    return run_with_cache(model, ids, hook)[1][hook][0, 1:].flatten(1)


def test_features_are_the_models_activations_pooled(model):
    whole = encoder(model, ("raw", "neurons"), ("mean", "max", "last")).encode(TEXTS)
    assert whole.n_truncated == whole.n_tokenless == 0
    for i in (0, 7, 33):
        rows = by_hand(model, TEXTS[i])
        neurons = by_hand(model, TEXTS[i], "blocks.1.mlp.hook_post")
        for name, want in (
            ("raw", rows.mean(0)),
            ("raw:max", rows.amax(0)),
            ("raw:last", rows[-1]),
            ("neurons", neurons.mean(0)),
        ):
            assert np.allclose(whole.codes[name][i], want, atol=1e-5), name


def test_a_code_is_taken_per_token_and_then_pooled(model):
    found = encoder(model, ("random_topk",)).encode(TEXTS[:3])
    made = encoder(model, ("random_topk",)).codes["random_topk"].family
    acts = made.transform(by_hand(model, TEXTS[2]))
    assert np.allclose(found.codes["random_topk"][2], acts.mean(0), atol=1e-5)
    pooled_first = made.transform(by_hand(model, TEXTS[2]).mean(0, keepdim=True))[0]
    assert not np.allclose(found.codes["random_topk"][2], pooled_first, atol=1e-3)


def test_long_and_empty_texts_are_counted(model):
    most = model.config.max_position_embeddings - 1
    words = [WORDS[i % 39] for i in range(most + 5)]
    given = [" ".join(words), " ".join(words[:most]), "", "w1"]
    made = encoder(model).encode(given)
    assert (made.n_truncated, made.n_tokenless) == (1, 1)
    assert np.allclose(made.codes["raw"][0], made.codes["raw"][1], atol=1e-5)
    end = run_with_cache(model, torch.tensor([[0]]), STREAM)[1][STREAM][0, 0]
    assert np.allclose(made.codes["raw"][2], end, atol=1e-5)


@pytest.mark.parametrize("kind", ["embedding_gaussian", "embedding_uniform", "hidden_gaussian"])
def test_noise_is_one_draw_per_text_and_seed(model, kind):
    coder = encoder(model)
    noise = InputNoise(kind, 3, seed=1)
    clean, noisy = coder.encode(TEXTS), coder.encode(TEXTS, noise=noise)
    again = coder.encode(TEXTS, noise=noise).codes["raw"]
    assert np.array_equal(noisy.codes["raw"], again)
    few = coder.encode(TEXTS[:5], noise=noise).codes["raw"]
    assert np.allclose(noisy.codes["raw"][:5], few, atol=1e-5), "the batch changes nothing"
    other = coder.encode(TEXTS, noise=InputNoise(kind, 3, seed=2)).codes["raw"]
    assert not np.allclose(again, other, atol=1e-2)
    assert not np.allclose(clean.codes["raw"], again, atol=1e-2)
    none = coder.encode(TEXTS, noise=InputNoise(kind, 0, seed=1)).codes["raw"]
    assert np.array_equal(clean.codes["raw"], none)


def test_hidden_noise_has_the_share_of_each_deviation_and_comes_before_the_code(model):
    coder = encoder(model, ("raw", "random_projection", "relu"), ("last",))
    clean = coder.encode(TEXTS * 20).codes
    noisy = coder.encode(TEXTS * 20, noise=InputNoise("hidden_gaussian", 4, seed=0)).codes
    added = noisy["raw"] - clean["raw"]
    rows = torch.cat([by_hand(model, text) for text in TEXTS])
    assert np.allclose(added.std(0), SIGMAS[4] * rows.std(0).numpy(), rtol=0.1)
    assert np.abs(added.mean(0) / added.std(0)).max() < 0.12
    projection, relu = (coder.codes[name].family for name in ("random_projection", "relu"))
    for name, family in (("random_projection", projection), ("relu", relu)):
        want = family.transform(torch.from_numpy(noisy["raw"]))
        assert np.allclose(noisy[name], want, atol=1e-4), "all families see the same noisy rows"


def test_uniform_noise_on_embeddings_has_no_mean_and_the_deviation_of_the_gaussian():
    for kind in ("embedding_uniform", "embedding_gaussian"):
        drawn = InputNoise(kind, 5, seed=0).draw(0, 0, (2000, 20)).numpy()
        assert abs(drawn.mean()) < 0.01 and drawn.std() == pytest.approx(SIGMAS[5], rel=0.01)
    assert InputNoise("embedding_uniform", 5, 0).draw(0, 0, (500, 9)).abs().max() < 1.04


def test_a_store_of_features_computes_each_text_and_feature_once(model, tmp_path):
    path = tmp_path / "features.duckdb"
    first = encoder(model, ("raw",))
    with CodeStore(path) as store:
        made = store.encode(first, TEXTS[:40] + TEXTS[:3], "train")
        more = store.encode(first, TEXTS[30:], "test")
    want = first.encode(TEXTS).codes["raw"]
    assert np.allclose(made.codes["raw"], want[[*range(40), 0, 1, 2]], atol=1e-6)
    assert np.allclose(more.codes["raw"], want[30:], atol=1e-6)
    with CodeStore(path) as store:  # another call, with another family
        both = store.encode(encoder(model, ("raw", "relu")), TEXTS, "train")
    assert np.array_equal(both.codes["raw"][:40], made.codes["raw"][:40])
    with duckdb.connect(str(path), read_only=True) as con:
        n = con.execute(
            "SELECT code_id, count(*) FROM code_vectors GROUP BY 1 ORDER BY 1"
        ).fetchall()
        codes = con.execute("SELECT family, d, model_digest FROM codes ORDER BY code_id").fetchall()
        n_tokens = con.execute("SELECT split, n_tokens FROM texts WHERE text_id = 59").fetchall()
        about = con.execute("SELECT comment FROM duckdb_tables() ORDER BY ALL").fetchall()
    n_texts = len(dict.fromkeys(TEXTS))
    assert n == [(0, n_texts), (1, n_texts)], "each text and code once"
    assert codes == [("raw", 16, first.model_digest), ("relu", 16, first.model_digest)]
    assert n_tokens == [("test", len(TEXTS[59].split()))] and all(text for (text,) in about)


def test_the_codes_of_one_tokenizer_are_not_taken_for_those_of_another(model, tmp_path):
    other = tokenizer()
    other.add_tokens(["unused"])  # an own vocabulary, whatever it gives for these texts
    families = {"raw": FeatureFamily("raw")}
    with CodeStore(tmp_path / "features.duckdb") as store:
        for each in (tokenizer(), tokenizer(), other):
            codes = probed_codes(families, model, STREAM, ("mean",))
            store.encode(TextEncoder(model, each, codes).fit(TEXTS), TEXTS[:4], "train")
    with duckdb.connect(str(tmp_path / "features.duckdb"), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM codes").fetchall() == [(2,)]


def test_a_damaged_or_foreign_file_of_codes_is_told_with_the_way_out(model, tmp_path):
    path = tmp_path / "features.duckdb"
    with CodeStore(path) as store:
        store.encode(encoder(model), TEXTS, "train")
    whole = path.read_bytes()
    for damaged in (whole[:100], b"no database" * 999, whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with (
            pytest.raises(RobustnessError, match=r"features.duckdb: .*delete it: codes are"),
            CodeStore(path) as store,
        ):
            store.encode(encoder(model), TEXTS, "train")
    flipped = bytearray(whole)
    for at in range(20_000, len(whole), 997):
        flipped[at] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(RobustnessError, match="delete it"), CodeStore(path) as store:
        store.encode(encoder(model), TEXTS, "train")
    path.unlink()
    holder = "import duckdb, sys; con = duckdb.connect(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline()
        with pytest.raises(RobustnessError, match="another process has it open"):
            CodeStore(path)
        other.communicate(b"\n")
    path.unlink()
    with duckdb.connect(str(path)) as con:
        con.execute("CREATE VIEW texts AS SELECT * FROM read_csv('/etc/passwd')")
    with pytest.raises(RobustnessError, match="no file of codes, it holds view texts"):
        CodeStore(path)


def test_ids_beyond_the_vocabulary_are_told_before_the_model_runs(model):
    other = tokenizer()
    other.add_tokens([f"new{i}" for i in range(5)])
    with pytest.raises(RobustnessError, match=r"gives id 40\d, the model has 50 tokens"):
        TextEncoder(model, other, probed_codes({}, model, STREAM, ("mean",))).fit(["new1 new2"])


def test_what_cannot_be_encoded_is_told(model):
    with pytest.raises(RobustnessError, match="pass tokenizer="):
        TextEncoder(model, None, [])
    family = FeatureFamily("raw")
    twice = [ProbedCode("a", family, STREAM, "mean")] * 2
    with pytest.raises(RobustnessError, match="names of their own"):
        TextEncoder(model, tokenizer(), twice)
    with pytest.raises(RobustnessError, match="did you mean hidden_gaussian"):
        InputNoise("hidden_gausian", 1, 0)
    with pytest.raises(RobustnessError, match="severity 6"):
        InputNoise("hidden_gaussian", 6, 0)
    bad = TextEncoder(
        model,
        tokenizer(),
        [ProbedCode("bad", FeatureFamily.of_encoder("bad", lambda x: x / 0), STREAM, "mean")],
    ).fit(TEXTS)
    with pytest.raises(RobustnessError, match="bad: features of 2 of 2 texts are not finite"):
        bad.encode(TEXTS[:2])
    with pytest.raises(RobustnessError, match="in no layer"):
        probed_codes({"neurons": FeatureFamily("neurons")}, model, "hook_embed", ("mean",))
