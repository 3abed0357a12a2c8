"""Feature families: each code against scikit-learn and by hand; names that recipes know."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from lmmono.dictionaries.controls import Control
from lmmono.errors import RobustnessError
from lmmono.recipe.robustness_settings import FamilySettings
from lmmono.registry.suites import FAMILIES
from lmmono.suites.feature_families import FeatureFamily, as_family

ROWS = torch.from_numpy(np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32))
ROWS = ROWS @ torch.diag(torch.arange(1.0, 9.0)) + 3


@pytest.mark.parametrize("name", [n for n, kind in FAMILIES.items() if kind.reads == "tokens"])
def test_every_family_gives_one_finite_code_per_row_and_the_same_again(name):
    sizes = {setting: 5 for setting in FAMILIES[name].takes}
    made = [FeatureFamily(name, seed=3, **sizes).fit(ROWS, origin="x") for _ in range(2)]
    acts = [family.transform(ROWS[:7]) for family in made]
    assert acts[0].shape == (7, made[0].d) and torch.isfinite(acts[0]).all()
    assert torch.equal(*acts) and made[0].digest == made[1].digest
    assert torch.allclose(made[0].transform(ROWS[3:5]), acts[0][3:5], atol=1e-6)
    density = float((made[0].transform(ROWS) != 0).float().mean())
    assert made[0].l0 == pytest.approx(density * made[0].d)
    if "d" in sizes:
        assert made[0].d == 5


def test_pca_is_scikit_learns_up_to_signs():
    family = FeatureFamily("pca", d=3).fit(ROWS)
    want = PCA(3).fit(ROWS.numpy()).transform(ROWS.numpy())
    assert np.allclose(np.abs(family.transform(ROWS).numpy()), np.abs(want), atol=1e-3)
    assert family.n_parameters == 8 * 3 + 8


def test_sparse_controls_keep_what_they_say():
    topk = FeatureFamily("random_topk", d=40, k=4).fit(ROWS)
    acts = topk.transform(ROWS)
    assert ((acts != 0).sum(1) <= 4).all() and (acts >= 0).all() and topk.l0 > 3.9
    half = FeatureFamily("random_relu", d=40).fit(ROWS)
    assert half.l0 == pytest.approx(20, abs=3)
    above = FeatureFamily("relu").fit(ROWS).transform(ROWS)
    assert torch.allclose(above, (ROWS - ROWS.mean(0)).clamp_min(0), atol=1e-5)
    # deviations are 1 to 8: the three largest are the last
    assert torch.equal(FeatureFamily("top_neurons", k=3).fit(ROWS).transform(ROWS), ROWS[:, 5:])


def test_a_dense_auto_encoder_keeps_enough_to_give_the_rows_back():
    family = FeatureFamily("dense_ae", d=16, seed=1).fit(ROWS)
    acts = family.transform(ROWS).numpy().astype(np.float64)
    design = np.c_[acts, np.ones(len(acts))]
    back = design @ np.linalg.lstsq(design, ROWS.numpy(), rcond=None)[0]
    left = ((ROWS.numpy() - back) ** 2).sum() / ((ROWS.numpy() - ROWS.numpy().mean(0)) ** 2).sum()
    assert left < 0.1 and family.l0 > 15


def test_an_encoder_brings_its_hook_and_its_digest():
    code = Control("raw", k=2).fit(ROWS)
    code.hook = "blocks.0.hook_resid_post"
    family = as_family("mine", code.encode).fit(ROWS)
    assert family.hook == code.hook and family.name == "mine"
    assert torch.equal(family.transform(ROWS), code.encode(ROWS)) and family.l0 == 2
    again = as_family("mine", code.encode).fit(ROWS[:50])
    assert family.digest == again.digest, "the rows of a fit do not change an encoder"
    plain = as_family("plain", lambda x: x[:, :3]).fit(ROWS)
    other = as_family("plain", lambda x: x[:, 3:]).fit(ROWS)
    assert plain.d == 3 and plain.digest != other.digest and plain.n_parameters is None


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ("rawr", "not known; did you mean raw?"),
        (FamilySettings(name="pca", d=3), None),
        (None, None),
        (7, "want None, a name"),
    ],
)
def test_what_stands_for_a_family(given, fault):
    if fault is None:
        assert as_family("x", given).fit(ROWS).d in (3, 8)
        return
    with pytest.raises(RobustnessError, match=fault):
        as_family("x", given)


def test_what_does_not_fit_is_told():
    with pytest.raises(RobustnessError, match="random_topk: k=0: want a number >= 1 of d, k"):
        FeatureFamily("random_topk", k=0)
    with pytest.raises(RobustnessError, match="raw: d=3: want a number >= 1 of none"):
        FeatureFamily("raw", d=3)
    with pytest.raises(RobustnessError, match="d=9: 300 rows of width 8 have 8"):
        FeatureFamily("pca", d=9).fit(ROWS)
    with pytest.raises(RobustnessError, match="not fitted"):
        FeatureFamily("raw").transform(ROWS)
    with pytest.raises(RobustnessError, match=r"want a code \[300, d\]"):
        as_family("odd", lambda x: x.sum(1)).fit(ROWS)
