"""Controls: floors that learned nothing, and sources without what there was to learn."""

import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

import lmmono as lm
from lmmono.dictionaries.controls import Control
from lmmono.dictionaries.estimator import load_dictionary
from lmmono.dictionaries.vector_source import ArrayVectors, shuffled
from lmmono.errors import DictionaryError, ModelError
from lmmono.models.build import build_model
from lmmono.models.crate import CrateForCausalLM
from lmmono.models.untrained import untrained
from lmmono.recipe.sections import CrateModel, Gpt2Model

D_IN = 12
DENSE: dict[str, Any] = {"d_sae": 24, "steps": 300, "lr": 3e-3, "dead_window_steps": 50}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """1000 vectors of 4 directions and little noise, with a mean."""
    random = torch.Generator().manual_seed(0)
    mixed = torch.randn(1000, 4, generator=random) @ torch.randn(4, D_IN, generator=random)
    return mixed + 0.1 * torch.randn(1000, D_IN, generator=random) + 3.0


def fvu(x: Tensor, dictionary: Control) -> float:
    error = (dictionary.reconstruct(x) - x).square().sum()
    return float(error / (x - x.mean(0)).square().sum())


def test_the_identity_is_the_vector_itself_or_its_k_largest_coordinates(x: Tensor) -> None:
    whole = Control("raw").fit(x)
    assert torch.equal(whole.encode(x), x)
    assert torch.equal(whole.reconstruct(x), x)
    some = Control("raw", k=2).fit(x)
    assert some.d_sae == D_IN
    assert torch.equal(
        some.encode(torch.tensor([3.0, -5, 1] + 9 * [0.0])[None])[0, :3], torch.tensor([3.0, -5, 0])
    )
    assert torch.equal(some.encode(x) @ some.tensors()["W_dec"], some.reconstruct(x))


def test_random_codes_are_the_least_squares_fit_on_the_k_largest_projections(x: Tensor) -> None:
    random = Control("random", d_sae=40, k=3).fit(x)
    w = random.tensors()
    torch.testing.assert_close(w["b_dec"], x.mean(0))
    acts = random.encode(x[:50])
    for row, code in zip(x[:50], acts, strict=True):
        centred = (row - x.mean(0)).numpy()
        chosen = np.argsort(-np.abs(w["W_dec"].numpy() @ centred))[:3]
        assert set(np.flatnonzero(code.numpy())) == set(chosen)
        fit = LinearRegression(fit_intercept=False).fit(w["W_dec"].numpy()[chosen].T, centred)
        np.testing.assert_allclose(code.numpy()[chosen], fit.coef_, atol=1e-3)


def test_random_directions_are_unit_uniform_and_the_seeds_own(x: Tensor) -> None:
    one, two, other = (Control("random", d_sae=4000, k=1, seed=s).fit(x) for s in (1, 1, 2))
    directions = one.tensors()["W_dec"]
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(4000))
    spread = directions.T @ directions / 4000
    torch.testing.assert_close(spread, torch.eye(D_IN) / D_IN, atol=0.01, rtol=0)
    assert one.digest == two.digest != other.digest


def test_a_dense_auto_encoder_reconstructs_what_k_random_directions_cannot(x: Tensor) -> None:
    vectors = ArrayVectors(x, batch_tokens=128)
    dense = Control("dense", **DENSE).fit(vectors)
    acts = dense.encode(x)
    assert (acts >= 0).all()
    assert float((acts > 0).sum(1).float().mean()) > 6
    assert fvu(x, dense) < 0.05 < fvu(x, Control("random", d_sae=24, k=2).fit(x))
    assert dense.facts["fvu"] == pytest.approx(fvu(x, dense), abs=0.02)
    torch.testing.assert_close(dense.tensors()["W_dec"].norm(dim=1), torch.ones(24))
    scale = D_IN**0.5 / x.norm(dim=1).mean()
    assert dense.facts["input_scale"] == pytest.approx(float(scale), rel=1e-4)


def test_a_dense_auto_encoder_does_not_care_for_the_unit_of_its_input(x: Tensor) -> None:
    small, large = (
        Control("dense", **DENSE).fit(ArrayVectors(x * size, batch_tokens=128))
        for size in (1.0, 64.0)
    )
    torch.testing.assert_close(
        large.reconstruct(x * 64), small.reconstruct(x) * 64, rtol=1e-3, atol=1
    )


@pytest.mark.parametrize(
    ("arch", "settings"),
    [("raw", {"k": 2}), ("random", {"d_sae": 40, "k": 3}), ("dense", DENSE | {"steps": 20})],
)
def test_seeds_give_equal_bits_and_the_folder_gives_them_back(
    arch: str, settings: dict[str, Any], x: Tensor, tmp_path: Path
) -> None:
    one, two = (Control(arch, **settings, seed=4).fit(x) for _ in range(2))
    assert one.digest == two.digest
    again = load_dictionary(one.save(tmp_path / "control"))
    assert (again.digest, again.settings, again.d_sae) == (one.digest, one.settings, one.d_sae)
    assert torch.equal(again.encode(x), one.encode(x))
    assert torch.equal(again.reconstruct(x), one.reconstruct(x))


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("raw", {"k": 13}, "k: want at most 12, got 13"),
        ("random", {"d_sae": 5, "k": 6}, "k: want at most 5, got 6"),
        ("dense", {**DENSE, "d_sae": 2000}, "1,000 different vectors for 2,000 latents"),
        ("dense", {**DENSE, "lr": 1e30, "scaling": "none"}, "lower lr"),
    ],
)
def test_what_cannot_be_says_the_way_out(
    arch: str, settings: dict[str, Any], message: str, x: Tensor
) -> None:
    control = Control(arch, **settings)
    with pytest.raises(DictionaryError, match=message):
        control.fit(x)
    with pytest.raises(DictionaryError, match="not fitted"):
        control.tensors()


def test_shuffling_keeps_every_coordinate_and_no_relation(x: Tensor) -> None:
    vectors = ArrayVectors(x, batch_tokens=500)
    pairs = zip(vectors.batches(), shuffled(vectors).batches(), strict=False)
    for before, after in islice(pairs, 3):
        assert torch.equal(before[""].sort(0).values, after[""].sort(0).values)
        assert not torch.equal(before[""], after[""])
        related, unrelated = (
            np.abs(np.corrcoef(batch[""].numpy().T))[np.triu_indices(D_IN, 1)]
            for batch in (before, after)
        )
        assert related.mean() > 0.3
        assert unrelated.max() < 0.25


def test_a_shuffled_batch_depends_on_seed_and_number_alone(x: Tensor) -> None:
    def batches(seed: int, start: int, n: int) -> list[Tensor]:
        source = shuffled(ArrayVectors(x, batch_tokens=300), seed).batches(start)
        return [batch[""] for batch in islice(source, n)]

    whole, late = batches(5, 0, 9), batches(5, 6, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], late, strict=True))
    assert not torch.equal(batches(6, 0, 1)[0], whole[0])
    one, two = shuffled(x, 5), shuffled(x, 6)
    assert len({one.digest, two.digest, ArrayVectors(x).digest}) == 3
    assert one.facts["control"] == "shuffled"


def test_a_dictionary_finds_less_in_shuffled_vectors(x: Tensor) -> None:
    real, control = (
        Control("dense", **DENSE | {"d_sae": 4}).fit(vectors)
        for vectors in (
            ArrayVectors(x, batch_tokens=128),
            shuffled(ArrayVectors(x, batch_tokens=128)),
        )
    )
    assert control.facts["fvu"] > 1.5 * real.facts["fvu"]


def states(*models: nn.Module) -> list[dict[str, Tensor]]:
    return [{k: v.clone() for k, v in model.state_dict().items()} for model in models]


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("how", ["initial", "shuffled_weights"])
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_every_family_has_an_untrained_twin_by_seed_that_leaves_it_alone(
    family: str, how: str
) -> None:
    model, ids = small_models.tiny(family), small_models.some_tokens(2, 8)
    (before,), random = states(model), torch.get_rng_state()
    one, two, other = states(*(untrained(model, seed, how) for seed in (1, 1, 2)))
    assert same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(one, two)
    twin = untrained(model, 1, how)
    for name, weight in before.items():
        if weight.ndim > 1:
            assert not torch.equal(one[name], weight), name
            assert not torch.equal(one[name], other[name]), name
    with torch.no_grad():
        got, was = twin(ids).logits, model(ids).logits
    assert torch.isfinite(got).all()
    assert not torch.allclose(got, was, atol=1e-3)


@pytest.mark.parametrize("section", [CrateModel, Gpt2Model])
def test_initial_weights_are_those_of_a_model_built_with_that_seed(section: type) -> None:
    settings = section(arch=section.__name__.removesuffix("Model").lower(), d_model=16, n_heads=2)
    trained, new = (build_model(settings, d_vocab=40, n_ctx=16, seed=seed) for seed in (3, 7))
    twin = untrained(trained, 7)
    assert same(twin.state_dict(), new.state_dict())
    assert (type(twin), twin.training) == (type(trained), trained.training)
    tied = twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert tied == (trained.get_input_embeddings().weight is trained.get_output_embeddings().weight)


def test_shuffled_weights_keep_the_numbers_of_every_tensor() -> None:
    model = small_models.tiny("gpt2")
    twin = untrained(model, 0, "shuffled_weights")
    for (name, was), (_, now) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert torch.equal(was.flatten().sort().values, now.flatten().sort().values), name


@pytest.mark.parametrize("how", ["initial", "shuffled_weights"])
def test_an_untrained_crate_has_the_step_size_of_its_own_dictionary(how: str) -> None:
    model = small_models.small(**small_models.EVERY_OPTION)
    twin = untrained(model, 0, how)
    assert isinstance(twin, CrateForCausalLM)
    for step, dictionary in zip(twin.step_sizes(), twin.dictionaries(), strict=True):
        largest = torch.linalg.matrix_norm(dictionary.detach(), 2)
        assert float(step) == pytest.approx(float(1 / largest**2), rel=0.02)


def test_what_cannot_be_untrained_says_why() -> None:
    with pytest.raises(ModelError, match="Linear has no config.*shuffled_weights"):
        untrained(nn.Linear(2, 2))


def test_help_lists_the_settings_of_classes_that_take_them_by_name():
    for cls, key in ((lm.SAE, "target_l0"), (lm.Classical, "max_iterations"), (lm.Control, "k")):
        assert re.search(rf"^    {key} \(.+\): [A-Z].+\.$", cls.__doc__ or "", re.MULTILINE), cls
    assert "    kind: `set` to `value`, `scale` by it" in (lm.Edit.__doc__ or "")
