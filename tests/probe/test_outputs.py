"""What commands write: nothing of others is replaced, one writes at a time, and a full disk loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest

from attnres import files
from probe.cli import main
from probe.files import tables as storage
from probe.files.locks import held
from tests.probe.test_cli import export

QUICK = ["--num_sequences", "8", "--num_resamples", "20", "--scopes", "[all,early]", "--positions", "[all]"]


@pytest.fixture(scope="module")
def probed(make_model, tmp_path_factory) -> Path:
    run = export(make_model(), tmp_path_factory.mktemp("outputs") / "run", "cumulative")
    main(["run", str(run), "--output", str(run / "probe" / "final"), *QUICK])
    (run / "metrics.csv").write_text("step,val/accuracy\n1,0.5\n")
    return run


@pytest.fixture
def run(probed, tmp_path) -> Path:
    return shutil.copytree(probed, tmp_path / "run")


def refused(arguments: list[str], capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TAKEN = ["metrics.csv", "hf/config.json", "hf/model.safetensors", "probe/final/effects.parquet"]


@pytest.mark.parametrize("name", [*TAKEN, "mine.html", "probe"])
def test_a_page_replaces_nothing_but_a_page(run, name, capsys):
    (run / "mine.html").write_text("<!DOCTYPE html><title>mine</title>")
    before = contents(run)
    error = refused(["report", str(run), "--page", str(run / name)], capsys)
    assert f"--page {run / name} " in error
    assert "nothing else is overwritten" in error
    assert contents(run) == before


def test_a_page_replaces_a_page(run, capsys):
    for page in ([], ["--page", str(run / "new" / "page.html")]):
        pages = [main(["report", str(run), *page]) for _ in range(2)]
        assert pages == [0, 0]
    assert (run / "report.html").read_bytes()[:100] == (run / "new" / "page.html").read_bytes()[:100]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_devices_and_pipes_are_not_written_to(run, command, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "null.json").symlink_to("/dev/null")
    option = {"report": ["report", str(run), "--page"], "compare": ["compare", str(run), str(run), "--output"]}
    for name in ("pipe.json", "null.json"):
        assert f"{tmp_path / name} exists" in refused([*option[command], str(tmp_path / name)], capsys)
        assert not (tmp_path / name).is_file()


@pytest.mark.parametrize("name", [*TAKEN, "probe/final/summary.json", "rows.json"])
def test_a_comparison_replaces_nothing(run, name, capsys):
    main(["compare", str(run), str(run), "--output", str(run / "rows.json"), "--num_resamples", "10"])
    if not name.endswith((".json", ".csv", ".parquet")):
        name = "metrics.csv"
    before = contents(run)
    error = refused(["compare", str(run), str(run), "--output", str(run / name)], capsys)
    assert f"--output {run / name} exists: choose another, nothing is overwritten" in error
    assert contents(run) == before


def test_outputs_that_cannot_be_made_are_refused_before_work(run, tmp_path, capsys):
    inside = tmp_path / "file"
    inside.write_text("")
    page, rows = str(inside / "x.html"), str(inside / "x.json")
    for arguments in (["report", str(run), "--page", page], ["compare", str(run), str(run), "--output", rows]):
        assert f"cannot be made: {inside} is not a folder that can be written to" in refused(arguments, capsys)


def test_one_probe_at_a_time_writes_into_a_folder(run, tmp_path, capsys):
    output = tmp_path / "new"
    command = ["run", str(run), "--output", str(output), *QUICK]
    with held(output, "probe"):
        assert f"another process probes in {output}: wait until it is done" in refused(command, capsys)
    main(command)
    assert storage.read_effects(output).shape == storage.read_effects(run / "probe" / "final").shape
    assert "exists and is not an empty folder" in refused(command, capsys)


@pytest.mark.parametrize("command", ["run", pytest.param("baseline", marks=pytest.mark.slow)])
def test_after_a_full_disk_the_same_command_goes_on(command, make_model, make_vanilla, tmp_path, monkeypatch, capsys):
    """The disk is full at the first write; then, for the command given again, at its second, and so on."""
    model = make_model() if command == "run" else make_vanilla()
    source = export(model, tmp_path / "source", "cumulative")
    options = [*QUICK, "--batch_size", "4", *(["--num_blocks", "2"] if command == "baseline" else [])]
    whole, output = tmp_path / "whole", tmp_path / "output"
    main([command, str(source), "--output", str(whole), *options])
    replace, stopped, room = os.replace, 0, 0

    def full(part, target):
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
        left -= 1
        replace(part, target)

    while True:
        left = room
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            try:
                main([command, str(source), "--output", str(output), *options])
                break
            except (OSError, SystemExit):
                stopped += 1
        room += 1
        assert stopped < 30
    assert stopped > 3
    results = [folder if command == "run" else folder / "probe" for folder in (whole, output)]
    for path in results[0].glob("*.parquet"):
        expected, found = (pd.read_parquet(folder / path.name) for folder in results)
        same = found.columns.difference(["run"])
        pd.testing.assert_frame_equal(expected[same], found[same])
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (whole, output)]
    assert names[0] == names[1]
    assert main(["verify", str(output)]) == 0
