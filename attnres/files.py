"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` at the end.

    After an error `path` is unchanged and the temporary file is gone. A killed process leaves `NAME.part`, which the
    next one overwrites.

    Args:
        shared: whether other processes may write this file at the same time. If so, the temporary name holds the
            process id.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


__all__ = ["replacing"]
