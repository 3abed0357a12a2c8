"""The processes that `accelerate launch` starts together: which this one is, and how they wait."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

_LONGEST_WAIT = timedelta(days=7)
"""The launcher ends all processes when one dies, so a wait is never for a dead one."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of one launch."""

    rank: int
    """0 for the one that speaks for all."""
    n: int
    """How many there are; 1 without a launcher."""

    @property
    def is_main(self) -> bool:
        """Whether this process does what only one may do."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.n == 1:
            return
        import torch.distributed as distributed

        if not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
        distributed.barrier()

    @contextmanager
    def main_first(self) -> Generator[None]:
        """Let the main process do the block alone, then the others together."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()


def current() -> Processes:
    """Return this process as its launcher names it in RANK and WORLD_SIZE."""
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
