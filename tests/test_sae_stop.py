"""A dictionary is trained until its FVU has settled: the rule, the decay after it, and a resume."""

import signal
from pathlib import Path

import numpy as np
import pytest

import lmmono as lm
from lmmono.errors import TrainingStopped
from tests.test_sae import make, vectors
from tests.test_sae_resume import rows, stop_at

RULE = {
    "steps": 1_000,
    "stop_gain": 0.1,
    "stop_window_steps": 40,
    "decay_fraction": 0.25,
    "dead_window_steps": 30,
}


@pytest.fixture(scope="module")
def settled() -> lm.SAE:
    return make("topk", **RULE).fit(vectors())


def curve(sae: lm.SAE, metric: str) -> dict[int, float]:
    return {row["step"]: row["value"] for row in rows(sae) if row["metric"] == metric}


def test_a_fit_ends_once_fvu_falls_by_less_than_the_share_in_a_window(settled: lm.SAE) -> None:
    fvu, stop = curve(settled, "fvu"), settled.facts["settled_step"]
    assert 80 <= stop < 900
    means = {
        step: np.mean([value for s, value in fvu.items() if step - 40 < s <= step])
        for step in sorted(fvu)
        if step >= 40
    }
    ratios = {step: means[step] / means[step - 40] for step in means if step - 40 in means}
    assert next(step for step, ratio in ratios.items() if ratio > 0.9) == stop
    # a quarter of all steps is decay: a third of those before
    assert settled.facts["steps"] == stop + round(stop / 3)
    assert max(fvu) == settled.facts["steps"]
    lr = curve(settled, "lr")
    assert lr[stop] == pytest.approx(settled.settings.lr)
    assert lr[max(lr)] < 0.1 * settled.settings.lr
    assert {"fvu", "l0", "dead_fraction"} <= {row["metric"] for row in rows(settled)}
    assert settled.facts["fvu"] < means[stop]


def test_a_settled_fit_that_was_stopped_goes_on_to_the_same_bits(
    settled: lm.SAE, tmp_path: Path
) -> None:
    for step in (50, settled.facts["settled_step"] + 6):
        with pytest.raises(TrainingStopped):
            progress = stop_at(step, signal.SIGTERM)
            make("topk", **RULE).fit(vectors(), folder=tmp_path, progress=progress)
    again = make("topk", **RULE).fit(vectors(), folder=tmp_path)
    assert again.digest == settled.digest and rows(again) == rows(settled)


def test_without_the_rule_all_steps_are_taken_and_the_settings_are_as_ever() -> None:
    sae = make("topk").fit(vectors())
    assert sae.facts["steps"] == sae.settings.steps and sae.facts["settled_step"] is None
    assert "stop_gain" not in sae.settings.model_dump()
