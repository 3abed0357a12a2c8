"""Recipes that explain and score: their sections, their stages and their verbs."""

from pathlib import Path

import pytest
from test_cli import TINY, call

import activation_store as astore
import lmmono as lm
from lmmono.errors import RecipeError
from lmmono.recipe import Recipe
from lmmono.registry.explainers import EXPLAINERS
from lmmono.registry.scorers import SCORERS
from lmmono.runs.folder import open_run
from lmmono.runs.stages import STAGES

ONE = TINY.partition("arms:")[0].replace("capture: {", "capture: {splits: [explain, score], ")
ASKED = """\
explain: {explainers: [token_lookup, constant], units: 12, window: 32}
score: {scorers: [token_selectivity, simulation_tar, simulation_random, detection]}
"""
HOOK = "blocks.0.mlp.hook_post"


@pytest.fixture(scope="module")
def explained(tmp_path_factory) -> Path:
    """The folder of a recipe that was run with explanations and scores."""
    folder = tmp_path_factory.mktemp("explained")
    (folder / "tiny.yaml").write_text(ONE + ASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("run", "tiny.yaml") == 0
    return folder


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "r.yaml").write_text(ONE + text)
        return tmp_path / "r.yaml"

    return write


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("explain: {explainers: [token_lokup]}", "explain.explainers[0]: want one of "),
        ("explain: {explainers: [token_lokup]}", "did you mean token_lookup?"),
        ("explain: {explainers: [llm_max_act]}", "explainer='llm_max_act', client=...)"),
        ("explain: {explainers: [random_explanation]}", "name that before it"),
        ("explain: {explainers: [constant, constant]}", "want every explainer once"),
        ("score: {scorers: [simulaton_tar]}", "did you mean simulation_tar or"),
        ("score: {scorers: [{name: detection, preset: rankd}]}", "did you mean ranked?"),
        ("score: {scorers: [{name: detection, prset: ranked}]}", "did you mean preset?"),
        ("score: {scorers: [3]}", "score.scorers[0].name: want one of token_selectivity, "),
        ("score: {scorers: detection}", "want a list of (text or a mapping), got 'detection'"),
        ("score: {scorers: [intruder]}", "lm.score(store, scorer='intruder', client=...)"),
        ("score: {scorers: [fuzz]}", "explain.explainers names none"),
        ("score: {scorers: [unit_statistics, unit_statistics]}", "want every scorer and preset"),
        (
            "explain: {explainers: [constant]}\nscore: {scorers: [{name: fuzz, preset: openai}]}",
            "fuzz has no preset 'openai'",
        ),
        (
            "explain: {explainers: [constant]}\n"
            "score: {scorers: [{name: simulation_tar, preset: openai}]}",
            "preset openai wants openai in explain.presets too",
        ),
    ],
)
def test_what_is_named_wrongly_is_told_with_its_line(write, text, fault):
    path = write(text)
    with pytest.raises(RecipeError) as told:
        Recipe.load(path)
    (line,) = told.value.faults
    assert line.startswith(f"{path}:") and fault in line


def test_a_changed_scorer_leaves_the_explanations_and_a_changed_explainer_does_not(write):
    path = write(ASKED)
    before = Recipe.load(path)

    def stale(*overrides: str) -> list[str]:
        now = Recipe.load(path, *overrides)
        parts = {name: stage.sections for name, stage in STAGES.items()}
        return [n for n, of in parts.items() if now.digest(*of) != before.digest(*of)]

    assert stale("score.controls=false") == ["control", "step_scores", "score"]
    assert stale("explain.units=5") == ["explain", "control", "step_scores", "score"]
    unread = {"train", "open", "vectors"}
    assert stale("capture.top_k=5") == [name for name in STAGES if name not in unread]


def test_a_run_explains_and_scores_what_its_recipe_names(explained):
    run = open_run(explained / "runs/tiny")
    assert run.is_done("explain") and run.is_done("score")
    with astore.open(run.store_path) as store:
        said = store.sql(
            """SELECT explainer, count(*), count(DISTINCT unit) FROM explanations
            GROUP BY explainer ORDER BY explainer"""
        ).fetchall()
        scored = store.sql(
            """SELECT metric, explainer, control, count(*) FROM all_scores
            WHERE unit IS NOT NULL AND metric IN ('simulation_tar', 'detection',
                'token_selectivity') GROUP BY ALL"""
        ).fetchall()
    assert said == [("constant:window=32", 12, 12), ("token_lookup:window=32", 12, 12)]
    n_of = {tuple(row[:3]): row[3] for row in scored}
    for explainer in ("constant:window=32", "token_lookup:window=32"):
        for control in (None, "random_explanation", "matched_density", "untrained_model"):
            assert n_of["simulation_tar", explainer, control] == 12
            assert n_of["detection", explainer, control] == 12
    assert n_of["token_selectivity", None, None] == 64


def test_the_untrained_control_is_what_the_untrained_model_scores(explained, tmp_path):
    run = open_run(explained / "runs/tiny")
    assert open_run(run.dir / "untrained").is_done("score")
    fresh = lm.untrained(run.model, run.recipe.seed)
    units = lm.records.sample(12, seed=run.recipe.seed)
    query = """SELECT unit, value, details FROM all_scores WHERE metric = 'simulation_tar'
        AND control IS NOT DISTINCT FROM $control AND unit IS NOT NULL
        AND explainer = 'token_lookup:window=32' AND hook = $hook ORDER BY unit"""
    with astore.open(tmp_path / "store", mode="w") as store:
        parts = [run.tokens(split) for split in ("explain", "score")]
        settings = {"max_tokens": run.recipe.capture.max_tokens, "max_density": 1.0}
        lm.capture(fresh, parts, hooks=HOOK, into=store, seed=run.recipe.seed, **settings)
        lm.explain(store, HOOK, units=units, window=32, seed=run.recipe.seed)
        lm.score(
            store,
            HOOK,
            explainer="token_lookup:window=32",
            seed=run.recipe.seed,
            controls=False,
        )
        wanted = store.sql(query, control=None, hook=HOOK).fetchall()
    summary = """SELECT value, n FROM all_scores WHERE metric = 'simulation_tar' AND unit IS NULL
        AND control = 'untrained_model' AND hook = $hook
        AND explainer = 'token_lookup:window=32'"""
    with astore.open(run.store_path) as store:
        assert store.sql(query, control="untrained_model", hook=HOOK).fetchall() == wanted
        (value, n) = store.sql(summary, hook=HOOK).fetchall()[0]
    assert n == 12 == len(wanted)
    assert value == pytest.approx(sum(each for _, each, _ in wanted) / 12)


def test_the_verbs_do_one_stage_each_and_then_nothing(explained, monkeypatch, capsys):
    monkeypatch.chdir(explained)
    assert call("score", "runs/tiny") == 0
    assert call("explain", "runs/tiny") == 0
    assert call("score", "tiny.yaml", "name=other") == 2
    assert "runs/other: not trained yet; run `lmmono train" in capsys.readouterr().err
    assert call("explain", "tiny.yaml", "explain.explainers=[]", "score.scorers=[]") == 2
    assert "want an explainer; see `lmmono ls explainers`" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["explainers", "scorers"])
def test_ls_names_what_there_is_with_what_it_needs(capsys, what):
    assert call("ls", what) == 0
    lines = capsys.readouterr().out.splitlines()
    for each in (EXPLAINERS if what == "explainers" else SCORERS).values():
        (line,) = [line for line in lines if line.split()[:1] == [each.name]]
        assert all(need in line for need in each.needs) and each.about in line
