"""Progress and tables as people and other programs see them."""

import io
import json
import math
import re
import time
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console

from lmmono.cli.output import OutputTable, table_lines, write_tables
from lmmono.cli.terminal import LineProgress, shown_progress
from lmmono.types import Progress


def plain() -> Console:
    return Console(file=io.StringIO(), width=80)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_off_a_terminal_progress_is_few_plain_lines_with_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = plain()
    progress = LineProgress(console, every_seconds=5)
    for step in range(1, 101):
        clock[0] += 0.2
        progress("train", step, 100, loss=2.34567)
    lines = written(console).splitlines()
    assert lines[0] == "train: 25 of 100 (25%), 5/s, 15 s left, loss 2.346"
    assert lines[-1] == "train: 100 of 100 (100%), loss 2.346"
    assert len(lines) == 4, "20 seconds, one line every 5"


def test_a_resumed_work_counts_its_rate_from_where_it_began(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = plain()
    progress = LineProgress(console, every_seconds=5)
    progress("train", 900, 1000)
    clock[0] = 10.0
    progress("train", 950, 1000)
    assert written(console) == "train: 950 of 1000 (95%), 5/s, 10 s left\n"


def test_work_of_one_name_in_the_next_run_has_a_rate_of_its_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = plain()
    progress = LineProgress(console, every_seconds=5)
    for done in (0, 50, 100, 0, 10, 20):
        progress("capture", done, 100)
        clock[0] += 10.0
    assert written(console).splitlines() == [
        "capture: 50 of 100 (50%), 5/s, 10 s left",
        "capture: 100 of 100 (100%)",
        "capture: 0 of 100 (0%)",
        "capture: 10 of 100 (10%), 1/s, 90 s left",
        "capture: 20 of 100 (20%), 1/s, 80 s left",
    ]


def test_on_a_terminal_progress_is_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown_progress(console) as progress:
        assert isinstance(progress, Progress)
        progress("train", 1, 4, loss=3.0)
        progress("train", 4, 4, loss=2.5)
    assert "train" in written(console) and "4/4" in written(console)
    assert "loss 2.5" in written(console) and "━" in written(console)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_of_a_hook_with_a_hostile_name_drives_no_terminal(is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    with shown_progress(console, every_seconds=0) as progress:
        progress("score [/b]\x1b]0;t\x07[bold]", 1, 1)
    assert "\x1b]0" not in written(console) and "\x07" not in written(console)
    assert "score [/b]<U+001B>]0;t<U+0007>[bold]" in written(console)


def test_progress_goes_to_stderr(capsys):
    with shown_progress(every_seconds=0) as progress:
        progress("train", 1, 1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "train: 1 of 1 (100%)\n")


TEXT = "word " * 60 + "[bold]not markup[/bold] \\[x]"
LONG = "blocks.1.hook_resid_post.hook_sae_acts_post"
WIDE = OutputTable(
    ("run", "hook", "n", "selectivity", "excerpt"),
    [
        (
            "crate",
            "blocks.1.hook_resid_post.hook_sae_acts_post",
            198_912,
            "0.266 [0.238, 0.296]",
            TEXT,
        ),
        ("gpt2", "blocks.0.mlp.hook_post", 12, "0.1 [0.05, 0.2]", "日本語 「テスト」 " * 9),
    ],
    title="all [bold] of it",
    note="y = [x1 > x2]",
)


def test_rows_in_a_pipe_are_one_line_each_and_show_text_as_it_is():
    lines = table_lines(WIDE, None)
    assert sum(TEXT.strip() in line for line in lines) == 1
    assert WIDE.title in lines and WIDE.note in lines


@pytest.mark.parametrize("width", [100, 80, 60, 40])
def test_a_table_fits_without_a_digit_cut_and_says_where_it_left_something_out(width):
    lines = table_lines(WIDE, width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    for number in ("198912", "0.266", "0.238,", "0.296]"):
        assert number in text
    assert "blocks.1.hook_resid_post.hook_sae_acts_post" in text or re.search(
        r"blocks.*….*post", text
    )
    for head in WIDE.columns:
        assert head in text, "no column is left out"


def test_a_narrow_table_leaves_out_what_can_be_spared_and_says_so():
    table = replace(WIDE, spare=("run", "n"))
    wide, narrow = (table_lines(table, width) for width in (120, 60))
    assert wide == table_lines(WIDE, 120)
    assert "Not shown at this width: run, n; --wide shows all." in narrow
    head = next(line for line in narrow if "hook" in line)
    assert head.split() == ["hook", "selectivity", "excerpt"]
    assert max(map(cell_len, narrow)) <= 60


def test_statistics_of_units_fit_any_terminal_as_blocks():
    columns = [f"column_{i}" for i in range(16)]
    lines = table_lines(OutputTable(columns, [[float(i) for i in range(16)]]), 80)
    assert max(map(len, lines)) <= 80
    assert all(
        any(line.split() == [name, f"{i}"] for line in lines) for i, name in enumerate(columns)
    )


@pytest.mark.parametrize("format", ["table", "csv", "json"])
def test_text_of_a_corpus_drives_no_terminal(capsys, format):
    hostile = "\x1b]0;title\x07 \x1b]52;c;aGk=\x07 \u202egnp.exe \x9b31m"
    write_tables([OutputTable((hostile, "n"), [(hostile, 1)], title=hostile, note=hostile)], format)
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\x9b")
    if format != "json":  # JSON is for programs, and escapes control characters by itself
        assert "\u202e" not in out and "<U+202E>" in out


def test_json_holds_no_nan_and_several_tables_keep_their_titles(capsys):
    write_tables([OutputTable(("x",), [(math.nan,), (math.inf,), (1.5,)])], "json")
    assert json.loads(capsys.readouterr().out) == [{"x": None}, {"x": None}, {"x": 1.5}]
    write_tables(
        [OutputTable(("x",), [(1,)], title="a"), OutputTable(("y",), [], title="b")], "json"
    )
    assert json.loads(capsys.readouterr().out) == [
        {"title": "a", "rows": [{"x": 1}]},
        {"title": "b", "rows": []},
    ]
