"""Explanations and scores in other tools' layouts, read back as those tools read them."""

import gzip
import json
import shutil
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pytest
from explained_store import CAT, HOOK, NOISE, ON_CAT, OTHER, SILENT, TWO_DOCUMENTS, planted_store
from llm_server import serving
from reading_judge import expecting, ten_on_the_token
from scipy.stats import pearsonr
from test_cli import call

import activation_store as astore
import lmmono as lm
from lmmono.clients.server import ServerClient
from lmmono.errors import ExplainError
from lmmono.explanations.explanation import Explanation
from lmmono.interop.store_export import export_store

UNITS = [ON_CAT, SILENT, TWO_DOCUMENTS, NOISE]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_store(tmp_path_factory.mktemp("exported") / "run")


@pytest.fixture(scope="module")
def store(planted):
    with astore.open(planted.path, mode="a") as store:
        for explainer in ("token_lookup", "constant"):
            lm.explain(store, HOOK, units=UNITS, explainer=explainer)
            lm.score(store, HOOK, units=UNITS, explainer=explainer)
        lm.score(store, HOOK, units=UNITS, scorer="detection", n=10)
        row = Explanation(HOOK, ON_CAT, "by_hand", text="the token w3", seed=0).row()
        store.append("explanations", [row])
        yield store


# the classes of neuron_explainer, which its `loads` fills by name


@dataclass
class NeuronId:
    layer_index: int
    neuron_index: int


@dataclass
class SequenceSimulation:
    tokens: list[str]
    expected_activations: list[float]
    activation_scale: str
    distribution_values: list[list[float]]
    distribution_probabilities: list[list[float]]
    uncalibrated_simulation: Any = None


@dataclass
class ScoredSequenceSimulation:
    simulation: SequenceSimulation
    true_activations: list[float]
    ev_correlation_score: float | None
    rsquared_score: float | None = None
    absolute_dev_explained_score: float | None = None


@dataclass
class ScoredSimulation:
    scored_sequence_simulations: list[ScoredSequenceSimulation]
    ev_correlation_score: float | None = None
    rsquared_score: float | None = None
    absolute_dev_explained_score: float | None = None


@dataclass
class ScoredExplanation:
    explanation: str
    scored_simulation: ScoredSimulation


@dataclass
class NeuronSimulationResults:
    neuron_id: NeuronId
    scored_explanations: list[ScoredExplanation]


KNOWN = {
    kind.__name__: kind
    for kind in (
        NeuronId,
        SequenceSimulation,
        ScoredSequenceSimulation,
        ScoredSimulation,
        ScoredExplanation,
        NeuronSimulationResults,
    )
}


def load(path) -> NeuronSimulationResults:
    (line,) = path.read_text().splitlines()
    return json.loads(line, object_hook=lambda found: KNOWN[found.pop("dataclass_name")](**found))


def test_openai_reads_simulations_whose_scores_are_those_of_the_store(store, planted, tmp_path):
    out = lm.interop.export_simulations(store, tmp_path / "out", HOOK)
    assert sorted(int(path.stem) for path in (out / "0").iterdir()) == UNITS
    query = """SELECT value, nan_fraction FROM all_scores WHERE explainer = 'token_lookup'
        AND control IS NULL AND metric = $metric AND unit = $unit"""
    for unit in (ON_CAT, NOISE):
        found = load(out / "0" / f"{unit}.jsonl")
        assert found.neuron_id == NeuronId(0, unit)
        constant, lookup = found.scored_explanations
        assert constant.scored_simulation.ev_correlation_score is None, "constants correlate not"
        for field, metric in (
            ("ev_correlation_score", "simulation_tar"),
            ("rsquared_score", "simulation_tar_uncentred_r2"),
            ("absolute_dev_explained_score", "simulation_tar_deviation"),
        ):
            (value, _) = store.sql(query, metric=metric, unit=unit).fetchall()[0]
            assert getattr(lookup.scored_simulation, field) == pytest.approx(value), metric
        records = lookup.scored_simulation.scored_sequence_simulations
        true = np.concatenate([record.true_activations for record in records])
        said = np.concatenate([record.simulation.expected_activations for record in records])
        assert lookup.scored_simulation.ev_correlation_score == pytest.approx(
            pearsonr(true, said)[0]
        )
        for record in records:
            simulation = record.simulation
            assert simulation.activation_scale == "neuron_activations"
            (values, shares) = simulation.distribution_values, simulation.distribution_probabilities
            expected = [sum(np.multiply(*pair)) for pair in zip(values, shares, strict=True)]
            assert expected == simulation.expected_activations
            if unit == ON_CAT:
                on_cat = [2.0 * (token == f" w{CAT}") for token in simulation.tokens]
                assert record.true_activations == on_cat
    for unit in (SILENT, TWO_DOCUMENTS):
        found = load(out / "0" / f"{unit}.jsonl")
        assert len(found.scored_explanations) == 0, "failures have no place there"


def test_a_language_models_simulation_says_its_scale(store, tmp_path):
    with serving(expecting(ten_on_the_token)) as calls:
        client = ServerClient("judge", base_url=calls.base_url, n_retries=0)
        out = lm.interop.export_simulations(
            store,
            tmp_path / "out",
            HOOK,
            explainers=["by_hand"],
            simulator="llm",
            client=client,
            layer=4,
        )
    (explained,) = load(out / "4" / f"{ON_CAT}.jsonl").scored_explanations
    assert explained.explanation == f"the token w{CAT}"
    assert explained.scored_simulation.ev_correlation_score == pytest.approx(1.0)
    for record in explained.scored_simulation.scored_sequence_simulations:
        simulation = record.simulation
        assert simulation.activation_scale == "simulated_normalized_activations"
        assert simulation.expected_activations == [
            10.0 * (token == f" w{CAT}") for token in simulation.tokens
        ]
        assert simulation.distribution_values == [[]] * len(simulation.tokens)


# the columns that Neuronpedia's tables want or that are keys; what a file lacks is their default
TABLES = """
CREATE TABLE SourceRelease (name TEXT PRIMARY KEY, description TEXT NOT NULL,
    creatorName TEXT NOT NULL, creatorId TEXT NOT NULL, urls TEXT[] NOT NULL, visibility TEXT);
CREATE TABLE Model (id TEXT PRIMARY KEY, displayName TEXT, displayNameShort TEXT,
    creatorId TEXT NOT NULL, instruct BOOLEAN, inferenceEnabled BOOLEAN, layers INT NOT NULL,
    neuronsPerLayer INT NOT NULL, dimension INT, owner TEXT NOT NULL, visibility TEXT);
CREATE TABLE SourceSet (modelId TEXT REFERENCES Model (id), name TEXT, description TEXT NOT NULL,
    creatorName TEXT NOT NULL, creatorId TEXT NOT NULL, urls TEXT[], hasDashboards BOOLEAN,
    releaseName TEXT REFERENCES SourceRelease (name), visibility TEXT, PRIMARY KEY (modelId, name));
CREATE TABLE Source (id TEXT, modelId TEXT, setName TEXT, creatorId TEXT NOT NULL,
    hasDashboards BOOLEAN, inferenceEnabled BOOLEAN, num_prompts INT, num_tokens_in_prompt INT,
    visibility TEXT, PRIMARY KEY (modelId, id),
    FOREIGN KEY (modelId, setName) REFERENCES SourceSet (modelId, name));
CREATE TABLE Neuron (modelId TEXT, layer TEXT, "index" TEXT, creatorId TEXT, sourceSetName TEXT,
    hookName TEXT, hasVector BOOLEAN, maxActApprox DOUBLE, frac_nonzero DOUBLE NOT NULL,
    freq_hist_data_bar_heights DOUBLE[], freq_hist_data_bar_values DOUBLE[],
    PRIMARY KEY (modelId, layer, "index"),
    FOREIGN KEY (modelId, layer) REFERENCES Source (modelId, id));
CREATE TABLE Activation (id TEXT PRIMARY KEY, modelId TEXT, layer TEXT, "index" TEXT,
    creatorId TEXT NOT NULL, tokens TEXT[] NOT NULL, "values" DOUBLE[] NOT NULL,
    maxValue DOUBLE NOT NULL, maxValueTokenIndex INT NOT NULL, minValue DOUBLE NOT NULL,
    dataSource TEXT, dataIndex TEXT, binMin DOUBLE, binMax DOUBLE, binContains DOUBLE,
    qualifyingTokenIndex INT,
    FOREIGN KEY (modelId, layer, "index") REFERENCES Neuron (modelId, layer, "index"));
CREATE TABLE ExplanationType (name TEXT PRIMARY KEY, displayName TEXT NOT NULL,
    description TEXT NOT NULL, creatorName TEXT NOT NULL, creatorId TEXT NOT NULL);
CREATE TABLE ExplanationModelType (name TEXT PRIMARY KEY, displayName TEXT NOT NULL,
    description TEXT NOT NULL, creatorName TEXT NOT NULL);
CREATE TABLE ExplanationScoreType AS FROM ExplanationType LIMIT 0;
ALTER TABLE ExplanationScoreType ADD PRIMARY KEY (name);
CREATE TABLE ExplanationScoreModel AS FROM ExplanationModelType LIMIT 0;
ALTER TABLE ExplanationScoreModel ADD PRIMARY KEY (name);
CREATE TABLE Explanation (id TEXT PRIMARY KEY, modelId TEXT, layer TEXT, "index" TEXT,
    description TEXT NOT NULL, authorId TEXT NOT NULL, notes TEXT,
    typeName TEXT REFERENCES ExplanationType (name),
    explanationModelName TEXT REFERENCES ExplanationModelType (name),
    FOREIGN KEY (modelId, layer, "index") REFERENCES Neuron (modelId, layer, "index"));
CREATE TABLE ExplanationScore (id TEXT PRIMARY KEY, initiatedByUserId TEXT NOT NULL,
    value DOUBLE NOT NULL, explanationId TEXT NOT NULL REFERENCES Explanation (id),
    explanationScoreTypeName TEXT NOT NULL REFERENCES ExplanationScoreType (name),
    explanationScoreModelName TEXT NOT NULL REFERENCES ExplanationScoreModel (name),
    jsonDetails TEXT NOT NULL);
"""
FILES = {
    "config/explanation_type.jsonl": "ExplanationType",
    "config/explanation_model_type.jsonl": "ExplanationModelType",
    "config/explanation_score_type.jsonl": "ExplanationScoreType",
    "config/explanation_score_model.jsonl": "ExplanationScoreModel",
    "*/*/release.jsonl": "SourceRelease",
    "*/*/model.jsonl": "Model",
    "*/*/sourceset.jsonl": "SourceSet",
    "*/*/source.jsonl": "Source",
    "*/*/features/batch-*.jsonl.gz": "Neuron",
    "*/*/activations/batch-*.jsonl.gz": "Activation",
    "*/*/explanations/batch-*.jsonl.gz": "Explanation",
    "*/*/scores/batch-*.jsonl.gz": "ExplanationScore",
}


def imported(out) -> duckdb.DuckDBPyConnection:
    """Read files as the site's import does: the columns of the first line, in the order of keys."""
    con = duckdb.connect()
    con.execute(TABLES)
    for pattern, table in FILES.items():
        for path in sorted(out.glob(pattern)):
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            lines = [json.loads(line) for line in text.splitlines()]
            if not lines:
                assert path.parent.name == "config", path
                continue
            names = list(lines[0])
            assert all(list(line) == names for line in lines), f"{path}: other columns"
            columns = ", ".join(f'"{name}"' for name in names)
            marks = ", ".join("?" for _ in names)
            con.executemany(
                f"INSERT INTO {table} ({columns}) VALUES ({marks})",
                [list(line.values()) for line in lines],
            )
    return con


def test_neuronpedia_imports_units_with_their_explanations_and_scores(store, tmp_path):
    out = lm.interop.export_neuronpedia(store, tmp_path / "out", HOOK, model="My Model/1")
    con = imported(out)
    (model,) = con.sql("SELECT id FROM Model").fetchall()[0]
    assert model == "my-model-1" and (out / model / "0-lmmono").is_dir()
    # the site reads five, and stops where one is missing
    types = {"explanation_type", "explanation_model_type", "eval_type"}
    types |= {"explanation_score_type", "explanation_score_model"}
    assert {path.stem for path in (out / "config").iterdir()} == types
    stats = store.sql("SELECT unit, density, max_act FROM unit_stats WHERE hook = $h", h=HOOK)
    wanted = [(str(unit), density, largest) for unit, density, largest in stats.fetchall()]
    features = con.sql('SELECT "index", frac_nonzero, maxActApprox FROM Neuron').fetchall()
    assert sorted(features) == sorted(wanted)
    bars = con.sql('SELECT list_sum(freq_hist_data_bar_heights) FROM Neuron ORDER BY "index"')
    counts = store.sql("SELECT n_active FROM unit_stats WHERE hook = $h ORDER BY unit", h=HOOK)
    assert [(n or 0,) for (n,) in bars.fetchall()] == counts.fetchall()
    top = con.sql("""SELECT tokens[qualifyingTokenIndex + 1], "values"[qualifyingTokenIndex + 1],
        maxValue FROM Activation WHERE dataSource = 'top' AND "index" = '0'""").fetchall()
    assert set(top) == {(f" w{CAT}", 2.0, 2.0)}
    tenths = con.sql("""SELECT binMin <= "values"[qualifyingTokenIndex + 1], binContains
        FROM Activation WHERE dataSource = 'quantile'""").fetchall()
    assert set(tenths) == {(True, 0.1)}
    n_said = store.sql("SELECT count(*) FROM explanations WHERE text IS NOT NULL").fetchall()[0]
    assert con.sql("SELECT count(*) FROM Explanation").fetchall()[0] == n_said


def test_neuronpedia_gets_every_score_with_its_interval_and_controls(store, tmp_path):
    con = imported(lm.interop.export_neuronpedia(store, tmp_path / "out", HOOK))
    rows = con.sql("""SELECT e."index", e.typeName, s.explanationScoreTypeName, s.value,
            s.jsonDetails FROM ExplanationScore s JOIN Explanation e ON e.id = s.explanationId""")
    found = {row[:3]: row[3:] for row in rows.fetchall()}
    query = """SELECT unit::VARCHAR, explainer, concat_ws(':', metric, preset), value, ci_low,
            metric_version FROM all_scores s WHERE unit IS NOT NULL AND control IS NULL
            AND explainer IS NOT NULL AND value IS NOT NULL AND EXISTS (FROM explanations x
            WHERE x.unit = s.unit AND x.explainer = s.explainer AND text IS NOT NULL)"""
    wanted = store.sql(query).fetchall()
    assert len(found) == len(wanted) > 20
    for *key, value, low, version in wanted:
        score, details = found[tuple(key)]
        details = json.loads(details)
        assert score == value and details["ci_low"] == low
        assert details["metric_version"] == version
    details = json.loads(found[str(ON_CAT), "token_lookup", "simulation_tar"][1])
    assert set(details["controls"]) == {
        "random_explanation",
        "matched_density",
        "shuffled_pairing",
    }


@pytest.mark.parametrize("to", ["neuronpedia", "openai-simulations"])
def test_damaged_shards_are_not_exported(planted, tmp_path, to):
    shutil.copytree(planted.path, tmp_path / "copy")
    shard = next((tmp_path / "copy" / "store").glob("tokens-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with (
        astore.open(tmp_path / "copy") as damaged,
        pytest.raises(astore.ShardError, match=f"{shard.name}: .*verify --repair"),
    ):
        export_store(damaged, to, tmp_path / "out", [HOOK])
    assert not (tmp_path / "out").exists()


def test_the_same_store_exports_to_the_same_bytes(store, tmp_path):
    for to in ("neuronpedia", "openai-simulations"):
        both = [export_store(store, to, tmp_path / f"{to}-{i}", [HOOK]) for i in range(2)]
        files = [sorted(path for path in out.rglob("*") if path.is_file()) for out in both]
        names = [
            [path.relative_to(out) for path in some] for out, some in zip(both, files, strict=True)
        ]
        assert names[0] == names[1] != []
        for one, two in zip(*files, strict=True):
            assert one.read_bytes() == two.read_bytes()


def test_the_command_line_exports_explanations(store, planted, tmp_path, capsys):
    place, out = str(planted.path), str(tmp_path / "out")
    asked = ("store", "export", place, "--to", "neuronpedia", "--out", out, "--hook", HOOK)
    assert call(*asked) == 0
    assert capsys.readouterr().out.split() == [out]
    assert call(*asked) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("to", "hooks", "message"),
    [
        ("neuronpdia", [HOOK], "layout 'neuronpdia' is not known; did you mean neuronpedia"),
        ("neuronpedia", [], "neuronpedia takes one hook, got 0"),
        ("neuronpedia", ["blocks.7.mlp.hook_post"], "no hook 'blocks.7.mlp.hook_post' stored"),
        ("openai-simulations", [OTHER], "no explanations of 'blocks.1.mlp.hook_post' to simulate"),
    ],
)
def test_what_cannot_be_exported_says_why(store, tmp_path, to, hooks, message):
    with pytest.raises(ExplainError, match=message):
        export_store(store, to, tmp_path / "out", hooks)
    assert not (tmp_path / "out").exists()
