"""Processes that do what `python ARGUMENTS` does and begin with the slow imports done.

They are copies of a server that has imported what takes seconds and done nothing else. The type
checks that tests switch on are off in them, as in every process that a user starts.
"""

import atexit
import gc
import importlib.util
import multiprocessing
import os
import runpy
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from lake_servers import free_port

SERVER = multiprocessing.get_context("forkserver")
PRELOADED = (
    *("accelerate", "sae_lens", "lmmono.training.loop", "lmmono.captures.capture"),
    *("lmmono.dictionaries.sae", "lmmono.scores.score", "lmmono.suites.study"),
    *("lmmono.reports.side_by_side", "lmmono.models.hooks"),
)
# the server passes over what it cannot import, and every process is then seconds slower
assert all(map(importlib.util.find_spec, PRELOADED))
SERVER.set_forkserver_preload(list(PRELOADED))


class Fork:
    """One such process; until it is waited for, `out` and `err` of its folder hold what it says."""

    def __init__(self, arguments: tuple[str, ...], cwd: Path, env: dict[str, str]) -> None:
        self.arguments = arguments
        self.folder = Path(tempfile.mkdtemp(prefix="fork-"))
        for name in ("out", "err"):
            (self.folder / name).touch()
        self.stdout = self.stderr = ""
        self.process: BaseProcess = SERVER.Process(
            target=_begin, args=(arguments, self.folder, cwd, env)
        )
        self.process.start()
        atexit.register(self.process.kill)  # a test that failed waits for none of its own

    def send(self, number: int) -> None:
        """Send it a signal, if it has not ended."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, seconds: float = 600) -> int:
        """Return its exit code, negative for a signal; kill it when it takes too long."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.stdout, self.stderr = ((self.folder / name).read_text() for name in ("out", "err"))
        shutil.rmtree(self.folder)
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> Fork:
    """Start `python ARGUMENTS`, with `env` added to the environment."""
    return Fork(tuple(map(str, arguments)), cwd or Path.cwd(), {**os.environ, **(env or {})})


def run(*arguments: object, cwd: Path | None = None) -> str:
    """Run `python ARGUMENTS` to its end, which is without a fault, and return what it prints."""
    fork = start(*arguments, cwd=cwd)
    code = fork.wait()
    assert code == 0, f"{shlex.join(fork.arguments)}: {code}\n{fork.stdout}\n{fork.stderr}"
    return fork.stdout


def launch(n: int, *arguments: object, env: Mapping[str, str] | None = None) -> list[int]:
    """Start n processes as a launcher does, which ends all when one fails; return exit codes."""
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    ranks = [
        start(*arguments, env={**shared, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(n)
    ]
    while any(rank.process.is_alive() for rank in ranks):
        if any(rank.process.exitcode for rank in ranks):
            for rank in ranks:
                rank.process.terminate()
        time.sleep(0.02)
    codes = [rank.wait() for rank in ranks]
    sys.stderr.write("".join(rank.stderr for rank in ranks))
    return codes


def _begin(arguments: tuple[str, ...], folder: Path, cwd: Path, env: dict[str, str]) -> None:
    """Do, in the new process, what Python does with its arguments."""
    gc.freeze()  # a collection of all that is imported takes a second, and copies its memory
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        file = os.open(folder / name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:  # what is imported has counted its threads
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    first, *rest = arguments
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(first, run_name="__main__")
