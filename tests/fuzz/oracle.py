"""What must hold of every command and reader, whatever it is given.

It ends within a bounded time: with what it was asked for, or with one line and a documented status. No traceback, no
warning, no "internal error", and no file but its own is touched.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import Any

from probe.command_line import run_program

SECONDS = 60.0
"""Far above what any input takes, on a busy machine."""
LONGEST = 1500
"""Characters of a line for people."""
BAD_INPUT = 2
MEMORY = 2**33
"""Bytes of address space that an input may ask for: one that asks for more has not been bounded."""


class Reached(BaseException):
    """Everything was checked, and the work would begin. No `Exception`, so that nothing takes it for a failure."""

    def __init__(self, *found: Any) -> None:
        super().__init__(*found)
        self.found = found


class Hangs(BaseException):
    """It did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """How a call has ended.

    Attributes:
        status: 0 if it was accepted.
        line: what it said on standard error.
        found: what the work would have begun with, or what was returned.
    """

    status: int
    line: str
    found: tuple[Any, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.status == 0


def outcome(call: Callable[[], Any], statuses: tuple[int, ...] = (BAD_INPUT,), is_bug: bool = False) -> Outcome:
    """How `call` ends, which runs a command's `main`. Fails the test unless it is as the head of this file says.

    Args:
        statuses: with which it may refuse.
        is_bug: whether it ends by a bug that the test has put there.
    """
    out, err, found = StringIO(), StringIO(), ()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with bounded(), memory_of(MEMORY):
                returned = call()
            status, found = int(returned) if type(returned) is int else 0, (returned,)
        except Reached as reached:
            status, found = 0, reached.found
        except SystemExit as end:
            status = int(end.code or 0)
        except Hangs:
            raise AssertionError(f"no answer within {SECONDS:g} s; said so far: {err.getvalue()[-500:]!r}") from None
    said = err.getvalue()
    assert "Traceback" not in said, said
    if status == 0 or (found and status in statuses):  # `verify` says on standard output what does not hold
        return Outcome(status, said, found)
    assert status in statuses, f"exit status {status}: {said}"
    lines = said.splitlines()
    if status != BAD_INPUT:
        lines = lines[-1:]  # it had begun
    assert len(lines) == 1, f"{len(lines)} lines: {said[:2000]}"
    assert lines[0].isprintable(), f"not printable: {lines[0]!r}"
    assert ("internal error" in said) == is_bug, said
    assert len(said) <= LONGEST, f"{len(said)} characters: {said[:300]} … {said[-300:]}"
    return Outcome(status, lines[0])


def reading(call: Callable[[], Any]) -> Callable[[], Any]:
    """A reader of files as it is in a command: what it raises ends the command."""

    def command(_: list[str]) -> int:
        raise Reached(call())

    return lambda: run_program("attnres-probe", "", {"read": ("", command)}, ["read"])


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Raises `Hangs` inside if it takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_of(bytes_more: int) -> Iterator[None]:
    """Inside, this process has no more than so much memory beside what it has."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def untouched(*folders: Path, but: Path | None = None) -> Iterator[None]:
    """Fails the test if a file in `folders`, `but` for one, is changed, removed or added. Locks are empty."""
    before = state(folders, but)
    yield
    after = state(folders, but)
    changed = sorted(str(path) for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert not changed, f"files were touched: {', '.join(changed[:5])}"


def state(folders: tuple[Path, ...], but: Path | None = None) -> dict[Path, tuple[int, ...]]:
    found = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        if path.suffix == ".lock" or path.is_dir() or (but is not None and path.is_relative_to(but)):
            continue
        about = path.lstat()
        found[path] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def keeps_its_word(accepted: bool, right: bool, what: Any) -> None:
    """Fails the test if something was accepted that is not right, or refused though it is."""
    shown = repr(what)[:1000]
    assert not (accepted and not right), f"accepted, and is not right: {shown}"
    assert not (right and not accepted), f"refused, and is right: {shown}"


__all__ = ["Hangs", "Outcome", "Reached", "bounded", "keeps_its_word", "outcome", "reading", "untouched"]
