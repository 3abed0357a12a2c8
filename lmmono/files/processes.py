"""The processes that `accelerate launch` starts together: which this one is, and how they wait."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

_LONGEST_WAIT = timedelta(days=7)  # the launcher ends all when one dies: none waits for the dead


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


_IS_ALONE = ContextVar("_IS_ALONE", default=False)


@contextmanager
def alone() -> Generator[None]:
    """Let this process be the only one in the block: others wait elsewhere, not for its work."""
    before = _IS_ALONE.set(True)
    try:
        yield
    finally:
        _IS_ALONE.reset(before)


def this_process() -> Processes:
    """Return this process as its launcher names it in RANK and WORLD_SIZE."""
    if _IS_ALONE.get():
        return Processes(0, 1)
    return Processes(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def is_main_process() -> bool:
    """Say whether this process is the one of a launch that prints and writes for all."""
    return this_process().is_main


def best_device() -> str:
    """Return the torch device that this process works on: its GPU where there is one."""
    import torch

    # the launcher numbers the processes of one machine in LOCAL_RANK, one GPU each
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
