"""Files appear whole or not at all, and are read only as they were written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from attnres import files
from attnres.files import (
    MANIFEST,
    checked,
    checked_folder,
    digest,
    read_manifest,
    remove,
    replacing,
    replacing_folder,
)


class KilledError(BaseException):
    """Takes the place of SIGKILL."""


def write(path: Path, text: str, recorded: bool = True) -> None:
    with replacing(path, recorded=recorded) as part:
        part.write_text(text)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_file_is_replaced_when_it_is_whole(shared, recorded, tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with replacing(path, shared, recorded) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
        assert (str(os.getpid()) in part.name) == shared
    assert path.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == sorted([path, *([tmp_path / MANIFEST] if recorded else [])])


@pytest.mark.parametrize("recorded", [False, True])
def test_after_an_error_all_is_as_it_was(recorded, tmp_path):
    path = tmp_path / "table.json"
    write(path, "old", recorded)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(KeyboardInterrupt), replacing(path, recorded=recorded) as part:  # noqa: PT012
        part.write_text("ne")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path, recorded=recorded):
        pass  # nothing was written
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_not_replaced(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(ValueError, match=rf"{path} is .*: it cannot be replaced"), replacing(path) as part:
        part.write_text("x")
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_altered_is_refused(tmp_path):
    path, foreign = tmp_path / "table", tmp_path / "foreign"
    foreign.write_text("anything")
    for text in ("one", "two"):
        write(path, text)
        assert checked(path).read_text() == text
    assert read_manifest(tmp_path) == {"table": [digest(path)]}
    path.write_text("owt")
    with pytest.raises(ValueError, match=rf"{path} is not what was written .*: restore it"):
        checked(path)
    with pytest.raises(ValueError, match="not what was written"):
        checked_folder(tmp_path)
    path.write_text("two")
    assert checked_folder(tmp_path) == tmp_path
    assert checked(foreign) == foreign
    path.unlink()
    assert checked(path) == path  # the reader says that it is not there
    with pytest.raises(ValueError, match=rf"{path} is missing"):
        checked_folder(tmp_path)
    remove(path)
    assert checked_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": {}}', '{"../a": {"sha256": []}}', '{"a": {"sha256": 1}}', "\udcff"]
)
def test_a_manifest_that_cannot_be_read_is_named(text, tmp_path):
    path = tmp_path / MANIFEST
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"{path} is not a readable manifest: restore it, or remove it"):
        checked(tmp_path / "a")


@pytest.mark.parametrize("listed", [True, False])
def test_a_kill_at_any_moment_leaves_no_false_alarm(listed, tmp_path, monkeypatch):
    """Every rename is the last thing that happens, once; then the next writer goes on, killed at the one after."""
    path, replace = tmp_path / "table", os.replace
    write(path, "0", recorded=listed)
    texts = {"0"}
    for number in range(1, 7):

        def killed(part, target, *, left=[number % 3]):  # noqa: B006 (counts down)
            if not left[0]:
                raise KilledError
            left[0] -= 1
            replace(part, target)

        texts.add(str(number))
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", killed)
            with pytest.raises(KilledError):
                write(path, str(number))
        assert checked_folder(tmp_path) == tmp_path
        assert path.read_text() in texts
    write(path, "end")
    assert read_manifest(tmp_path) == {"table": [digest(path)]}


def test_a_reader_beside_a_writer_gets_no_false_alarm(tmp_path, monkeypatch):
    """The manifest is read, then the file is replaced, then its digest is taken."""
    path, read = tmp_path / "table", files.read_manifest
    write(path, "old")
    writes = iter(["new", "newer"])

    def then_replaced(folder):
        listed = read(folder)
        if (text := next(writes, None)) is not None:
            with monkeypatch.context() as patch:
                patch.setattr(files, "read_manifest", read)
                write(path, text)
        return listed

    monkeypatch.setattr(files, "read_manifest", then_replaced)
    assert checked(path).read_text() == "newer"


def test_a_folder_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "hf"
    for number in range(2):
        with replacing_folder(path) as part:
            (part / f"{number}.json").write_text(json.dumps(number))
            assert path.exists() == bool(number)
        assert {file.name for file in checked_folder(path).iterdir()} == {f"{number}.json", MANIFEST}
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt), replacing_folder(path) as part:  # noqa: PT012
        (part / "2.json").write_text("2")
        raise KeyboardInterrupt
    assert {file.name for file in path.iterdir()} == {"1.json", MANIFEST}
    assert list(tmp_path.iterdir()) == [path]
