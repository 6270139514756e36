"""What users hand over, bounded before work starts: numbers, files, and the memory that they would take."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

LARGEST_INTEGER = 2**63 - 1
"""What NumPy, PyTorch and a table's column of integers all take, as a seed or a count."""
JSON_BYTES = 2**26
"""Most of a JSON or YAML file of settings."""
MOST_VALUES = 100_000
"""Of a YAML file."""


def check_number(name: str, value: float, least: float, most: float, why: str = "") -> None:
    """Raise a ValueError if `value` is not between `least` and `most` (NaN never is)."""
    if value < least:
        raise ValueError(f"{name} must be at least {least:,}, got {value}")
    if not value <= most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}{why and f': {why}'}")


def read_file(path: Path, most: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ValueError: it cannot be read, is larger, or is a folder, a pipe or a device, which might never end.
    """
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            what = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
            raise ValueError(f"{path} is {what}: expected a regular file")
        if about.st_size > most:
            raise ValueError(f"{path} has {in_bytes(about.st_size)}, at most {in_bytes(most)} are read")
        with open(path, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if len(content) > most:  # of files that tell no size, as in /proc, or grow
        raise ValueError(f"{path} has more than {in_bytes(most)}, which is all that is read")
    return content


def parse_json(text: str | bytes) -> Any:
    """What JSON `text` holds. Raises ValueError, also for a key that is there twice and for too deep a nesting."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, plain values alone.

    Raises:
        ValueError: the file cannot be read, or is no YAML, or is nested too deeply, or its aliases stand for themselves
            or for more values than `MOST_VALUES`.
    """
    content = read_file(path)
    try:
        value = yaml.safe_load(content.decode("utf-8"))
        if _count(value, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
    except RecursionError as error:
        raise ValueError(f"'{path}' is not YAML: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not a text file in UTF-8; give a YAML file") from error
    except Exception as error:  # a YAMLError; or, of a date, a number or a tag, what its constructor raises
        raise ValueError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from error
    return value


def _count(value: Any, known: dict[int, int | None]) -> int:
    """How many values there are in `value`, those that an alias stands for each time."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = None
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    if (count := known[id(value)]) is None:
        raise ValueError("an alias stands for what it is in")
    return count


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if repeated := first_repeated(key for key, _ in pairs):
        raise ValueError(f"the key {repeated!r} is there twice")
    return dict(pairs)


def first_repeated(names: Iterable[str]) -> str | None:
    """The first of `names` that was there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)


def check_memory(what: str, needed: float, hint: str) -> None:
    """Raise a ValueError if `needed` bytes, the least that `what` takes, are more than this machine's memory."""
    if needed > (held := memory_bytes()):
        raise ValueError(
            f"{what} would take {in_bytes(needed)} of memory or more, this machine has {in_bytes(held)}: {hint}"
        )


def memory_bytes() -> int:
    """This machine's memory, or its control group's where that is less."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return held
    return min(held, int(limit)) if limit.isdigit() else held


def in_bytes(count: float) -> str:
    """A number of bytes for people, as in "1.5 GiB"."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while count >= 1000 and len(units) > 1:
        count /= 1024
        del units[0]
    unit = units[0]
    return f"{count:,.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:.1f} {unit}"


__all__ = [
    "JSON_BYTES",
    "LARGEST_INTEGER",
    "check_memory",
    "check_number",
    "first_repeated",
    "in_bytes",
    "memory_bytes",
    "parse_json",
    "read_file",
    "read_yaml",
]
