"""What the Weights & Biases files of a run directory hold: the run's id, and the metrics that have been logged.

W&B writes all it is given to `wandb/[offline-]run-<time>-<id>/run-<id>.wandb`, one file each time a run is started or
resumed, offline and online. Its own reader is no longer part of the Python package.
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
IDENTITY, BLOCK, CHUNK_HEADER = b":W&B", 2**15, struct.Struct("<IHB")
WHOLE, LAST_CHUNK = 1, 4
QUIET_SECONDS = 1.0
"""A file that has not changed for so long has nobody who writes it."""


def run_id(run_dir: Path) -> str | None:
    """The id of the newest W&B run in `run_dir`, `None` where there is none."""
    files = _files(run_dir)
    return files[-1].stem.removeprefix("run-") if files else None


def history(run_dir: Path, of_run: str) -> list[dict[str, Any]]:
    """The rows of metrics that the files of the W&B run `of_run` hold, by name, W&B's own (`_step`, ...) among them.

    Of images and tables, which are several values of one name, there is the last one.
    """
    rows = []
    for path in _files(run_dir):
        if path.stem == f"run-{of_run}":
            logged = [record.history for record in records(path) if record.HasField("history")]
            rows += [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in row.item} for row in logged]
    return rows


def mend_files(run_dir: Path) -> None:
    """Cut off records that were not written whole because W&B was killed: `wandb sync` goes no further than these.

    A file of which nothing is left is removed with its folder. W&B's process outlives a killed training for a moment
    and may still be writing: it is waited for.
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
    """The whole records of a file, each with the position of its end, up to the first that is not whole.

    The file is a LevelDB log: blocks of 32 KiB hold chunks of checksum (4 bytes), length (2), type (1) and data; types
    2, 3 and 4 are the first, middle and last chunk of a record, 1 is a whole one.
    """
    content, parts = path.read_bytes(), b""
    if content[:4] != IDENTITY:
        return
    position = 7
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


__all__ = ["STEP", "history", "mend_files", "records", "run_id"]
