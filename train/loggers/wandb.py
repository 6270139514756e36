"""Weights & Biases: one W&B run for a run directory, each metric of each step once. Training does not wait for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from wandb.errors import Error as WandbError

from probe.files.layout import METRICS
from probe.training.loggers import WandbViews
from train.loggers import wandb_files
from train.loggers.metrics_file import rows_before

TIMINGS = "throughput/"
"""Metrics that differ each time a step is run."""
INIT_SECONDS, FINISH_SECONDS = 30, 300
"""The longest wait for W&B's server when a run starts, and for it to receive the rest when the run ends."""
BEST = {"val/accuracy": "max", "val/loss": "min"}
"""W&B's summary holds the best value of these metrics beside the last."""


class RunWandbLogger(WandbViews, WandbLogger):
    """Logs to the one W&B run of a run directory, each metric of each step once.

    A resumed run goes on with the W&B run of the same id, in a file of its own, which `wandb sync` appends. What the
    files lack of earlier steps, because W&B was killed too, is logged from `metrics.csv` and the probe's tables.

    If W&B's server cannot be reached when the run starts, a line says so and the run is offline.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
        options: of `wandb.init`.
    """

    def __init__(self, run_dir: str | Path, first_step: int = 0, **options: Any) -> None:
        self._run_dir, self._first_step = Path(run_dir), first_step
        self._num_rows = 0
        self._differs = False
        # An agent of a sweep has named the run, and W&B accepts no other name.
        run_id = os.environ.get("WANDB_RUN_ID") if in_sweep() else wandb_files.run_id(self._run_dir)
        super().__init__(save_dir=run_dir, id=run_id, **options)  # type: ignore[arg-type]
        self._wandb_init.pop("anonymous")  # W&B warns that it has no effect any more

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            wandb_files.mend_files(self._run_dir)
            rows = wandb_files.history(self._run_dir, self._id)
            self._take_up(rows, self._start().step)
            for step, metrics in rows_before(self._run_dir / METRICS, self._first_step):
                self.log_metrics(metrics, step)
        return self._experiment

    def _start(self) -> Any:
        """Start the W&B run; offline if its server cannot be reached or refuses."""
        try:
            run = super().experiment
        except WandbError as error:
            if self._wandb_init.get("mode") != "online":
                raise
            wandb.teardown()  # or the run's id would stay in use
            wandb.setup(self._wandb_init.get("settings"))
            _say(
                f"W&B cannot be reached ({_line(error)}); the run is offline; `wandb sync` in {self._run_dir} sends it"
            )
            self._wandb_init["mode"] = "offline"
            run = super().experiment
        for name, best in BEST.items():
            run.define_metric(name, step_metric=wandb_files.STEP, summary=f"last,{best}")
        return run

    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.experiment.config.update({**config, "provenance": provenance}, allow_val_change=True)

    def log_artifacts(self) -> None:
        """Log the final model (`hf/`) and the tables of its probes as artifacts.

        No copy is made: files are read where they lie when they are uploaded, by `wandb sync` if the run is offline.
        """
        for name, kind, patterns in (("hf", "model", ["*"]), ("probe", "dataset", ["*.parquet", "*.json"])):
            folder = self._run_dir / name
            if not folder.is_dir():
                continue
            label = re.sub(r"[^\w.-]", "-", f"{self._run_dir.resolve().name}-{self.experiment.id}-{name}")
            artifact = wandb.Artifact(label, kind)
            for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            try:
                self.experiment.log_artifact(artifact)
            except WandbError as error:
                _say(f"W&B does not take the artifact {label} ({_line(error)}); it is in {folder}")

    def write_table(self, name: str, table: pd.DataFrame, step: int) -> None:
        """W&B asks its server first; if that does not answer, a line says so."""
        try:
            super().write_table(name, table, step)
        except WandbError as error:
            _say(f"W&B does not take the table {name} ({_line(error)}); the tables in {self._run_dir}/probe hold it")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is not None:
            self._compare(metrics, step)
        super().log_metrics(metrics, step)

    def write_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        row = dict(metrics) if step is None else {**metrics, wandb_files.STEP: step}
        self.experiment.log(row, step=self._num_rows, commit=True)  # W&B's count would start anew when resumed offline
        self._num_rows += 1

    def _take_up(self, rows: list[dict[str, Any]], num_received: int) -> None:
        """Go on after the `rows` of the files; online, only after the first ones, which the server has received."""
        if self._wandb_init.get("mode") == "online":
            rows = [row for row in rows if int(row["_step"]) < num_received]
        self._num_rows = max([num_received, *(int(row["_step"]) + 1 for row in rows)])
        for row in rows:
            if (step := row.get(wandb_files.STEP)) is not None:
                self._told.add(int(step), row)

    def _compare(self, metrics: Mapping[str, Any], step: int) -> None:
        """Say so, once, if W&B was told something else before the run was resumed."""
        for name, value in metrics.items():
            kept = self.told.get(step, name)
            are_numbers = isinstance(kept, int | float) and isinstance(value, int | float)
            if self._differs or name.startswith(TIMINGS) or not are_numbers:
                continue
            if abs(kept - value) > 1e-6 * abs(value):
                self._differs = True
                _say(
                    f"W&B keeps what it was told before the run was resumed, and now differs (from step "
                    f"{step}, {name}: {kept:g}, now {value:g}); {METRICS} has the new rows"
                )


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def wandb_settings() -> wandb.Settings:
    """Quiet, and no waiting without end."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )


def finish_wandb() -> None:
    """End the W&B run now, not when Python exits. What its server does not receive in time stays in the files."""
    if (run := wandb.run) is None:
        return
    folder = Path(run.dir).parent
    try:
        wandb.finish()
    except TimeoutError:
        _say(f"W&B has not received all in {FINISH_SECONDS} s; `wandb sync {folder}` sends the rest")


def _say(line: str) -> None:
    print(f"attnres-train: {line}", file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
