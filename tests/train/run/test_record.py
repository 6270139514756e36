"""`metrics.csv` is what was logged: one that was altered is not gone on with, nor shown."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from attnres.files import read_manifest
from probe.files.runs import training_curves
from tests.train.cli.test_fit import TINY, fit
from train.cli import main

pytestmark = pytest.mark.usefixtures("quiet_wandb")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return fit(tmp_path_factory.mktemp("record") / "run", "--trainer.max_steps=4")


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def go_on(run) -> None:
    main(["fit", f"--run_dir={run}", "--ckpt_path=last", *TINY, "--trainer.max_steps=6"])


def alter(run, step: int) -> None:
    table = pd.read_csv(run / "metrics.csv", dtype=str)
    row = table.index[(table["step"] == str(step)) & table["train/loss"].notna()][0]
    table.loc[row, "train/loss"] = "0.5"
    table.to_csv(run / "metrics.csv", index=False)


def test_an_altered_row_is_not_gone_on_with(run, capfd):
    alter(run, 1)
    before = pd.read_csv(run / "metrics.csv", dtype=str)
    with pytest.raises(SystemExit) as end:
        go_on(run)
    assert end.value.code == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "metrics.csv is not what was logged before step 4" in said
    assert "restore it, or remove it to go on without its rows" in said
    pd.testing.assert_frame_equal(pd.read_csv(run / "metrics.csv", dtype=str), before)
    (run / "metrics.csv").unlink()
    go_on(run)
    assert set(pd.read_csv(run / "metrics.csv")["step"]) == {4, 5}


def test_columns_may_come_and_rows_after_the_checkpoint_do_not_count(run):
    table = pd.read_csv(run / "metrics.csv", dtype=str)
    table["zero"] = None  # columns are in alphabetical order
    later = table.iloc[[-1]].assign(step="4", zero="0")
    pd.concat([table, later]).to_csv(run / "metrics.csv", index=False)
    go_on(run)
    rows = pd.read_csv(run / "metrics.csv").dropna(subset="train/loss")
    assert list(rows["step"]) == [0, 1, 2, 3, 4, 5]
    assert "metrics.csv" in read_manifest(run)
    assert training_curves(run) is not None


def test_a_finished_run_that_is_given_again_stays_as_it_is(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    main(["fit", f"--run_dir={run}", "--ckpt_path=last", *TINY, "--trainer.max_steps=4"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_altered_row_of_a_finished_run_is_not_shown(run):
    alter(run, 1)
    with pytest.raises(ValueError, match=r"metrics\.csv is not what was written"):
        training_curves(run)
