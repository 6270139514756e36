"""Locks of run directories and folders of results: who writes into one writes alone, and readers need none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from probe.files.layout import lock_file

ROLES = {
    "train": "trains in",
    "probe": "probes in",
    "probing": "probes or prunes",
    "export": "exports from",
    "report": "reports on",
    "writing": "writes the tables of",
}
"""What a process does that holds the lock."""


@contextmanager
def held(folder: Path, role: str, waits: bool = False) -> Iterator[None]:
    """Be the only process that has the `role`, one of `ROLES`, in `folder`, which is made if it is not there.

    The lock ends with the process, however that ends; its file, which is empty, stays.

    Args:
        waits: until no other process has it.

    Raises:
        ValueError: another process has it, and this one does not wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(folder, role))
    try:
        lock.acquire(timeout=-1 if waits else 0)
    except Timeout:
        raise ValueError(f"another process {ROLES[role]} {folder}: wait until it is done") from None
    try:
        yield
    finally:
        lock.release()
