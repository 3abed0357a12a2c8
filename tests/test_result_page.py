"""A page of results as far as a study has come, and the figure of scores against loss."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

import lmmono as lm
from lmmono.errors import RunError
from lmmono.reports.figures import training_figure
from lmmono.reports.result_page import BEGIN, END, markdown, write_result_page
from lmmono.reports.table import Interval, ReportTable
from lmmono.runs.folder import Run

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

    page.write_text(f"# Early\n{BEGIN}\n")
    with pytest.raises(RunError, match="has one of the marks"):
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
