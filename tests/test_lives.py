"""Births and deaths of units over a training, on units whose lives are planted."""

import copy

import numpy as np
import pytest
import torch

from lmmono.captures.lives import UnitSums, live, sum_units
from lmmono.data.tokens import TokenRows
from lmmono.models.build import build_model
from lmmono.models.hooks import run_with_cache
from lmmono.recipe.sections import Capture, Gpt2Model

HOOK = "blocks.0.mlp.hook_post"
STEPS = (0, 10, 20, 40)
N_UNITS, N_DOCUMENTS, N_CTX = 32, 24, 16


@pytest.fixture(scope="module")
def planted() -> tuple[dict[int, torch.nn.Module], TokenRows, dict[int, int], dict[int, int]]:
    """One layer whose unit u points the other way until its birth, and may be silenced later."""
    section = Gpt2Model(arch="gpt2", n_layers=1, d_model=8, n_heads=2)
    final = build_model(section, d_vocab=40, n_ctx=N_CTX, seed=0).eval()
    births = {unit: STEPS[unit % 4] for unit in range(N_UNITS)}
    deaths = {unit: STEPS[1 + unit % 3] for unit in (3, 8, 13)}
    with torch.no_grad():
        final.transformer.wte.weight.normal_()
        final.transformer.h[0].mlp.c_fc.weight.normal_()
    models: dict[int, torch.nn.Module] = {}
    for step in STEPS:
        model = copy.deepcopy(final)
        layer = model.transformer.h[0].mlp.c_fc
        with torch.no_grad():
            for unit in range(N_UNITS):
                if step < births[unit]:
                    layer.weight[:, unit] *= -1
                if unit in deaths and step >= deaths[unit]:
                    layer.weight[:, unit], layer.bias[unit] = 0.0, -1.0
        models[step] = model
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (N_DOCUMENTS, N_CTX)).astype(np.uint16)
    docs = np.repeat(np.arange(N_DOCUMENTS, dtype=np.int32)[:, None], N_CTX, axis=1)
    docs[:, -2:] = -1  # padding counts for nothing
    return models, TokenRows(ids, docs, 0, "score"), births, deaths


@pytest.fixture(scope="module")
def sums(planted) -> UnitSums:
    models, rows, *_ = planted
    return sum_units(models, [rows[:10], rows[10:]], [HOOK], Capture(batch_tokens=64))[HOOK]


def test_planted_births_and_deaths_are_found_with_their_intervals(planted, sums) -> None:
    _, _, births, deaths = planted
    lives = live(sums)
    living = [unit for unit in range(N_UNITS) if unit not in deaths]
    for value, low, high in lives.birth.T[living]:
        assert low <= value <= high
    assert [int(lives.birth[0, unit]) for unit in living] == [births[unit] for unit in living]
    assert np.isinf(lives.birth[0, list(deaths)]).all()  # a silent unit correlates with nothing
    assert [int(lives.death[0, unit]) for unit in deaths] == list(deaths.values())
    assert np.isinf(lives.death[0, living]).all()
    assert lives.ci_method == "percentile bootstrap over documents, 500 resamples"


def test_correlations_are_those_of_the_activations_themselves(planted, sums) -> None:
    models, rows, *_ = planted
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    real = rows.doc_ids.ravel() >= 0
    acts = {
        step: run_with_cache(model, ids, HOOK)[1][HOOK].reshape(-1, N_UNITS).numpy()[real]
        for step, model in models.items()
    }
    lives = live(sums)
    for unit in (1, 5, 30):
        x, y = acts[10][:, unit], acts[40][:, unit]
        other = acts[40][:, (unit + 1) % N_UNITS]
        r, s = np.corrcoef(x, y)[0, 1], np.corrcoef(x, other)[0, 1]
        np.testing.assert_allclose(lives.correlation[0, 1, unit], r, atol=1e-6)
        np.testing.assert_allclose(lives.other_unit[1, unit], s, atol=1e-6)
        np.testing.assert_allclose(lives.density[1, unit], (x > 0).mean())


def test_a_birth_that_hangs_on_few_documents_has_a_wide_interval() -> None:
    """At step 1 the unit is itself in half of the documents and noise in the others."""
    rng = np.random.default_rng(1)
    y = rng.normal(size=(60, 50))
    x = np.where(np.arange(60)[:, None] < 33, y, rng.normal(size=y.shape))

    both = np.stack([x, y], axis=1)
    by_step = [(both > 0), both, both**2, both * y[:, None], both * y[:, None]]
    totals = [each.sum(axis=2)[..., None].astype(float) for each in by_step]
    sums = UnitSums((1, 2), np.full(60, 50.0), *totals)
    lives = live(sums)
    assert 0.5 < lives.correlation[0, 0, 0] < 0.6
    assert lives.correlation[1, 0, 0] < 0.5 < lives.correlation[2, 0, 0]
    assert lives.birth[:, 0].tolist() == [1, 1, 2]


def test_few_documents_give_no_interval(planted) -> None:
    models, rows, *_ = planted
    few = sum_units(models, [rows[:5]], [HOOK], Capture())[HOOK]
    lives = live(few)
    assert np.isnan(lives.birth[1:]).all()
    assert lives.ci_method == "none: 5 documents, want 20"
