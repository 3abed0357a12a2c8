"""Tables and figures of the robustness suites: what they show, and equal bytes for equal input."""

import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from planted_results import noisy_labels, other_domain, result

import activation_store as astore
from lmmono.errors import RunError
from lmmono.reports.robustness_figures import robustness_figures
from lmmono.reports.robustness_tables import (
    comparison_table,
    dose_table,
    effective_table,
    level_tables,
    noise_table,
    robustness_tables,
    verdict_tables,
)
from lmmono.studies.comparisons import compare_families
from lmmono.studies.doses import Dose
from lmmono.studies.effective import effective_robustness
from lmmono.studies.hypotheses import Evidence, verdicts
from lmmono.suites.results import stored_rows

ROWS = noisy_labels({"raw": 0.0, "sae": 0.02, "pca-16": 0.0}, seeds=6, levels=(0.0, 0.1, 0.4))


def test_levels_stand_side_by_side_with_the_clean_one_first():
    (table,) = level_tables(ROWS)
    assert table.columns == ("family", "0", "0.1", "0.4")
    assert [row[0] for row in table.rows] == ["pca-16", "raw", "sae"]
    values = [each.value for each in ROWS if each.feature == "raw" and each.level == 0.4]
    assert table.rows[1][3].startswith(f"{sum(values) / 6:.3f} [")
    assert "symmetric" in table.title and "higher is better" in table.title


def test_what_failed_is_told_and_not_averaged_over():
    rows = [result(value=v, seed=s, level=0.4) for s, v in enumerate((0.5, 0.7, math.nan))]
    rows += [result("sae", math.nan, level=0.4, failure="one_class")]
    (table,) = level_tables(rows)
    assert table.rows[0][1].startswith("0.6 [") and table.rows[0][1].endswith("(1 failed)")
    assert table.rows[1][1] == "failed: one_class"


def test_differences_and_areas_come_with_interval_p_and_seeds():
    table = comparison_table(compare_families(ROWS, "raw"), title="Differences")
    assert len(table.rows) == 2 * 3 and all(row[-1] == "6" for row in table.rows)


def test_what_noise_takes_stands_beside_what_there_was_without_it():
    falls = {"a": (0.9, 0.8, 0.6), "b": (0.7, 0.65, 0.6)}
    rows = [
        result(name, value, seed=seed, level=level, corruption="symmetric" if level else None)
        for name, values in falls.items()
        for seed in (0, 1)
        for level, value in zip((0.0, 0.1, 0.4), values, strict=True)
    ]
    table = noise_table(rows)
    cells = {row[2]: [float(cell.split()[0]) for cell in row[3:]] for row in table.rows}
    for name, (clean, low, high) in falls.items():
        area = (0.1 * (clean + low) / 2 + 0.3 * (low + high) / 2) / 0.4
        assert cells[name] == pytest.approx([clean, area - clean, area / clean], abs=6e-4)
    assert cells["a"][0] > cells["b"][0] and cells["a"][1] < cells["b"][1]


def test_every_control_has_a_verdict_of_its_own():
    rows = noisy_labels({"raw": 0.0, "pca-16": 0.2, "sae": 0.1}, seeds=12)
    joint, single = verdict_tables(verdicts(["H1"], Evidence(rows)))
    assert joint.rows[0][2] == "not supported"  # neither better than both, nor worse than both
    assert {row[2]: row[-1] for row in single.rows} == {"raw": "supported", "pca-16": "opposite"}


def test_other_domains_and_verdicts_have_tables():
    found = effective_robustness(other_domain({"raw": 0.0, "pca-16": 0.0, "sae": 0.5}), ["raw"])
    table = effective_table(found)
    assert [row[2] for row in table.rows] == ["pca-16", "sae"]
    told, *_ = verdict_tables(verdicts(["H1", "H4"], Evidence(ROWS)))
    assert [row[0] for row in told.rows] == ["H1", "H4"]
    assert [row[2] for row in told.rows] == ["supported", "not tested"]


def test_the_dose_response_has_a_row_for_each_measure_from_three_dictionaries_on():
    gains = {"raw": 0.0} | {f"sae-{i}": 0.02 * i for i in range(4)}
    rows = [
        replace(r, settings={**r.settings, "d": 8, "l0": 9.0 - dose, "semantic_consistency": dose})
        for r in noisy_labels(gains, seeds=5)
        for dose in [gains[r.feature] * 10]
    ]
    table = dose_table(rows, [Dose(f"sae-{i}", 8, "mcc", i / 2) for i in range(2)])
    assert [row[:3] for row in table.rows] == [
        ("l0", "8", "4"),
        ("semantic_consistency", "8", "4"),
    ], "two dictionaries have no slope"
    assert table.rows[0][3].startswith("-1.00 [") and table.rows[1][3].startswith("+1.00 [")
    slope = float(table.rows[1][5].split()[0])
    assert slope == pytest.approx(0.1, abs=0.03)
    assert dose_table(ROWS).rows == ()


def test_a_store_tells_all_of_it_and_says_what_could_not_be_worked_out(tmp_path):
    above = other_domain({"raw": 0.0, "pca-16": 0.0, "sae": 0.5})
    with astore.open(tmp_path / "a", "w") as store:
        with pytest.raises(RunError, match="no rows of accuracy in table robustness"):
            robustness_tables(store)
        store.append("robustness", stored_rows([*ROWS, *above]))
        tables = robustness_tables(store, hypotheses=["H1", "H3", "H4"])
    titles = [each.title for each in tables]
    assert titles[-5:] == [
        "Without noise, and what noise takes",
        "Change under noise",
        "Effective robustness",
        "Hypotheses registered before the run",
        "Hypotheses, control by control",
    ]
    verdict = {row[0]: row[2] for row in tables[-2].rows}
    assert verdict == {"H1": "supported", "H3": "not tested", "H4": "supported"}
    with astore.open(tmp_path / "b", "w") as store:
        store.append("robustness", stored_rows(other_domain({"raw": 0.0}, shots=(4,), seeds=2)))
        assert "Not worked out: task topic" in robustness_tables(store)[-1].note


def test_equal_input_gives_equal_bytes_and_a_figure_per_corruption(tmp_path):
    other = noisy_labels({"raw": 0.0, "sae": 0.0}, seeds=3, levels=(0.2,), corruption="pair_flip")
    first = robustness_figures([*ROWS, *other], "raw", tmp_path / "a")
    names = [f"noisy_labels_{kind}.svg" for kind in ("symmetric", "pair_flip")]
    assert [path.name for path in first] == names
    (again,) = robustness_figures(ROWS, "raw", tmp_path / "b")
    assert first[0].read_bytes() == again.read_bytes()
    tags = ElementTree.parse(again).iter()
    texts = {text.text for text in tags if text.tag.endswith("}text")}
    assert {"raw", "sae", "pca-16", "topic", "less raw, paired"} <= texts
    (picture,) = robustness_figures(other, "raw", tmp_path, format="png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_there_is_nothing_to_draw_without_levels(tmp_path):
    with pytest.raises(RunError, match="no row has a corruption"):
        robustness_figures([result(level=0.0, corruption=None)], "raw", tmp_path)
