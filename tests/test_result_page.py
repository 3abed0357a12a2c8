"""A page of results as far as a study has come, and the figure of scores against loss."""

from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from planted_results import result

import activation_store as astore
import lmmono as lm
from lmmono.errors import RunError
from lmmono.reports import arm_tables as arms
from lmmono.reports.figures import training_figure
from lmmono.reports.result_page import BEGIN, END, markdown, write_result_page
from lmmono.reports.table import Interval, ReportTable
from lmmono.runs.folder import Run
from lmmono.suites.results import Result

RECIPE = """
name: early
seeds: [0, 1]
out: {out}
data: {{corpus: {{kind: planted, n_documents: 300}}, n_ctx: 32}}
model: {{arch: crate, n_layers: 1, d_model: 16, n_heads: 2}}
"""


def test_a_page_says_how_far_a_study_is_and_keeps_what_people_wrote(tmp_path: Path) -> None:
    (tmp_path / "early.yaml").write_text(RECIPE.format(out=tmp_path / "runs"))
    for recipe in lm.Recipe.load(tmp_path / "early.yaml").runs():
        Run.create(recipe)
    page = tmp_path / "docs" / "early.md"
    page.parent.mkdir()
    page.write_text(f"# Early\n\nA question.\n\n{BEGIN}\nold\n{END}\n\nAn answer.\n")
    (table,) = write_result_page(page, [tmp_path / "runs"])
    text = page.read_text()
    assert text.startswith("# Early\n\nA question.\n") and text.endswith("\n\nAn answer.\n")
    assert "old" not in text and "0 of the 2 runs that were begun are whole" in text
    assert [row[0] for row in table.rows] == ["early/seed0", "early/seed1"]
    assert "| early/seed0 | 0 of" in text
    write_result_page(page, [tmp_path / "runs"])
    assert page.read_text() == text

    for broken in (BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"):
        page.write_text(f"# Early\n{broken}\nAn answer.\n")
        with pytest.raises(RunError, match="once each in this order, or neither; got"):
            write_result_page(page, [tmp_path / "runs"])
        assert page.read_text().endswith("An answer.\n")
    page.write_bytes(b"\xff\xfe")
    with pytest.raises(RunError, match="is no UTF-8 text"):
        write_result_page(page, [tmp_path / "runs"])
    with pytest.raises(RunError, match="no run there"):
        write_result_page(page, [tmp_path / "docs"])


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert "| a\\|b | 0.1235 |" in markdown(ReportTable("t", ("x", "y"), (("a|b", 0.12345),)))


def test_scores_are_drawn_against_loss_with_a_line_per_arm(tmp_path: Path) -> None:
    columns = ("arm", "seeds", "tokens", "val loss", "density", "simulation_tar of token_lookup")
    rows = tuple(
        (arm, 2, "100", Interval(loss, loss - 0.1, loss + 0.1), None, Interval(score, score, score))
        for arm, points in {"crate": ((6.0, 0.1), (5.0, 0.2)), "gpt2": ((5.5, 0.1),)}.items()
        for loss, score in points
    )
    table = ReportTable("Along training", columns, rows)
    path = training_figure(table, tmp_path / "a.svg")
    again = training_figure(table, tmp_path / "b.svg")
    assert path.read_bytes() == again.read_bytes()
    texts = {tag.text for tag in ElementTree.parse(path).iter() if tag.tag.endswith("}text")}
    assert {"crate", "gpt2", "val loss, nats per token"} <= texts
    with pytest.raises(RunError, match="want a file that ends in"):
        training_figure(table, tmp_path / "a.txt")


class Finished(Run):
    """A run that is done, with a store of any other."""

    val_loss, store_path = 0.0, Path()

    def __init__(self, arm: str, seed: int, loss: float, store: Path) -> None:
        suites = SimpleNamespace(suites=("noisy_labels",))
        self.recipe = SimpleNamespace(arm=arm, seed=seed, robustness=suites)
        self.val_loss, self.store_path = loss, store
        began = SimpleNamespace(started=arm)  # of these names the first in the alphabet
        self.manifest = SimpleNamespace(stages={"train": began})

    def is_done(self, stage: str) -> bool:
        return True


def test_arms_are_differences_from_the_first_seed_by_seed(tmp_path: Path, monkeypatch) -> None:
    hook = "blocks.0.mlp.hook_post"
    with astore.open(tmp_path / "run", mode="w") as store:
        about = {"hook": hook, "metric": "token_selectivity"}
        about |= {"seed": 0, "metric_version": 1}
        rows = [{"unit": u, "value": v, "control": None} for u, v in enumerate((0.2, 0.6))]
        store.append("all_scores", [{**about, **row} for row in rows])

    gains = {"plain": (0.0, 0.0), "up": (0.1, 0.3)}
    path = tmp_path / "run"
    runs = [Finished(arm, i, 2.0 + gains[arm][i], path) for arm in gains for i in range(2)]

    def results(of: Run, _: astore.Store) -> list[Result]:
        gain = gains[of.recipe.arm][of.recipe.seed]
        curve = [result(level=x, value=0.9 - x + gain * (x > 0)) for x in (0.0, 0.2, 0.4)]
        shots = result(suite="few_shot", level=None, corruption=None, n_shots=4, value=0.5 + gain)
        return [*curve, shots]

    monkeypatch.setattr(arms, "run_results", results)
    units, robust = arms.arm_tables(runs[::-1])  # the arm that was trained first leads
    table = {row[:2]: row[2:] for row in units.rows}
    assert units.columns == ("measure", "of", "seeds", "plain", "sd", "up")
    assert table["token_selectivity", "neurons"][1].value == pytest.approx(0.4)
    assert table["val loss", "model"][-1].value == pytest.approx(0.2)
    by_measure = {row[0]: row for row in robust.rows}
    change = by_measure["topic: noisy_labels, symmetric, change"]
    assert change[3].value == pytest.approx(-0.2), "by hand: (0 + 2 * 0.2 + 0.4) / 4"
    assert change[5].value == pytest.approx(0.75 * 0.2), "the first of four half steps has none"
    assert by_measure["topic: few_shot, 4 per class"][5].value == pytest.approx(0.2)
    assert by_measure["topic: noisy_labels, without noise"][5].value == pytest.approx(0.0)
    assert arms.arm_tables(runs[:2]) == [], "one arm is compared with nothing"
