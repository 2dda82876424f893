"""A program that imports this ends with a word on Ctrl-C, and without one where nobody reads what it prints (`| head`).
Under torchrun, it does not outlive that. Where its environment is not the one it needs, it says so.

Outside of training, there is nothing to save. Training goes on unheard; its log has a file.
"""

import atexit
import os
import select
import signal
import sys
from contextlib import suppress
from types import TracebackType

from lit_classification.signals import end_with_parent


def end(number: int, frame: object) -> None:
    """Die of the signal, as shells expect. An exception might be lost in a destructor, or while a process is forked."""
    with suppress(OSError):
        os.write(2, b"interrupted\n")
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say what to do about a missing package; die of the broken pipe, as other programs do, if it is the output's."""
    if issubclass(kind, ModuleNotFoundError):
        sys.exit(f"{error}: run `bash setup_env.sh` and activate its environment")
    output = select.poll()
    output.register(1, 0)
    if issubclass(kind, BrokenPipeError) and output.poll(0):  # it has no reader
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.raise_signal(signal.SIGPIPE)
    sys.__excepthook__(kind, error, trace)


def drop_unheard() -> None:
    """Let what nobody has read go nowhere, before Python complains of it."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


for _number in range(3):
    try:
        os.fstat(_number)
    except OSError:  # closed, as by `>&-`; the next file that is opened would be printed to
        os.open(os.devnull, os.O_RDWR)
sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
sys.excepthook = report
atexit.register(drop_unheard)
if "TORCHELASTIC_RUN_ID" in os.environ:  # from the start: torchrun, which started this process, may be killed at once
    end_with_parent(signal.SIGTERM)
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after `nohup`
    signal.signal(signal.SIGINT, end)
