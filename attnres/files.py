"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """The path to write to, beside `path`, of which it takes the place in the end.

    After an error `path` is as it was and what was written is gone; a process that is killed leaves `NAME.part`, which
    the next to write takes for its own.

    Args:
        shared: other processes may write this file at the same time; then the name holds the process's number.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


__all__ = ["replacing"]
