"""Locks keep other processes out, and end with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from probe.files.locks import held


def test_one_at_a_time_for_each_folder_and_role(tmp_path):
    folder = tmp_path / "new" / "run"
    with held(folder, "train"):
        with pytest.raises(ValueError, match=rf"another process trains in {folder}: wait"), held(folder, "train"):
            pass
        with held(folder, "probe"), held(tmp_path, "train"):
            pass
    with held(folder, "train"):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys; from pathlib import Path; from probe.files.locks import held\n" + (
        "with held(Path(sys.argv[1]), 'train'): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process trains"), held(tmp_path, "train"):
            pass
        other.kill()
        other.wait()
    with held(tmp_path, "train"):
        pass
