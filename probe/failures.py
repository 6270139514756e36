"""What can end a command, told apart: a signal, work that cannot go on, a full disk, too little memory, a bug.

Nothing heavy is imported here.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 128
"""Exit status of what a signal has stopped, less the signal's number."""
LONGEST = 1000
"""Characters of a line."""
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}
"""What is wrong with the disk as a whole, not with one file."""
OF_THE_NAME = {errno.ENAMETOOLONG, errno.ELOOP}
"""What is wrong with a path that somebody gave."""
STARTS_A_THREAD = {threading.Thread.start.__code__, ThreadPoolExecutor._adjust_thread_count.__code__}
"""Whoever is stopped in here leaves a thread that nobody knows of, and for which the interpreter waits at its end."""
SOON = 0.01
"""Seconds until a signal is heeded that came there."""
OURS = [Path(__file__).resolve().parents[1] / package for package in ("attnres", "probe", "train")]


class Stopped(BaseException):
    """SIGINT or SIGTERM has come. No `Exception`: what guards against failures lets it through."""

    pending: Stopped | None = None
    """The last one, which code of others may have swallowed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class CannotGoOn(Exception):
    """Work that cannot go on, by no fault of the input or of the code; the message is one line for the user."""


@contextmanager
def raising_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped` in this process. One forked from it has the default handlers' effects.

    Does nothing outside of the main thread, nor to a signal that is ignored, as SIGINT in a shell's background job.
    """
    owner, Stopped.pending = os.getpid(), None
    later: list[Callable[[], None]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        Stopped.pending = Stopped(number)
        if _starts_a_thread(frame):
            later.append(_alarm(lambda frame: stop(number, frame)))
            return
        for disarm in later:
            disarm()
        sys.excepthook = _say_nothing  # threads of multiprocessing print tracebacks when workers end before them
        raise Stopped.pending

    is_main = threading.current_thread() is threading.main_thread()
    heeded = [number for number in SIGNALS if is_main and signal.getsignal(number) != signal.SIG_IGN]
    before, hook = {number: signal.signal(number, stop) for number in heeded}, sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        for disarm in later:
            disarm()


def _starts_a_thread(frame: FrameType | None) -> bool:
    """Whether a frame, or one that has called it, is about to start a thread."""
    while frame is not None and frame.f_code not in STARTS_A_THREAD:
        frame = frame.f_back
    return frame is not None


def _alarm(ring: Callable[[FrameType | None], None]) -> Callable[[], None]:
    """Have `ring` called soon, in this thread; what is returned sees to it that it is not."""
    armed = [signal.getsignal(signal.SIGALRM) or signal.SIG_DFL]

    def disarm() -> None:
        if armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, armed.pop())

    def rung(_: int, frame: FrameType | None) -> None:
        disarm()
        ring(frame)

    signal.signal(signal.SIGALRM, rung)
    signal.setitimer(signal.ITIMER_REAL, SOON)
    return disarm


def _say_nothing(*_: object) -> None:
    """In place of `sys.excepthook`."""


def ignore_signals() -> None:
    """From now on, inside of `raising_signals`."""
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def stop_if_signalled() -> None:
    """Raise `Stopped` if a signal has come."""
    if Stopped.pending is not None:
        raise Stopped.pending


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of this machine or of its accelerator."""
    named = any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def disk_error(error: BaseException | None) -> OSError | None:
    """What the system said of a file or disk, if that is what `error` comes from.

    Writers in other languages (safetensors, torch) say it in a text of their own. Many fail once more while they close
    what they could not write: there, a full or broken disk is looked for in what they were handling.
    """
    seen: set[int] = set()
    is_cause = True
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = re.search(r"\(os error (\d+)\)", str(error))
        found = OSError(int(number[1]), os.strerror(int(number[1]))) if number else error
        if isinstance(found, OSError) and found.errno is not None and (is_cause or found.errno in OF_THE_DISK):
            return found
        is_cause = is_cause and error.__cause__ is not None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def goes_on_with(error: BaseException, command: str) -> None:
    """Note with an error that ends a command which other command goes on from there."""
    error.goes_on = command  # type: ignore[attr-defined]


def is_of_the_disk(error: BaseException) -> bool:
    """Whether the disk is full or broken: nothing that is written to it can be relied on to arrive."""
    found = disk_error(error)
    return found is not None and found.errno in OF_THE_DISK


def is_bad_input(error: BaseException) -> bool:
    """Whether our own code has refused a value: a `ValueError` of other packages is a bug of ours."""
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(Path(frames[-1].filename).resolve().is_relative_to(folder) for folder in OURS)


def where(error: BaseException) -> str:
    """`file:line` of the innermost place in our own code, or of the innermost one at all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(folder) for folder in OURS)]
    if not frames:
        return "unknown place"
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    return f"{path.relative_to(OURS[0].parent) if own else path.name}:{frame.lineno}"


def in_words(error: BaseException) -> str:
    """An error as one line: its type, and what it says."""
    text = one_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(text: str) -> str:
    """`text` on one line, safe to print, without its middle where it is longer than a screen."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
    if text.isprintable():
        return text
    from attnres.text import printable  # with all of attnres: not for every message

    return printable(text)
