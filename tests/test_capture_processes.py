"""One capture by two processes through the command line: shared rows, a kill, and going on.

Run as a program, this file is the command line with commits every 1,024 tokens of a process; with
KILLED_RANK set, that process kills itself after 2 commits.
"""

import os
import shutil
import signal
from functools import partialmethod
from pathlib import Path

import forks
import numpy as np
from ruamel.yaml import YAML

import activation_store as astore
from activation_store.write.writer import Writer
from lmmono.runs.folder import open_run

COMMIT_TOKENS, N_COMMITS = 1024, 2
SAME = (
    "SELECT * FROM activations ORDER BY ALL",
    "SELECT * FROM token_ids ORDER BY ALL",
    "SELECT * FROM vectors ORDER BY ALL",
    "SELECT * FROM hooks ORDER BY ALL",
    'SELECT * FROM "exemplars" ORDER BY ALL',
    "SELECT * EXCLUDE (mean, variance, skewness, kurtosis) FROM unit_stats ORDER BY ALL",
)
MOMENTS = "SELECT mean, variance, skewness, kurtosis FROM unit_stats ORDER BY hook, unit"
RECIPE = {
    "name": "two",
    "seed": 0,
    "data": {"corpus": {"kind": "planted", "n_documents": 300}, "n_ctx": 32},
    "model": {"arch": "gpt2", "n_layers": 2, "d_model": 16, "n_heads": 2},
    "train": {"steps": 2, "batch_tokens": 256, "warmup_steps": 1, "eval_tokens": 512},
    "capture": {
        "splits": ["train", "score"],
        "hooks": ["blocks.*.mlp.hook_post"],
        "vectors": ["blocks.0.hook_resid_post"],
        "batch_tokens": 256,
        "max_density": 1.0,
    },
}


def rows_of_rank(store: astore.Store, first: int, last: int) -> int:
    query = "SELECT count(DISTINCT seq_id) FROM token_ids WHERE seq_id BETWEEN $first AND $last"
    return store.sql(query, first=first, last=last).fetchall()[0][0]


def test_two_processes_capture_what_one_does_also_when_one_is_killed(tmp_path: Path) -> None:
    from lmmono.pipeline import run_stages, train
    from lmmono.recipe import Recipe

    recipe = tmp_path / "two.yaml"
    YAML().dump({**RECIPE, "out": str(tmp_path / "runs")}, recipe)
    run = train(Recipe.load(recipe))
    shutil.copytree(run.dir, tmp_path / "trained")
    run_stages(run, "capture")
    run.dir.rename(tmp_path / "one")
    shutil.copytree(tmp_path / "trained", run.dir)

    command = (__file__, "capture", recipe)
    codes = forks.launch(2, *command, env={"KILLED_RANK": "1"})
    assert codes[0] != 0 and codes[1] == -signal.SIGKILL
    assert not open_run(run.dir).is_done("capture")
    train_rows = len(run.tokens("train"))
    first, half = run.tokens("train").first_seq_id, train_rows // 2
    committed = N_COMMITS * COMMIT_TOKENS // 32
    with astore.open(run.store_path) as store:
        assert store.verify().ok
        kept = rows_of_rank(store, first + half, first + train_rows - 1)
        assert kept == committed < train_rows - half, "what the killed one committed stays"

    assert forks.launch(2, *command) == [0, 0]
    assert open_run(run.dir).is_done("capture")
    with astore.open(run.store_path) as two, astore.open(tmp_path / "one") as one:
        assert two.verify().ok and two.verify().left_over == ()
        for query in SAME:
            assert two.sql(query).fetchall() == one.sql(query).fetchall(), query
        ours, theirs = (np.array(s.sql(MOMENTS).fetchall(), float) for s in (two, one))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
        twice = "SELECT count(*) - count(DISTINCT (seq_id, pos)) FROM token_ids"
        assert two.sql(twice).fetchall() == [(0,)]
        assert two.info().n_tokens == one.info().n_tokens > 0
        ranks = "SELECT count(DISTINCT len(split_part(file, '-', 3))) FROM shards"
        assert two.sql(ranks).fetchall() == [(2,)], "each process wrote shards of its own"


if __name__ == "__main__":
    from lmmono.cli.app import main

    astore.Store.writer = partialmethod(  # type: ignore[method-assign]
        astore.Store.writer, commit_tokens=COMMIT_TOKENS
    )
    n_left = N_COMMITS
    commit = Writer._commit

    def commit_and_die(self: Writer) -> None:
        global n_left
        commit(self)
        n_left -= 1
        if not n_left and os.environ.get("KILLED_RANK") == os.environ.get("RANK", "none"):
            os.kill(os.getpid(), signal.SIGKILL)

    Writer._commit = commit_and_die
    main()
