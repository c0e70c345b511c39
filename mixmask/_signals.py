"""Signals that ask a process to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

# What asks a process to end: Ctrl-C, `kill`, and a terminal that is closed, where there is one.
_ENDINGS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def interruptible() -> AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, unless they are handled."""
    return at_first_signal(signal.default_int_handler, only_free=True)


@contextmanager
def at_first_signal(
    call: Callable[[int, FrameType | None], None], *, only_free: bool = False
) -> Iterator[None]:
    """Call a function at the first SIGINT, SIGTERM or SIGHUP; a second one acts as before.

    Those that the process ignores stay ignored, and with `only_free` those that are handled.
    """
    before = {number: signal.getsignal(number) for number in _ENDINGS}
    if threading.current_thread() is not threading.main_thread():  # No other may set handlers.
        before.clear()
    for number, handler in list(before.items()):
        taken = only_free and handler is not signal.SIG_DFL
        # nohup has a process ignore the end of its terminal, and a shell has one in the background
        # ignore Ctrl-C. None was not set from Python, and could not be set again.
        if taken or handler in (signal.SIG_IGN, None):
            del before[number]

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        call(number, frame)

    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def without_worker_errors() -> Iterator[None]:
    """Keep torch from raising in whatever runs when a loader's worker dies; readers notice it.

    An earlier loader of the process, the caller's own for instance, may have set torch's handler.
    """
    number = getattr(signal, "SIGCHLD", None)  # Not on Windows.
    handler = None if number is None else signal.getsignal(number)
    main = threading.current_thread() is threading.main_thread()
    if number is None or not main or not getattr(handler, "__module__", "").startswith("torch."):
        yield
        return
    signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, handler)
