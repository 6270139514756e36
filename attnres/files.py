"""Files that are written whole or not at all, and are read only if they are what was written.

A folder of artefacts has a `manifest.json`: {file name: {"sha256": [digest]}}. A new digest joins the old one before
the file is replaced, and the old one goes after it: whenever a process is killed, the file is one of those listed. This
is against accidents, not forgery. A file that no manifest lists, of another program or an older version, is read as it
is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from attnres.inputs import parse_json

MANIFEST = "manifest.json"


@contextmanager
def replacing(path: Path, shared: bool = False, recorded: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` at the end.

    After an error `path` is unchanged and the temporary file is gone. A killed process leaves `NAME.part`, which the
    next one overwrites.

    Args:
        shared: whether other processes may write this file at the same time. If so, the temporary name holds the
            process id.
        recorded: whether the manifest beside it is to list the file. One process at a time may write a folder's.

    Raises:
        ValueError: `path` is there and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}: it cannot be replaced")
    part = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        yield part
        if recorded:
            with recording(path.parent, {path.name: digest(part, anew=True)}):
                os.replace(part, path)
        else:
            os.replace(part, path)
    except BaseException as error:
        error.add_note(str(path))  # the system does not say which file it could not write
        part.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which replaces `path` at the end, with a manifest of its files.

    After an error `path` is unchanged. A killed process leaves `NAME.part`, and perhaps, where it replaced a folder,
    `NAME.replaced.part`, which the next one removes.
    """
    part, replaced = (path.with_name(f"{path.name}{end}") for end in (".part", ".replaced.part"))
    _remove(part, replaced)
    part.mkdir(parents=True)
    try:
        yield part
        files = sorted(file for file in part.iterdir() if file.name != MANIFEST)
        _write_manifest(part, {file.name: [digest(file, anew=True)] for file in files})
        if path.exists():
            path.rename(replaced)
        part.rename(path)
    except BaseException as error:
        error.add_note(str(path))
        _remove(part)
        raise
    _remove(replaced)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def recording(folder: Path, digests: Mapping[str, str], durable: bool = False) -> Iterator[None]:
    """Files of `folder` get these digests inside. One process at a time may do so.

    Args:
        durable: whether the manifest is to outlive a loss of power.
    """
    before = read_manifest(folder)
    both = dict(before)
    for name, new in digests.items():
        is_new = not (folder / name).exists()
        old = [] if is_new else before.get(name) or [digest(folder / name)]
        both[name] = list(dict.fromkeys([*old, new]))
    if both != before:
        _write_manifest(folder, both, durable)
    yield
    after = both | {name: [new] for name, new in digests.items()}
    if after != both:
        _write_manifest(folder, after, durable)


def remove(path: Path) -> None:
    """Remove a file, if it is there, that a manifest may list."""
    forget(path)
    path.unlink(missing_ok=True)


def forget(path: Path) -> None:
    """Take a file out of the manifest beside it: it is going to change."""
    before = read_manifest(path.parent)
    if path.name in before:
        _write_manifest(path.parent, {name: digests for name, digests in before.items() if name != path.name})


def read_manifest(folder: Path) -> dict[str, list[str]]:
    """[file name] -> its digests, of which one holds; empty where there is no manifest.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path) from error
    try:
        found = {name: [str(digest) for digest in entry["sha256"]] for name, entry in parse_json(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path) from error
    if any(name != Path(name).name for name in found):
        raise _unreadable(path)
    return found


def _unreadable(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not a readable manifest: restore it, or remove it and the files beside it are read unchecked"
    )


def _write_manifest(folder: Path, files: Mapping[str, list[str]], durable: bool = False) -> None:
    content = {name: {"sha256": digests} for name, digests in files.items()}
    with replacing(folder / MANIFEST) as part, part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1) + "\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def checked(path: Path) -> Path:
    """`path`, if it is what was written, or no manifest lists it, or it is not there.

    Raises:
        ValueError: it is something else.
    """
    listed = None
    while (now := read_manifest(path.parent).get(path.name)) != listed:  # a writer may come between
        listed = now
        if listed is None or not path.is_file() or digest(path) in listed:
            return path
    if listed is None:
        return path
    raise ValueError(f"{path} is not what was written ({MANIFEST} has another SHA-256): restore it, or make it anew")


def checked_folder(folder: Path) -> Path:
    """`folder`, if each of the files that its manifest lists is there and is what was written.

    Raises:
        ValueError: one is not.
    """
    for name in read_manifest(folder):
        if not checked(folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, {MANIFEST} lists it: restore it, or make the folder anew")
    return folder


def digest(path: Path, anew: bool = False) -> str:
    """SHA-256 of a file.

    Args:
        anew: read the file, even if this process has read it before and its size and time are the same.
    """
    status = path.stat()
    identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if anew or identity not in _digests:
        with path.open("rb") as file:
            _digests[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[identity]


_digests: dict[tuple[int, ...], str] = {}


__all__ = [
    "MANIFEST",
    "checked",
    "checked_folder",
    "digest",
    "forget",
    "read_manifest",
    "recording",
    "remove",
    "replacing",
    "replacing_folder",
]
