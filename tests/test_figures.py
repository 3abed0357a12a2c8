"""Figures of dictionaries: what they show, and that equal input gives equal bytes."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import activation_store as astore
import lmmono as lm
from lmmono.errors import RunError
from lmmono.reports.dictionary_tables import Measured, measured
from lmmono.reports.figures import front

HOOK = "blocks.0.hook_resid_post"


def one(name: str, l0: float, fvu: float, recovered: float = 0.5, control: str | None = None):
    measures = {"l0": float(l0), "fvu": fvu, "ce_loss_recovered (mean)": recovered}
    intervals = {key: (value, 0.9 * value, 1.1 * value) for key, value in measures.items()}
    return Measured("crate", HOOK, name, control or "topk", control, intervals)


POINTS = [
    one("a", 4, 0.5, 0.7),
    one("b", 8, 0.3, 0.9),
    one("c", 8.5, 0.4, 0.95),
    one("d", 16, 0.2, 0.94),
    one("floor", 4, 0.1, 0.99, control="random"),
    one("raw", 4, 2.0, 0.1, control="raw"),
]


def test_the_front_holds_the_results_that_none_beats_in_both():
    assert [each.name for each in front(POINTS, "l0", "fvu")] == ["a", "b", "d"]
    recovered = front(POINTS, "l0", "ce_loss_recovered (mean)")
    assert [each.name for each in recovered] == ["a", "b", "c"], "more recovered is better"


@pytest.mark.parametrize("y", ["fvu", "ce_loss_recovered"])
def test_equal_input_gives_equal_bytes_and_every_kind_is_named(tmp_path, y):
    first = lm.reports.pareto(POINTS, y=y, path=tmp_path / "a.svg")
    script = (
        "import sys; sys.path.insert(0, 'tests'); import lmmono as lm\n"
        "from test_figures import POINTS\n"
        f"lm.reports.pareto(POINTS, y={y!r}, path=sys.argv[1])"
    )
    again = tmp_path / "b.svg"
    subprocess.run([sys.executable, "-c", script, again], check=True, env={"PATH": ""})
    assert first.read_bytes() == again.read_bytes()
    texts = {text.text for text in ElementTree.parse(first).iter() if text.tag.endswith("}text")}
    wanted = {"topk", "random", "raw", f"crate: {HOOK}", "l0"}
    assert wanted | {"ce_loss_recovered (mean)" if y != "fvu" else y} <= texts


@pytest.mark.parametrize(("name", "head"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF")])
def test_a_figure_is_what_its_suffix_says(tmp_path, name, head):
    assert lm.reports.pareto(POINTS, path=tmp_path / name).read_bytes().startswith(head)
    with pytest.raises(RunError, match="want a figure as .svg, .png or .pdf, got 'gif'"):
        lm.reports.pareto(POINTS, path=tmp_path / "a.gif")


def test_runs_and_hooks_have_panels_of_their_own(tmp_path):
    others = [Measured("gpt2", "other", "a", "topk", None, POINTS[0].measures), *POINTS]
    text = lm.reports.pareto(others, path=tmp_path / "a.svg").read_text()
    assert len(re.findall('id="axes_', text)) == 2
    text = lm.reports.pareto(others, hooks=["other"], path=tmp_path / "a.svg").read_text()
    assert len(re.findall('id="axes_', text)) == 1 and "gpt2: other" in text


def test_measures_are_read_from_a_store_with_their_intervals(tmp_path):
    row = {"metric_version": 1, "hook": HOOK, "seed": 0, "split": "score"}
    about = {"hook": HOOK, "d_in": 2, "d_sae": 4}
    with astore.open(tmp_path / "one" / "store.duckdb", "w") as store:
        store.append(
            "dictionaries",
            [about | {"name": n, "arch": a} for n, a in (("x", "topk"), ("y", "random"))],
        )
        scores = [
            {"metric": "l0", "dictionary": "x", "value": 3.0, "ci_low": 2.5, "ci_high": 3.5},
            {"metric": "ce_loss_recovered", "preset": "mean", "dictionary": "x", "value": 0.5},
            {"metric": "l0", "dictionary": "y", "value": 1.0},
        ]
        store.append("all_scores", [row | each for each in scores])
        x, y = measured(store)
    assert x.get("l0") == (3.0, 2.5, 3.5) and x.get("ce_loss_recovered (mean)")[0] == 0.5
    assert (x.control, y.control) == (None, "random")
    assert [each.name for each in measured([tmp_path / "one" / "store.duckdb"])] == ["x", "y"]
    with pytest.raises(RunError, match="no dictionary has both l0 and fvu"):
        lm.reports.pareto([x, y], path=tmp_path / "a.svg")


def test_an_unknown_measure_is_refused_with_the_nearest_name():
    with pytest.raises(RunError, match="fvuu: no such metric; did you mean fvu"):
        lm.reports.pareto(POINTS, y="fvuu")
