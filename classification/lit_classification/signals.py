"""Signals that ask a training to stop: noted, and heard also while it waits for data."""

import ctypes
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

PREEMPTED = 75  # exit status of a run that saved and stopped because it was asked to; sysexits calls it "try again"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
T = TypeVar("T")


class Preempted(Exception):
    """A signal asked the run to stop; its state is saved."""


class StopAsked(BaseException):
    """Training cannot go on, as a process was asked to stop; no `except Exception` on the way shall take it for its."""


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: name of the one that asked, empty as long as none did.
        waiting: whether a signal shall interrupt what this process is doing.
    """

    signal: str = ""
    waiting: bool = False

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None once this process is asked to stop, also while it waits for data that may never come."""
        try:
            try:
                self.waiting = True
                return None if self.signal else next(batches)
            finally:
                self.waiting = False
        except StopAsked:
            return None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the signals that ask to stop, instead of dying of them; a second Ctrl-C ends the process at once."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:
        if request.signal and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal = signal.Signals(number).name
        if request.waiting:
            raise StopAsked

    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # as in `nohup ... &`
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent(number: signal.Signals) -> None:
    """Have Linux send this process a signal as soon as that which started it has died, however it did."""
    with suppress(AttributeError):  # other systems
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
