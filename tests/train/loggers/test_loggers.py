"""Loggers of a run, read back: every number of every probe once, at its step, after a kill too; and which there are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.probe_rows import expected_rows
from tests.support.wandb_server import HISTORY, Run, synced_run
from tests.train.cli.test_fit import fit
from train.cli import main
from train.loggers import wandb_files
from train.loggers.build import build_loggers

pytestmark = pytest.mark.usefixtures("quiet_wandb")
STEP = "trainer/global_step"
PROBED = ["--probe.enabled=true", "--probe.log_spaced=false", "--probe.accuracy_jump=0", "--probe.num_resamples=20"]
PROBED += ["--model.warmup_steps=9", "--data.curriculum.kind=off"]
BOTH = "--trainer.logger=[TensorBoardLogger,CSVLogger]"
ALL = "--trainer.logger=[WandbLogger,TensorBoardLogger,CSVLogger]"


def once(rows: Iterable[tuple[int, str, Any]]) -> dict[tuple[int, str], Any]:
    """(step, name) -> value, each of them once."""
    found: dict[tuple[int, str], Any] = {}
    for step, name, value in rows:
        assert (step, name) not in found, (step, name)
        found[step, name] = value
    return found


def of(found: dict[tuple[int, str], Any], *prefixes: str) -> dict[tuple[int, str], float]:
    """The numbers whose names begin so."""
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {key: value for key, value in numbers.items() if key[1].startswith(prefixes)}


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def tensorboard_rows(folder: Path) -> dict[tuple[int, str], Any]:
    log = events(folder)
    return once((event.step, name, event.value) for name in log.Tags()["scalars"] for event in log.Scalars(name))


def csv_rows(path: Path) -> dict[tuple[int, str], Any]:
    long = pd.read_csv(path).drop(columns="epoch", errors="ignore").melt(id_vars="step").dropna()
    return once((int(row.step), str(row.variable), row.value) for row in long.itertuples())


def history(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.files[HISTORY]]


def wandb_rows(run: Run) -> dict[tuple[int, str], Any]:
    """Tables are left out: a training that is killed after its end and resumed logs them anew."""
    names = ("train/", "val/", "probe/", "probe_mass/", "probe_strength", "probe_harm", "probe_integrated")
    return once((r[STEP], name, r[name]) for r in history(run) if STEP in r for name in r if name.startswith(names))


def interrupted(run_dir: Path, *options: str) -> Path:
    """A run whose last checkpoint is of step 2, and which has got to step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        return fit(run_dir, *PROBED, *options, "--probe.every_n_steps=1", "--trainer.max_steps=3")


def go_on(run_dir: Path, *options: str) -> Path:
    main(["fit", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=5", *options])
    return run_dir


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> tuple[Path, Run]:
    """A run with all loggers that was killed and went on: W&B had written the half, TensorBoard up to a torn record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run_dir = interrupted(tmp_path_factory.mktemp("runs") / "run", ALL, "--probe.mode=both")
        wandb.teardown()
        (file,) = (path for path in run_dir.glob(wandb_files.FILES) if not path.parent.is_symlink())
        (log,) = (run_dir / "tensorboard").glob("events*")
        os.truncate(file, file.stat().st_size // 2)
        os.truncate(log, log.stat().st_size - 20)
        return go_on(run_dir), synced_run(run_dir)


def test_a_killed_run_has_every_row_once_in_every_logger(resumed):
    run_dir, run = resumed
    probes, training = expected_rows(run_dir), of(csv_rows(run_dir / "metrics.csv"), "train/", "val/")
    assert {step for step, name in probes if name.startswith("probe_integrated_harm/")} == set(range(6))
    assert {step for step, name in probes if name.startswith("probe_harm/")} == set(range(6))
    assert {step for step, name in training if name == "train/loss"} == set(range(5))
    assert of(csv_rows(run_dir / "probes.csv"), "") == pytest.approx(probes)
    for found in (wandb_rows(run), tensorboard_rows(run_dir / "tensorboard")):
        assert of(found, "probe") == pytest.approx(probes, rel=1e-6)  # float32 in TensorBoard
        assert of(found, "train/", "val/") == pytest.approx(training, rel=1e-6)


def test_a_killed_run_has_every_image_once_and_the_tables_of_all_steps(resumed):
    run_dir, run = resumed
    log, rows = events(run_dir / "tensorboard"), pd.read_parquet(run_dir / "probe/effects.parquet")
    assert [image.step for image in log.Images("probe/heat_maps")] == [*range(6)]
    assert sorted(step for step, name in wandb_rows(run) if name == "probe/heat_maps") == [*range(6)]
    *_, row = (row for row in history(run) if "probe_table/effects" in row)
    table = json.loads(run.uploads[row["probe_table/effects"]["path"]])
    steps = pd.DataFrame(table["data"], columns=table["columns"])["step"]
    assert list(steps.value_counts().sort_index()) == list(rows["step"].value_counts().sort_index())
    names = ("config", "provenance", "probe/summary", "probe_table/effects")
    config, record, summary, text = (log.Tensors(f"{n}/text_summary")[-1].tensor_proto.string_val[0] for n in names)
    assert b"hidden_size: 16" in config
    assert b"sources_sha256" in record
    assert b"final/accuracy" in summary
    assert text.count(b"\n") == 1 + (rows["step"] == 5).sum()  # as text, those of the last probe


def test_a_run_that_goes_on_with_another_logger_tells_it_all(tmp_path):
    run_dir = interrupted(tmp_path / "run")  # with metrics.csv alone: W&B is disabled
    assert not {path.name for path in run_dir.iterdir()} & {"tensorboard", "probes.csv", "wandb"}
    go_on(run_dir, BOTH)
    expected, found = expected_rows(run_dir), tensorboard_rows(run_dir / "tensorboard")
    assert of(found, "probe") == pytest.approx(expected, rel=1e-6)
    assert {step for step, name in found if name == "train/loss"} == set(range(5))
    assert of(csv_rows(run_dir / "probes.csv"), "") == pytest.approx(expected)


class Listener(Logger):
    """A logger that does not know what it has been told."""

    name, version = "listener", ""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.told += [(step, name) for name in metrics if name.startswith("probe")]

    def log_hyperparams(self, *args, **kwargs) -> None: ...


def test_a_step_that_is_probed_to_integrated_and_then_whole_has_both_once(tmp_path, monkeypatch):
    """Training is stopped at a step that has been probed. W&B is not started, as it is not among the loggers."""
    listener = Listener()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("train.cli.fit.build_loggers", lambda *args: [*build_loggers(*args), listener])
    stop = ["monitor=val/accuracy", "mode=max", "stopping_threshold=-1"]  # at the first validation
    options = ["--trainer.callbacks+=EarlyStopping", *(f"--trainer.callbacks.{option}" for option in stop)]
    options += ["--probe.mode=integrated", "--probe.every_n_steps=1"]
    run_dir = fit(tmp_path / "run", *PROBED, BOTH, *options)
    assert not (run_dir / "wandb").exists()
    expected = expected_rows(run_dir)
    assert {step for step, name in expected if name.startswith("probe_harm/")} == {2}
    assert {step for step, name in expected if name.startswith("probe_integrated_harm/")} == {0, 1, 2}
    for found in (csv_rows(run_dir / "probes.csv"), of(tensorboard_rows(run_dir / "tensorboard"), "probe")):
        # Tables of estimates alone have no row of accuracy.
        assert set(found) - set(expected) == {(0, "probe/accuracy"), (1, "probe/accuracy")}
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
        assert sorted(listener.told) == sorted(found)


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        ("TensorBoardLogger", {"metrics.csv", "tensorboard"}),
        ("CSVLogger", {"metrics.csv", "probes.csv"}),
        ("WandbLogger", {"metrics.csv"}),  # W&B is disabled
        ("lightning.pytorch.loggers.TensorBoardLogger", {"metrics.csv"}),
        ("false", set()),
    ],
)
def test_each_choice_has_its_files(choice, files, tmp_path):
    options, elsewhere = [f"--trainer.logger={choice}"], "." in choice
    options += [f"--trainer.logger.save_dir={tmp_path / 'logs'}"] * elsewhere
    run_dir = fit(tmp_path / "mine", *options, *PROBED, "--probe.every_n_steps=0", "--trainer.max_steps=1")
    always = {"config.yaml", "provenance.json", "checkpoints", "hf", "probe", "train.lock", "manifest.json"}
    assert {path.name for path in run_dir.iterdir()} == always | files
    if elsewhere:
        found = of(tensorboard_rows(tmp_path / "logs/mine"), "probe")
        assert found == pytest.approx(expected_rows(run_dir), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["WandbLogger", "log_model=true"], "trainer.logger WandbLogger does not take log_model here; it takes name, "),
        (["TensorBoardLogger", "save_dir=x", "log_graph=true"], "TensorBoardLogger does not take log_graph here"),
        (["CSVLogger", "save_dir=x"], "CSVLogger does not take save_dir here; it takes no options"),
        (["TensorBoardLogger"], "pip install 'attnres[tensorboard]'"),
        (["TensorBoardLogger", "save_dir=x"], "pip install 'attnres[tensorboard]'"),
    ],
)
def test_what_a_logger_cannot_do_is_refused_in_a_line(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.loggers.tensorboard._TENSORBOARD_AVAILABLE", "log_graph" in line)
    given = [f"--trainer.logger={options[0]}", *(f"--trainer.logger.{option}" for option in options[1:])]
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", *given)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    assert line in shown
    assert not (tmp_path / "run").exists()
