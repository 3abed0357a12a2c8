"""Every verb that prints rows prints them as JSON too, in one of two shapes."""

import json

import click
import pytest
import typer

from lmmono.cli import app as command_line
from lmmono.cli.output import OutputTable, write_tables

NO_ROWS = {
    "check": "a line per fault or recipe",
    "schema": "JSON itself",
    "generate": "a text",
    "register": "a line per study",
    "report": "a page",
    "serve": "pages",
    "mcp": "answers of a protocol",
    "verify": "a report, and its exit code",
    "store verify": "a report, and its exit code",
    "store compact": "one line",
    "store export": "a folder",
    "import crate-lm": "a folder",
    "import llama2c": "a folder",
}
"""Verbs that print no rows, and what they print instead."""


def verbs(group: click.Group, above: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        is_group = isinstance(command, click.Group) or hasattr(command, "commands")
        found |= verbs(command, f"{above}{name} ") if is_group else {above + name: command}
    return found


VERBS = verbs(typer.main.get_command(command_line.app))


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_a_verb_that_prints_rows_prints_json(verb):
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    assert ({"--json", "--csv", "--arrow", "--wide"} <= options) == (verb not in NO_ROWS)


def test_one_table_is_its_rows_and_several_are_named(capsys):
    table = OutputTable(("unit", "act"), [(1, 0.5), (2, float("nan"))], title="best")
    write_tables([table], "json", is_one=True)
    assert json.loads(capsys.readouterr().out) == [
        {"unit": 1, "act": 0.5},
        {"unit": 2, "act": None},
    ]
    for tables in ([], [table], [table, table]):
        write_tables(tables, "json", is_one=False)
        shown = json.loads(capsys.readouterr().out)
        assert [set(each) for each in shown] == [{"title", "rows"}] * len(tables)
