"""Programs killed at random moments of their work, and a tally of where the kills fell.

A program says `begin` when its work begins and `end` when it is done, on lines of their own. Once
it is run to its end to learn how long the work takes; after that it is killed at a moment drawn
evenly from that time.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import forks

N_KILLS = int(os.environ.get("STORE_KILLS", "3"))


class Kills:
    """Kills of one kind of work."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind = kind
        self.began = time.monotonic()
        self.seconds = 0.0
        self.states: Counter[Hashable] = Counter()
        self.n_inside = 0
        self._moments = random.Random(seed)

    def run(self, arguments: Sequence[str]) -> None:
        """Run `python ARGUMENTS` to its end; the first time says how long its work takes."""
        fork = _started(arguments)
        began = time.monotonic()
        _wait_for(fork, "end\n")
        self.seconds = self.seconds or time.monotonic() - began
        assert fork.wait() == 0, fork.stderr

    def kill(self, arguments: Sequence[str], seconds: float | None = None) -> bool:
        """Kill `python ARGUMENTS` within its work; False where it was done before that."""
        fork = _started(arguments)
        time.sleep(self._moments.uniform(0, seconds or self.seconds))
        fork.send(signal.SIGKILL)
        code = fork.wait()
        inside = not fork.stdout.endswith("end\n")
        assert code == -signal.SIGKILL or not inside, fork.stderr
        self.n_inside += inside
        return inside

    def saw(self, state: Hashable) -> None:
        """Note what the kill left on the disk."""
        self.states[state] += 1

    def check(self, n_states: int) -> None:
        """Want most kills within the work, and in a long run `n_states` different remains."""
        n = sum(self.states.values())
        sys.stdout.write(
            f"{self.kind}: {n} kills, {self.n_inside} within the work of {self.seconds:.2f} s, "
            f"{len(self.states)} different states, {(time.monotonic() - self.began) / 60:.1f} min\n"
        )
        for state, count in self.states.most_common(8):
            sys.stdout.write(f"  {count} x {state}\n")
        assert self.n_inside >= n // 2, "the kills missed the work"
        assert n < 50 or len(self.states) >= n_states, "the kills all fell at one moment"


def _started(arguments: Sequence[str]) -> forks.Fork:
    fork = forks.start(*arguments)
    _wait_for(fork, "begin\n")
    return fork


def _wait_for(fork: forks.Fork, line: str) -> None:
    alive = True
    while line not in (fork.folder / "out").read_text():
        assert alive, (fork.folder / "err").read_text()
        time.sleep(0.002)
        alive = fork.process.is_alive()


def remains(path: Path, names: set[str]) -> tuple[str, ...]:
    """Say what lies beside a catalogue that it does not list: parts, whole files, a draft."""
    files = {file.name for file in path.with_suffix("").iterdir() if not file.name.startswith(".")}
    kinds = {"part" if name.endswith(".part") else "whole" for name in files - names}
    draft = path.with_name(f"{path.name}.draft").exists()
    return (*sorted(kinds), *(["draft"] if draft else []))
