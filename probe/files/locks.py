"""Locks of run directories and folders of results: who writes into one writes alone, and readers need none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from probe.files.layout import lock_file


@contextmanager
def held(folder: Path, role: str) -> Iterator[None]:
    """Be the only process that does `role` ("train", "probe", "report") in `folder`, which is made if it is not there.

    The lock ends with the process, however that ends; its file, which is empty, stays.

    Raises:
        ValueError: another process does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(lock_file(folder, role))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another process {role}s in {folder}: wait until it is done, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
