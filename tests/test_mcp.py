"""The tools over stdio, asked by the SDK's own client: they read, within the console's limits."""

import os
import sys

import pytest
from small_store import HOOK, WORDS

pytest.importorskip("mcp", reason="needs extra mcp")
pytest.importorskip("starlette", reason="the helpers of these tests need extra serve")
import anyio  # noqa: E402
from mcp.client import Client  # noqa: E402
from mcp.client.stdio import StdioServerParameters, stdio_client  # noqa: E402
from small_served import small_served  # noqa: E402


def test_a_program_asks_runs_over_stdio_and_can_only_read(tmp_path):
    small_served(tmp_path).close()
    command = ["-m", "lmmono", "mcp", str(tmp_path / "crate"), str(tmp_path / "gpt2")]
    server = StdioServerParameters(
        command=sys.executable, args=command, env=dict(os.environ), cwd=str(tmp_path)
    )
    secret = tmp_path / "secret.txt"

    async def ask() -> dict[str, object]:
        said: dict[str, object] = {}
        async with Client(stdio_client(server)) as client:
            said["tools"] = (await client.list_tools()).tools
            for name, tool, arguments in (
                ("schema", "schema", {}),
                ("columns", "schema", {"tables": ["unit_stats"]}),
                ("sql", "sql", {"query": "SELECT count(*) AS n FROM gpt2.hooks"}),
                ("many", "sql", {"query": "FROM range(100000)", "rows": 10**6}),
                ("unit", "unit", {"hook": HOOK, "unit": 1}),
                ("exemplars", "exemplars", {"hook": HOOK, "unit": 1, "k": 2}),
                ("explain", "explain", {"hook": HOOK, "unit": 1}),
                ("fires", "search", {"text": WORDS[1], "run": "gpt2"}),
                ("said", "search", {"text": "cats", "by": "said"}),
                ("write", "sql", {"query": "DROP TABLE hooks"}),
                ("file", "sql", {"query": f"FROM read_text('{secret}')"}),
                ("nobody", "unit", {"hook": HOOK, "unit": 1, "run": "nobody"}),
                ("no unit", "unit", {"hook": HOOK, "unit": 99}),
            ):
                said[name] = await client.call_tool(tool, arguments)
        return said

    said = anyio.run(ask)
    names = ["exemplars", "explain", "schema", "search", "sql", "unit"]
    assert sorted(tool.name for tool in said["tools"]) == names
    assert all(tool.annotations.read_only_hint for tool in said["tools"])
    given = {n: r.structured_content for n, r in said.items() if n != "tools" and not r.is_error}
    assert given["sql"]["rows"] == [{"n": 2}]
    assert (given["many"]["n_rows"], given["many"]["is_cut"]) == (1000, True)
    assert [run["run"] for run in given["schema"]["runs"]] == ["crate", "gpt2"]
    assert {c["name"] for c in given["columns"]["tables"][0]["columns"]} >= {"density", "max_act"}
    assert given["unit"]["stats"]["n_active"] > 0
    assert len(given["exemplars"]["exemplars"]) == 2
    assert given["explain"]["scores"][0]["controls"] == {"shuffled": 0.2}
    assert (given["fires"]["units"][0]["unit"], given["fires"]["units"][0]["f1"]) == (1, 1.0)
    assert "<U+001B>" in given["said"]["units"][0]["text"]  # no terminal is driven by an answer
    refused = {n: r.content[0].text for n, r in said.items() if n != "tools" and r.is_error}
    assert refused.keys() == {"write", "file", "nobody", "no unit"}
    assert "not allowed here" in refused["write"] and "not allowed here" in refused["file"]
    assert "did you mean" in refused["nobody"] or "known: crate" in refused["nobody"]
