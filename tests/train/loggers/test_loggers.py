"""TensorBoard and CSV in W&B's place, read back: every number of every probe once, at its step, after a kill too."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probe.report.heat_image import CELL_HEIGHT, CELL_WIDTH, HEAD, MARGIN, heat_image
from probe.training import publish
from tests.support.probe_rows import expected_rows
from tests.train.cli.test_fit import fit
from train.cli import main
from train.loggers.build import build_loggers

pytestmark = pytest.mark.usefixtures("quiet_wandb")
PROBED = ["--probe.enabled=true", "--probe.log_spaced=false", "--probe.accuracy_jump=0", "--probe.num_resamples=20"]
PROBED += ["--probe.max_probe_fraction=null"]
FAST = ["--model.warmup_steps=9", "--data.curriculum.kind=off", "--probe.every_n_steps=1"]
BOTH = ["--trainer.logger=[TensorBoardLogger,CSVLogger]"]


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value of a log, each of them once."""
    log, found = events(folder), {}
    for name in log.Tags()["scalars"]:
        for event in log.Scalars(name):
            assert (event.step, name) not in found, (event.step, name)
            found[event.step, name] = event.value
    return found


def of_probes(rows: dict[tuple[int, str], float]) -> dict[tuple[int, str], float]:
    return {(step, name): value for (step, name), value in rows.items() if name.startswith("probe")}


def csv_rows(path: Path) -> dict[tuple[int, str], float]:
    """(step, name) -> value, each of them once."""
    long = pd.read_csv(path).drop(columns="epoch", errors="ignore").melt(id_vars="step").dropna()
    assert not long.duplicated(["step", "variable"]).any()
    return {(int(row.step), str(row.variable)): row.value for row in long.itertuples()}


def interrupted(run_dir: Path, *options: str) -> Path:
    """A run whose last checkpoint is of step 2, and which has got to step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        return fit(run_dir, *PROBED, *FAST, *options, "--trainer.max_steps=3")


def go_on(run_dir: Path, *options: str) -> Path:
    main(["fit", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=5", *options])
    return run_dir


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run with both loggers that was killed and went on; its log ends in the middle of a record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")  # and not heeded: the loggers are named
        run_dir = interrupted(tmp_path_factory.mktemp("runs") / "run", *BOTH)
        (log,) = (run_dir / "tensorboard").glob("events*")
        os.truncate(log, log.stat().st_size - 20)
        return go_on(run_dir)


def test_tensorboard_has_every_row_of_every_probe_once(resumed):
    found, expected = of_probes(scalars(resumed / "tensorboard")), expected_rows(resumed)
    assert {step for step, _ in expected} == set(range(6))
    assert found == pytest.approx(expected, rel=1e-6)  # float32 there


def test_tensorboard_has_the_rows_of_training(resumed):
    found = scalars(resumed / "tensorboard")
    expected = {
        key: value for key, value in csv_rows(resumed / "metrics.csv").items() if key[1].startswith(("train/", "val/"))
    }
    assert {key for key in found if key[1].startswith(("train/", "val/"))} == set(expected)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_tensorboard_has_images_and_what_the_run_was_told(resumed):
    log = events(resumed / "tensorboard")
    assert [image.step for image in log.Images("probe/heat_maps")] == list(range(6))
    texts = {name: log.Tensors(f"{name}/text_summary") for name in ("config", "provenance", "probe/summary")}
    assert b"hidden_size: 16" in texts["config"][-1].tensor_proto.string_val[0]
    assert b"sources_sha256" in texts["provenance"][-1].tensor_proto.string_val[0]
    assert b"final/accuracy" in texts["probe/summary"][-1].tensor_proto.string_val[0]


def test_csv_has_every_row_of_every_probe_once(resumed):
    assert of_probes(csv_rows(resumed / "probes.csv")) == pytest.approx(expected_rows(resumed))
    assert not (resumed / "wandb").exists()


def test_a_run_that_goes_on_with_another_logger_tells_it_all(tmp_path):
    run_dir = interrupted(tmp_path / "run")  # with metrics.csv alone: W&B is disabled
    assert {path.name for path in run_dir.iterdir()} >= {"metrics.csv", "probe"}
    go_on(run_dir, *BOTH)
    expected = expected_rows(run_dir)
    found = scalars(run_dir / "tensorboard")
    assert of_probes(found) == pytest.approx(expected, rel=1e-6)
    assert {step for step, name in found if name == "train/loss"} == set(range(5))
    assert of_probes(csv_rows(run_dir / "probes.csv")) == pytest.approx(expected)


class Listener(Logger):
    """A logger that does not know what it has been told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str]] = []

    name, version = "listener", ""

    def log_metrics(self, metrics, step=None) -> None:
        self.told += [(step, name) for name in metrics if name.startswith("probe")]

    def log_hyperparams(self, *args, **kwargs) -> None: ...


def test_a_step_that_is_probed_to_first_order_and_then_whole_has_both_once(tmp_path, monkeypatch):
    """Training is stopped at a step that has been probed."""
    listener = Listener()
    monkeypatch.setattr("train.cli.fit.build_loggers", lambda *args: [*build_loggers(*args), listener])
    stop = ["monitor=val/accuracy", "mode=max", "stopping_threshold=-1"]  # at the first validation
    options = ["--trainer.callbacks+=EarlyStopping", *(f"--trainer.callbacks.{option}" for option in stop)]
    run_dir = fit(tmp_path / "run", *PROBED, *FAST, *BOTH, *options, "--probe.mode=first_order")
    expected = expected_rows(run_dir)
    assert {step for step, name in expected if name.startswith("probe_effect/")} == {2}
    assert {step for step, name in expected if name.startswith("probe_first_order/")} == {0, 1, 2}
    for found in (of_probes(csv_rows(run_dir / "probes.csv")), of_probes(scalars(run_dir / "tensorboard"))):
        # Tables of estimates alone have no row of accuracy.
        assert set(found) - set(expected) == {(0, "probe/accuracy"), (1, "probe/accuracy")}
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-6)
        assert sorted(listener.told) == sorted(found)


@pytest.mark.parametrize(
    ("choice", "files"),
    [
        (["TensorBoardLogger"], {"metrics.csv", "tensorboard"}),
        (["CSVLogger"], {"metrics.csv", "probes.csv"}),
        (["WandbLogger"], {"metrics.csv"}),  # W&B is disabled
        (["lightning.pytorch.loggers.TensorBoardLogger", "save_dir"], {"metrics.csv"}),
        (["false"], set()),
    ],
)
def test_each_choice_has_its_files(choice, files, tmp_path):
    options = [f"--trainer.logger={choice[0]}"]
    options += [f"--trainer.logger.save_dir={tmp_path / 'logs'}"] * (len(choice) > 1)
    run_dir = fit(tmp_path / "mine", *options, *PROBED, "--probe.every_n_steps=0", "--trainer.max_steps=1")
    always = {"config.yaml", "provenance.json", "checkpoints", "hf", "probe"}
    assert {path.name for path in run_dir.iterdir()} == always | files
    if len(choice) > 1:
        assert of_probes(scalars(tmp_path / "logs/mine")) == pytest.approx(expected_rows(run_dir), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["WandbLogger", "log_model=true"], "trainer.logger WandbLogger does not take log_model here; it takes name, "),
        (["TensorBoardLogger", "save_dir=x", "log_graph=true"], "TensorBoardLogger does not take log_graph here"),
        (["CSVLogger", "save_dir=x"], "CSVLogger does not take save_dir here; it takes no options"),
    ],
)
def test_options_that_would_not_be_heeded_are_refused(options, line, tmp_path, capsys):
    given = [f"--trainer.logger={options[0]}", *(f"--trainer.logger.{option}" for option in options[1:])]
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", *given)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown
    assert line in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--trainer.logger.save_dir=x"]])
def test_without_tensorboard_a_line_says_what_to_install(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", "--trainer.logger=TensorBoardLogger", *options)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip()
    assert shown.endswith("pip install 'attnres[tensorboard]'")
    assert "\n" not in shown


# What publish makes of a probe.

MOTIF = {"sublayer": "mlp", "scope": "early", "family": "embedding", "motif": "embedding -> early mlp"}
TIMES = {"onset": 90.0, "onset_low": 75.0, "onset_high": 110.0, "effect_half": 60.0, "mass_half": None}
SUMMARY = {
    "step": 4,
    "clean": {"accuracy": 0.5, "nll": 1.0, "task_learned": True},
    "dissociation": {
        "mlp": {
            **{"heaviest": "current", "most_harmful": "embedding", "dissociated": True},
            "p_heaviest_is_most_harmful": 0.01,
        }
    },
    "probe": {"fraction": 0.1},
    "emergence": {
        "accuracy_half": 100.0,
        "motifs": [
            {**MOTIF, **TIMES, "status": "emerged"},
            {**MOTIF, "scope": "late", "status": "transient", "onset": None, "effect_half": 30.0},
        ],
    },
}


def test_summary_fields():
    assert publish.summary_fields(SUMMARY) == {
        **{"final/accuracy": 0.5, "final/nll": 1.0, "final/task_learned": True},
        **{"dissociation/mlp/heaviest": "current", "dissociation/mlp/most_harmful": "embedding"},
        **{"dissociation/mlp/dissociated": True, "dissociation/mlp/p_heaviest_is_most_harmful": 0.01},
        **{"onset/mlp/early/embedding": 90.0, "onset_low/mlp/early/embedding": 75.0},
        **{"onset_high/mlp/early/embedding": 110.0, "effect_half/mlp/early/embedding": 60.0},
        **{"effect_half/mlp/late/embedding": 30.0, "accuracy_half": 100.0, "probe/fraction_of_training": 0.1},
    }
    little = {"step": 0, "clean": {"accuracy": 0.5, "nll": math.nan}, "dissociation": {}, "probe": {}}
    assert publish.summary_fields(little) == {"final/accuracy": 0.5}


def test_motifs_are_a_table_at_the_end(resumed, tmp_path, monkeypatch):
    told: dict = {}
    wandb_logger = WandbLogger(experiment=SimpleNamespace(summary=told))
    monkeypatch.setattr(WandbLogger, "log_table", lambda self, name, dataframe, step: told.update({name: dataframe}))
    board = TensorBoardLogger(tmp_path, "", "")
    monkeypatch.setattr(publish, "read_json", lambda _: SUMMARY)
    publish.log_summary([wandb_logger, board], resumed / "probe")
    board.finalize("success")
    assert told["onset/mlp/early/embedding"] == 90.0
    assert list(told["probe_table/motifs"]["status"]) == ["emerged", "transient"]
    assert set(told["probe_table/effects"]["metric"]) >= {"nll", "logit_diff"}
    assert set(told["probe_table/effects"]["step"]) == set(range(6))
    (text,) = events(tmp_path).Tensors("probe_table/effects/text_summary")[0].tensor_proto.string_val
    rows = pd.read_parquet(resumed / "probe/effects.parquet").query(f"step == {SUMMARY['step']}")
    assert text.decode().count("\n") == 1 + len(rows)  # as text, those of the last probe
    assert events(tmp_path).Tensors("probe_table/motifs/text_summary")[0].step == 4


def test_no_probe_no_summary(tmp_path):
    publish.log_summary([WandbLogger(experiment=SimpleNamespace())], tmp_path)


def effects(scopes: list[str], kind: str = "mask_renormalise") -> pd.DataFrame:
    """Attention reads: only `current` at the first scope does harm, only `older` cannot be masked."""
    families = ("embedding", "current", "prev_completed", "older")
    rows = [(scope, family) for scope in scopes for family in families]
    table = pd.DataFrame(rows, columns=["scope", "family"])
    harm = (table["family"] == "current") & (table["scope"] == scopes[0])
    about = {"sublayer": "self_attn", "kind": kind, "positions": "all", "with_aliases": False, "metric": "nll"}
    return table.assign(
        **about, mass=0.25, effect=harm * 2.0, applicable=table["family"] != "older", n_unaliased_reads=1
    )


def cell(image: np.ndarray, panel: int, line: int, column: int) -> np.ndarray:
    """The colour of a cell, by its corner: numbers are in the middle."""
    x = MARGIN + panel * (4 * CELL_WIDTH + 12) + column * CELL_WIDTH + CELL_WIDTH - 4
    return image[HEAD + line * CELL_HEIGHT + CELL_HEIGHT - 4, x].astype(int)


@pytest.mark.parametrize(
    ("scopes", "kind"),
    [
        ([f"layer:{i}" for i in range(12)], "mask_renormalise"),
        (["early", "middle", "late"], "mask_renormalise"),
        (["layer:0", "layer:1", "early"], "mask_renormalise_first_order"),
    ],
)
def test_heat_images_show_where_harm_is(scopes, kind):
    image = heat_image(effects(scopes, kind), num_pairs=16)
    assert image is not None
    shown = [scope for scope in scopes if scope.startswith("layer:")] or scopes
    red, green, blue = cell(image, panel=1, line=len(shown) - 1, column=1)  # the first scope is at the bottom
    assert red > green + 50
    assert red > blue + 50
    assert np.ptp(cell(image, panel=1, line=0, column=0)) < 5  # no effect: white
    assert list(cell(image, panel=1, line=0, column=3)) == [238, 238, 238]
    assert np.array_equal(cell(image, panel=0, line=0, column=0), cell(image, panel=0, line=1, column=1))
    assert heat_image(effects(scopes, "zero"), num_pairs=16) is None


def test_an_image_costs_little():
    """Training waits for each of them: 28 layers, the shape of Qwen3-0.6B."""
    table = effects([f"layer:{i}" for i in range(28)])
    table = pd.concat([table, table.assign(sublayer="mlp")])
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        heat_image(table, num_pairs=16)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.15
