"""Classical decompositions: equal to scikit-learn in use, exact by seed, and plain about limits."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import NMF, PCA, FastICA, sparse_encode
from torch import Tensor

from lmmono.dictionaries.classical import Classical
from lmmono.dictionaries.coding import keep_largest, non_negative_code, orthogonal_pursuit
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.estimator import load_dictionary
from lmmono.dictionaries.vector_source import ArrayVectors
from lmmono.errors import DictionaryError

D_IN = 12
EVERY = {
    "pca": {"d_sae": 5},
    "ica": {"d_sae": 5},
    "nmf": {"d_sae": 5},
    "dictionary_learning": {"expansion": 2, "k": 3},
    "kmeans": {"d_sae": 7},
}


def sparse_mixture(n: int, d_sae: int, k: int, d_in: int = D_IN) -> tuple[Tensor, Tensor]:
    """Return vectors that are sums of k of d_sae unit directions, and the directions."""
    random = torch.Generator().manual_seed(3)
    truth = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=random), dim=1)
    chosen = torch.rand(n, d_sae, generator=random).topk(k, dim=1).indices
    sizes = 1 + torch.rand(n, k, generator=random)
    codes = torch.zeros(n, d_sae).scatter(1, chosen, sizes)
    return codes @ truth + 0.01 * torch.randn(n, d_in, generator=random) + 0.5, truth


@pytest.fixture(scope="module")
def x() -> Tensor:
    """400 non-negative vectors with a mean, so that every method can have them."""
    return sparse_mixture(400, 16, 3)[0].clamp(min=0)


def seen(x: Tensor) -> np.ndarray:
    """Return the vectors in the order in which a fit sees them."""
    return ArrayVectors(x).first(len(x))[""].numpy()


def matched(found: Tensor, truth: Tensor) -> float:
    """Return the mean |cosine| of the best one-to-one match."""
    cosine = (torch.nn.functional.normalize(found, dim=1) @ truth.T).abs().numpy()
    return float(cosine[linear_sum_assignment(-cosine)].mean())


def close(got: Tensor, wanted: np.ndarray, atol: float = 1e-4) -> None:
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-3, atol=atol)


def test_pca_encodes_and_decodes_as_scikit_learn(x: Tensor) -> None:
    ours = Classical("pca", d_sae=5).fit(x)
    theirs = PCA(5, svd_solver="full").fit(seen(x))
    acts = ours.encode(x)
    close(acts, theirs.transform(x.numpy()))
    close(ours.decode(acts), theirs.inverse_transform(theirs.transform(x.numpy())))


def test_ica_encodes_and_decodes_as_scikit_learn(x: Tensor) -> None:
    ours = Classical("ica", d_sae=5, seed=2, max_iterations=1000).fit(x)
    theirs = FastICA(5, whiten="unit-variance", random_state=2, max_iter=1000).fit(seen(x))
    acts = ours.encode(x)
    sizes = np.linalg.norm(theirs.mixing_, axis=0)
    close(acts, theirs.transform(x.numpy()) * sizes, atol=1e-3)
    close(ours.decode(acts), theirs.inverse_transform(theirs.transform(x.numpy())), atol=1e-3)


def test_nmf_encodes_and_decodes_as_scikit_learn(x: Tensor) -> None:
    ours = Classical("nmf", d_sae=5, max_iterations=2000).fit(x)
    theirs = NMF(5, random_state=0, max_iter=2000).fit(seen(x))
    theirs.set_params(tol=1e-6)  # a tighter use of the same directions
    codes = theirs.transform(x.numpy())
    acts = ours.encode(x)
    assert (acts >= 0).all()
    close(acts, codes * np.linalg.norm(theirs.components_, axis=1), atol=1e-3)
    close(ours.decode(acts), theirs.inverse_transform(codes), atol=1e-3)


def test_the_non_negative_code_is_scipys_optimum_token_by_token() -> None:
    random = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.rand(6, D_IN, generator=random), dim=1)
    x = torch.randn(20, D_IN, generator=random)
    got = non_negative_code(x, directions, tolerance=1e-7, max_iterations=2000)
    wanted = np.stack([nnls(directions.numpy().T, row)[0] for row in x.numpy()])
    close(got, wanted, atol=1e-3)


def test_pursuit_codes_are_scikit_learns_omp_on_the_same_directions(x: Tensor) -> None:
    ours = Classical("dictionary_learning", expansion=2, k=3).fit(x)
    w = ours.tensors()
    centred = (x - w["b_dec"]).numpy().astype(np.float64)
    directions = w["W_dec"].numpy().astype(np.float64)
    wanted = sparse_encode(centred, directions, algorithm="omp", n_nonzero_coefs=3)
    acts = ours.encode(x)
    assert int((acts != 0).sum(1).max()) == 3
    close(acts, wanted, atol=1e-3)
    close(ours.decode(acts), wanted @ directions + w["b_dec"].numpy(), atol=1e-3)


def test_pursuit_stops_where_nothing_is_left_or_nothing_is_new() -> None:
    directions = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [0, 0, 0]])
    x = torch.tensor([[2.0, 0, 0], [1, -3, 0], [0, 0, 0], [1, 2, 5]])
    got = orthogonal_pursuit(x, directions, 3)
    wanted = [[2.0, 0, 0, 0], [1, -3, 0, 0], [0, 0, 0, 0], [1, 2, 0, 0]]
    close(got, np.array(wanted))


def test_kmeans_fires_the_nearest_centroid_and_decodes_to_it(x: Tensor) -> None:
    ours = Classical("kmeans", d_sae=7, seed=1).fit(x)
    theirs = MiniBatchKMeans(7, random_state=1, max_iter=200)
    labels = theirs.fit(seen(x)).predict(x.numpy())
    acts = ours.encode(x)
    assert ((acts != 0).sum(1) == 1).all()
    np.testing.assert_array_equal(acts.argmax(1).numpy(), labels)
    close(ours.decode(acts), theirs.cluster_centers_[labels])


def test_dictionary_learning_recovers_planted_directions_far_above_the_random_floor() -> None:
    x, truth = sparse_mixture(3000, 32, 2, d_in=24)
    learned = Classical("dictionary_learning", d_sae=32, k=2).fit(x)
    floor = Control("random", d_sae=32, k=2).fit(x)
    pca = Classical("pca", d_sae=24, k=2).fit(x)
    found, chance = (matched(d.tensors()["W_dec"], truth) for d in (learned, floor))
    assert found > 0.9
    assert chance < 0.5
    errors = [float((d.reconstruct(x) - x).square().sum()) for d in (learned, floor, pca)]
    assert errors[0] < 0.1 * min(errors[1:])


@pytest.mark.parametrize("arch", EVERY)
def test_seeds_give_equal_bits_and_the_folder_gives_them_back(
    arch: str, x: Tensor, tmp_path: Path
) -> None:
    one, two = (Classical(arch, **EVERY[arch], seed=5).fit(x) for _ in range(2))
    assert one.digest == two.digest
    again = load_dictionary(one.save(tmp_path / arch))
    assert again.digest == one.digest
    assert (again.settings, again.facts, repr(again)) == (one.settings, one.facts, repr(one))
    assert torch.equal(again.encode(x), one.encode(x))
    assert torch.equal(again.reconstruct(x), one.reconstruct(x))
    assert again.tensors()["W_dec"].shape == (again.d_sae, D_IN)
    norms = again.tensors()["W_dec"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("arch", ["ica", "dictionary_learning", "kmeans"])
def test_another_seed_gives_another_dictionary(arch: str, x: Tensor) -> None:
    digests = {Classical(arch, **EVERY[arch], seed=seed).fit(x).digest for seed in (0, 1)}
    assert len(digests) == 2


@pytest.mark.parametrize("arch", ["pca", "ica", "nmf"])
def test_k_keeps_the_largest_coefficients_and_leaves_them_as_they_were(
    arch: str, x: Tensor
) -> None:
    whole = Classical(arch, d_sae=5).fit(x).encode(x)
    kept = Classical(arch, d_sae=5, k=2).fit(x).encode(x)
    assert torch.equal(kept, keep_largest(whole, 2))
    assert ((kept != 0).sum(1) <= 2).all()
    dropped = (whole - kept).abs().amax(1)
    smallest = kept.abs().where(kept != 0, torch.inf).amin(1)
    assert (dropped <= smallest).all()


def test_truncated_pca_is_the_best_of_all_choices_of_k_directions(x: Tensor) -> None:
    pca = Classical("pca", d_sae=5, k=2).fit(x)
    w = pca.tensors()
    errors = []
    for i in range(5):
        for j in range(i):
            basis = w["W_dec"][[i, j]]
            centred = x - w["b_dec"]
            errors.append((centred - centred @ basis.T @ basis).square().sum(1))
    best = torch.stack(errors).amin(0)
    torch.testing.assert_close((pca.reconstruct(x) - x).square().sum(1), best, atol=1e-4, rtol=1e-3)


def test_a_code_does_not_depend_on_the_other_tokens_of_its_batch(x: Tensor) -> None:
    for arch, settings in EVERY.items():
        dictionary = Classical(arch, **settings).fit(x)
        alone = torch.cat([dictionary.encode(row[None]) for row in x[:20]])
        torch.testing.assert_close(alone, dictionary.encode(x)[:20], atol=1e-4, rtol=1e-3)


def test_any_leading_shape_and_half_precision_are_taken(x: Tensor) -> None:
    pca = Classical("pca", d_sae=5).fit(x)
    assert pca.encode(x.view(4, 100, D_IN).half()).shape == (4, 100, 5)
    assert pca.reconstruct(x[0]).shape == (D_IN,)


def test_a_fit_that_did_not_converge_says_so_and_prints_nothing(x: Tensor) -> None:
    for arch in ("ica", "nmf", "dictionary_learning", "kmeans"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            fitted = Classical(arch, **EVERY[arch], max_iterations=1).fit(x)
        assert not shown
        assert fitted.facts["converged"] is False
        assert fitted.facts["n_iterations"] == 1
    assert Classical("pca", d_sae=5).fit(x).facts["converged"] is True
    assert Classical("nmf", d_sae=5, max_iterations=5000).fit(x).facts["converged"] is True


def test_only_max_tokens_vectors_are_used_the_first_of_the_seeded_order(x: Tensor) -> None:
    vectors = ArrayVectors(x, batch_tokens=64, seed=9)
    some = Classical("pca", d_sae=3, max_tokens=100).fit(vectors)
    first = torch.cat([b[""] for b, _ in zip(vectors.batches(), range(2), strict=False)])[:100]
    assert some.facts["n_tokens"] == 100
    torch.testing.assert_close(some.tensors()["b_dec"], first.mean(0))


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("pca", {"d_sae": 13}, "pca: has at most d_in = 12 directions.*dictionary_learning"),
        ("ica", {"expansion": 2}, "ica: has at most d_in = 12 directions"),
        ("pca", {"d_sae": 5, "k": 6}, "k: want at most 5, got 6"),
        ("dictionary_learning", {"d_sae": 20, "k": 13}, "k: want at most 12, got 13"),
        ("kmeans", {"d_sae": 500}, "400 vectors for 500 latents.*capture more tokens"),
        ("pca", {"d_sae": 9, "max_tokens": 8}, "8 vectors for 9 latents.*raise max_tokens"),
    ],
)
def test_a_width_that_cannot_be_says_the_way_out(
    arch: str, settings: dict[str, int], message: str, x: Tensor
) -> None:
    dictionary = Classical(arch, **settings)
    with pytest.raises(DictionaryError, match=message):
        dictionary.fit(x)
    with pytest.raises(DictionaryError, match="not fitted"):
        dictionary.encode(x)


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("dictionary_learning", {"d_sae": 5}, "want k, the directions per token"),
        ("kmeans", {"d_sae": 5, "k": 2}, "want no k for kmeans"),
        ("pca", {}, "want d_sae or expansion"),
        ("pac", {"d_sae": 5}, "pac"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_data(
    arch: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(DictionaryError, match=message):
        Classical(arch, **settings)


def test_nmf_names_the_share_of_negative_entries_and_where_it_suits(x: Tensor) -> None:
    signed = x.clone()
    signed[:, :3] = -1.0
    with pytest.raises(DictionaryError, match=r"25\.0% of the entries are negative.*CRATE neurons"):
        Classical("nmf", d_sae=5).fit(signed)


def test_vectors_without_enough_directions_or_with_nan_are_refused(x: Tensor) -> None:
    with pytest.raises(DictionaryError, match=r"1 of 400 vectors of batch 0 are NaN"):
        Classical("pca", d_sae=5).fit(x.index_fill(0, torch.tensor([7]), torch.nan))
    flat = torch.zeros(50, D_IN)
    with pytest.raises(DictionaryError, match="vary in 0 directions, fewer than d_sae = 5"):
        Classical("ica", d_sae=5).fit(flat)


def test_unknown_options_and_damaged_folders_are_told(x: Tensor, tmp_path: Path) -> None:
    with pytest.raises(DictionaryError, match=r"not checkpoint_every_steps; .*save\(folder\)"):
        Classical("pca", d_sae=5).fit(x, checkpoint_every_steps=3)
    folder = Classical("pca", d_sae=5).fit(x).save(tmp_path / "pca")
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(DictionaryError, match="weights.safetensors: other bytes than were written"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ("[]", "got a list"),
        ("[" * 100_000, "recursion limit"),
        ({"seed": None}, "seed: "),
        ({"facts": []}, "facts: "),
        ({"d_in": "8"}, "d_in: "),
        ({"kind": "gan"}, "kind: .*'sae'"),
        ({"settings": {}}, "settings of dictionary.json: "),
        ({"settings": {"arch": "pca", "d_sae": 5, "seed": 1}}, "settings of dictionary.json: "),
        ({"settings": {"arch": "pca", "d_sae": 0}}, "d_sae"),
        ({"settings": {"arch": "pca", "d_sae": 5, "name": "x"}}, "name: unknown setting"),
        ({"format": 99}, "written by a newer lmmono"),
    ],
)
def test_a_damaged_dictionary_file_says_where(x: Tensor, tmp_path: Path, change, fault) -> None:
    path = Classical("pca", d_sae=5).fit(x).save(tmp_path / "pca") / "dictionary.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(DictionaryError, match=fault):
        load_dictionary(path.parent)
