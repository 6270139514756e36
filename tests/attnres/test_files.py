"""Files appear whole or not at all."""

from __future__ import annotations

import os

import pytest

from attnres.files import replacing


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_replaced_when_it_is_whole(shared, tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")
    with replacing(path, shared) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.parent == tmp_path
        assert (str(os.getpid()) in part.name) == shared
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_all_is_as_it_was(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")

    with pytest.raises(KeyboardInterrupt), replacing(path) as part:  # noqa: PT012
        part.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"
