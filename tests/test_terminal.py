"""Progress and tables as people and other programs see them."""

import io
import time

import pyarrow as pa
import pytest
from rich.console import Console

from lmmono.cli.terminal import LineProgress, show_table, shown_progress, write_result
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


def test_on_a_terminal_progress_is_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with shown_progress(console) as progress:
        assert isinstance(progress, Progress)
        progress("train", 1, 4, loss=3.0)
        progress("train", 4, 4, loss=2.5)
    assert "train" in written(console) and "4/4" in written(console)
    assert "loss 2.5" in written(console) and "━" in written(console)


def test_progress_goes_to_stderr(capsys):
    with shown_progress(every_seconds=0) as progress:
        progress("train", 1, 1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "train: 1 of 1 (100%)\n")


def test_a_table_in_a_pipe_is_never_cut_and_shows_text_as_it_is():
    console = plain()
    text = "word " * 60 + "[bold]not markup[/bold] \\[x]"
    rows = [["h", 0.123456, text], ["h", None, ""]]
    about = {"title": "all [bold] of it", "note": "y = [x1 > x2]"}
    show_table(["hook", "act", "text"], rows, **about, console=console)
    assert text in written(console)
    assert all(words in written(console) for words in about.values())
    assert "0.1235" in written(console)


def test_on_a_terminal_only_long_cells_are_folded():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    show_table(["hook", "text"], [["blocks.0.mlp.hook_post", "some words " * 20]], console=console)
    assert "blocks.0.mlp.hook_post" in written(console)
    assert max(map(len, written(console).splitlines())) <= 60


@pytest.mark.parametrize("format", ["csv", "json", "table"])
def test_nested_and_missing_values_survive_every_text_form(capfdbinary, format):
    table = pa.table({"unit": [1, 2], "acts": [[0.5, None], None], "text": ['a,"b"', "é\n"]})
    write_result(table, format)
    out = capfdbinary.readouterr().out.decode()
    assert "0.5" in out and "é" in out
