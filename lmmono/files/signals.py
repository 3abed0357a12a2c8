"""Ctrl-C and SIGTERM during long work: the step under way is finished and saved first."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from lmmono.errors import TrainingStopped

if TYPE_CHECKING:
    from accelerate import Accelerator
else:  # beartype needs the name; accelerate takes seconds to import
    Accelerator = Any


class StopRequest:
    """Remembers the first signal that asked for a stop; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, accelerator: Accelerator) -> int | None:
        """Return the signal if any process received one: all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.signal
        import torch

        flags = accelerator.gather(torch.tensor([self.signal or 0], device=accelerator.device))
        assert isinstance(flags, torch.Tensor)
        return int(flags.max()) or None


@contextmanager
def stop_requests() -> Generator[StopRequest]:
    """Catch SIGINT and SIGTERM inside the block; outside the main thread nothing is caught."""
    request = StopRequest()
    with _handled(request.receive, signal.SIGINT, signal.SIGTERM):
        yield request


@contextmanager
def ended_by_sigterm(what: str) -> Generator[None]:
    """Let SIGTERM end the block at once, as Ctrl-C does: for work that is written atomically.

    Raises:
        TrainingStopped: SIGTERM arrived in the main thread.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TrainingStopped(
            f"{what}: stopped by SIGTERM; what was finished is kept, the same command resumes from "
            "there"
        )

    with _handled(stop, signal.SIGTERM):
        yield


@contextmanager
def _handled(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Generator[None]:
    """Handle signals inside the block; outside the main thread Python allows it to nobody."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handled_before in before.items():
            signal.signal(number, handled_before)
