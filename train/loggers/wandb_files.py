"""Read and mend the `.wandb` files of a run directory. Nothing else in this project knows their format.

W&B writes all it is given to `wandb/[offline-]run-<time>-<id>/run-<id>.wandb`: a new file each time a run is started or
resumed, offline and online. The Python package has no reader of them any more. `pyproject.toml` holds wandb to the
versions that this file was tested with (0.31.0); `wandb sync` reads back what was mended in tests/train/loggers.

A file is a LevelDB log behind a header of 7 bytes (":W&B" first). Blocks of 32 KiB hold chunks: a checksum (4 bytes), a
length (2), a type (1), and data. A chunk of type 1 is a whole record; types 2, 3 and 4 are the first, middle and last
chunk of a record. What does not hold a chunk's header at a block's end is padding. A record is a protobuf `Record`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

FILES = "wandb/*run-*/run-*.wandb"
STEP = "trainer/global_step"
IDENTITY, HEADER_SIZE, BLOCK, CHUNK_HEADER = b":W&B", 7, 2**15, struct.Struct("<IHB")
WHOLE, LAST_CHUNK = 1, 4
QUIET_SECONDS = 1.0
"""Nobody writes a file that has not changed for so long."""


def run_id(run_dir: Path) -> str | None:
    """The id of the newest W&B run in `run_dir`, `None` where there is none."""
    files = _files(run_dir)
    return files[-1].stem.removeprefix("run-") if files else None


def history(run_dir: Path, of_run: str | None) -> list[dict[str, Any]]:
    """The rows of metrics in the files of the W&B run `of_run`, by name, with W&B's own (`_step`, ...).

    Images and tables have several values of one name; the last one is kept.
    """
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for path in _files(run_dir)
        if path.stem == f"run-{of_run}"
        for record in records(path)
        if record.HasField("history")
    ]


def mend_files(run_dir: Path) -> None:
    """Cut off what was not written whole because W&B was killed: `wandb sync` would stop there.

    A file of which nothing is left is removed with its folder. W&B's process may outlive a killed training and still be
    writing: wait for it.
    """
    _wait_until_quiet(_files(run_dir))
    for path in _files(run_dir):
        end = max((end for _, end in _records(path)), default=0)
        if end == 0:
            shutil.rmtree(path.parent, ignore_errors=True)  # W&B may still be about to end
        elif end < path.stat().st_size:
            os.truncate(path, end)


def records(path: Path) -> list[Record]:
    """The whole records of a `.wandb` file."""
    return [record for record, _ in _records(path)]


def _wait_until_quiet(files: list[Path]) -> None:
    last = max((path.stat().st_mtime for path in files), default=0.0)
    while 0 <= time.time() - last < QUIET_SECONDS:
        time.sleep(0.05)
        last = max(path.stat().st_mtime for path in files)


def _files(run_dir: Path) -> list[Path]:
    """The files in `run_dir` by the time at which they were begun."""
    folders = (path for path in run_dir.glob(FILES) if not path.parent.is_symlink())
    return sorted(folders, key=lambda path: path.parent.name.partition("run-")[2])


def _records(path: Path) -> Iterator[tuple[Record, int]]:
    """The records of a file up to the first that is not whole, each with the position of its end."""
    content, parts = path.read_bytes(), b""
    if content[:4] != IDENTITY:
        return
    position = HEADER_SIZE
    while position + CHUNK_HEADER.size <= len(content):
        if BLOCK - position % BLOCK < CHUNK_HEADER.size:  # no header fits: padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        if kind == 0:  # a hole, as after a loss of power
            return
        position += CHUNK_HEADER.size
        parts += content[position : position + length]
        position += length
        if position > len(content):
            return
        if kind in (WHOLE, LAST_CHUNK):
            try:
                yield Record.FromString(parts), position
            except DecodeError:
                return
            parts = b""
