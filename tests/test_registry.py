"""The registry: every record names something that exists, and recipes take its names."""

import subprocess
import sys
from dataclasses import asdict

import pytest

from lmmono.dictionaries.estimator import DICTIONARY_KINDS
from lmmono.errors import ExplainError
from lmmono.files.docstrings import field_sentences
from lmmono.recipe.explain_settings import Explain, Scoring
from lmmono.recipe.robustness_settings import FamilySettings, Robustness
from lmmono.registry.explainers import EXPLAINERS
from lmmono.registry.lookup import load
from lmmono.registry.methods import METHODS
from lmmono.registry.metrics import METRICS
from lmmono.registry.scorers import SCORERS, find_scorer
from lmmono.registry.suites import (
    FAMILIES,
    HYPOTHESES,
    LEARNERS,
    MODEL_NOISE,
    SUITES,
    TEXT_CORRUPTIONS,
)
from lmmono.registry.tasks import TASK_NAMES

TABLES = (SCORERS, EXPLAINERS, LEARNERS, FAMILIES, SUITES, HYPOTHESES, TEXT_CORRUPTIONS, METHODS)
HOMES = {record.home for table in TABLES for record in table.values()} - {None}


@pytest.mark.parametrize("home", sorted(HOMES | set(DICTIONARY_KINDS.values())))
def test_every_home_is_a_function_or_class_that_says_what_it_does(home):
    assert callable(load(home)) and load(home).__doc__


@pytest.mark.parametrize("table", TABLES)
def test_a_record_stands_under_its_own_name(table):
    assert table and all(record.name == name for name, record in table.items())


def test_scorers_write_metrics_that_exist_and_no_two_write_the_same():
    metrics = [metric for scorer in SCORERS.values() for metric in scorer.metrics]
    assert set(metrics) <= set(METRICS) and len(set(metrics)) == len(metrics)


def test_recipes_take_every_name_that_needs_nothing_else():
    values = {"d": 4, "k": 4, "steps": 4, "positives": "spans", "map": "relu", "spread": True}
    takes = {name: {each: values[each] for each in kind.takes} for name, kind in FAMILIES.items()}
    section = Robustness(
        suites=tuple(SUITES),
        tasks=TASK_NAMES,
        learners=tuple(LEARNERS),
        input_noise=(*TEXT_CORRUPTIONS, *MODEL_NOISE),
        hypotheses=tuple(HYPOTHESES),
        families=tuple(FamilySettings(name=name, **takes[name]) for name in takes),
    )
    assert len(section.families) == len(FAMILIES)
    free = tuple(name for name, each in EXPLAINERS.items() if not each.needs)
    assert Explain(explainers=free).explainers == free
    for name, scorer in SCORERS.items():
        if scorer.argument is None:
            for preset in (None, *scorer.presets):
                assert Scoring(name=name, preset=preset).explained == scorer.reads_explanations


@pytest.mark.parametrize("name", [n for n, each in SCORERS.items() if each.argument])
def test_a_scorer_that_no_recipe_can_call_says_which_argument_it_wants_in_python(name):
    with pytest.raises(ValueError, match=f"{SCORERS[name].argument}=..."):
        Scoring(name=name)


def test_settings_of_scorers_have_a_sentence_each_and_defaults_that_pass_their_own_check():
    for scorer in SCORERS.values():
        values = asdict(scorer.settings)
        assert set(field_sentences(type(scorer.settings))) == set(values)
        assert scorer.with_settings(changes=values) == scorer.settings
        for preset in scorer.presets:
            assert scorer.with_settings(preset) != scorer.settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n": "ten"}, "detection: n: want a whole number >= 1, got 'ten'"),
        ({"n": 0}, "n: want a whole number >= 1, got 0"),
        ({"ranked": 1}, "ranked: want true or false, got 1"),
        ({"windows": 32}, "no setting 'windows'; did you mean window"),
    ],
)
def test_a_wrong_setting_of_a_scorer_is_refused_in_python_and_in_recipes(changes, message):
    with pytest.raises(ExplainError, match=message):
        find_scorer("detection").with_settings(changes=changes)
    with pytest.raises(ValueError, match=message):
        Scoring(name="detection", settings=changes)


def test_an_unknown_name_is_answered_with_those_that_are_near():
    with pytest.raises(ExplainError, match="scorer 'fuz' is not known; did you mean fuzz"):
        find_scorer("fuz")


def test_the_registry_imports_nothing_heavy():
    heavy = {"numpy", "torch", "duckdb", "pyarrow", "scipy", "jaxtyping", "pydantic"}
    script = (
        "import sys, pkgutil, importlib, lmmono.registry as room\n"
        "for module in pkgutil.iter_modules(room.__path__, 'lmmono.registry.'):\n"
        "    importlib.import_module(module.name)\n"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
