"""Weights & Biases: one W&B run for a run directory, each metric of each step once; training does not wait for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from wandb.errors import Error as WandbError

from train.loggers import wandb_files
from train.loggers.metrics_file import METRICS, rows_before

TIMINGS = "throughput/"
"""Metrics that are never twice the same."""
INIT_SECONDS, FINISH_SECONDS = 30, 300
"""Most to wait for W&B's server when a run starts, and for the rest of it to be received when it ends."""
BEST = {"val/accuracy": "max", "val/loss": "min"}
"""Metrics of which W&B's summary holds the best value beside the last."""


class RunWandbLogger(WandbLogger):
    """Logs to the one W&B run of a run directory, each metric of each step once.

    A resumed run goes on with the W&B run of the same id, in a file of its own, which `wandb sync` appends. What the
    files hold already is not logged again; what they should hold and do not, because W&B was killed too, is logged from
    `metrics.csv`.

    Where W&B's server cannot be reached when the run starts, a line says so and the run is offline.

    Args:
        run_dir: the run directory.
        first_step: the step the run starts at; not zero when it is resumed.
        options: of `wandb.init`.
    """

    def __init__(self, run_dir: str | Path, first_step: int = 0, **options: Any) -> None:
        self._run_dir, self._first_step = Path(run_dir), first_step
        self._logged: dict[tuple[int, str], Any] = {}
        self._num_rows = 0
        self._differs = False
        # An agent of a sweep has named the run, and W&B heeds no other name.
        run_id = os.environ.get("WANDB_RUN_ID") if in_sweep() else wandb_files.run_id(self._run_dir)
        super().__init__(save_dir=run_dir, id=run_id, **options)  # type: ignore[arg-type]
        self._wandb_init.pop("anonymous")  # of which W&B says that it means nothing any more

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            if self._id is not None:
                wandb_files.mend_files(self._run_dir)
            rows = [] if self._id is None else wandb_files.history(self._run_dir, self._id)
            self._take_up(rows, self._start().step)
            self._log_rows_of_disk()
        return self._experiment

    def _start(self) -> Any:
        """Start the W&B run; offline if its server is not to be reached, or refuses."""
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

    def has_logged(self, step: int, name: str) -> bool:
        """Whether the W&B run has this metric of this step."""
        assert self.experiment  # which reads what is logged
        return (step, name) in self._logged

    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """What the run was told and what it is, into W&B's configuration of it."""
        self.experiment.config.update({**config, "provenance": provenance}, allow_val_change=True)

    def log_artifacts(self) -> None:
        """The final model (`hf/`) and the tables of its probes, as artifacts; offline, `wandb sync` uploads them.

        Files are read where they lie when they are uploaded, no copy is kept.
        """
        about = {name: path for name in ("hf", "probe") if (path := self._run_dir / name).is_dir()}
        for name, folder in about.items():
            kind, files = ("model", sorted(folder.iterdir())) if name == "hf" else ("dataset", _tables(folder))
            label = re.sub(r"[^\w.-]", "-", f"{self._run_dir.resolve().name}-{self.experiment.id}-{name}")
            artifact = wandb.Artifact(label, kind)
            for file in files:
                artifact.add_file(str(file), policy="immutable", skip_cache=True)
            try:
                self.experiment.log_artifact(artifact)
            except WandbError as error:
                _say(f"W&B does not take the artifact {label} ({_line(error)}); it is in {folder}")

    def log_table(self, key: str, *args: Any, **kwargs: Any) -> None:
        """As Lightning's. W&B asks its server first, and where that does not answer a line says so."""
        try:
            super().log_table(key, *args, **kwargs)
        except WandbError as error:
            _say(f"W&B does not take the table {key} ({_line(error)}); the tables in {self._run_dir}/probe hold it")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        experiment = self.experiment  # which reads what is logged
        if step is not None:
            self._compare(metrics, step)
            metrics = {name: value for name, value in metrics.items() if (step, name) not in self._logged}
        if metrics:
            row = dict(metrics) if step is None else {**metrics, wandb_files.STEP: step}
            experiment.log(row, step=self._num_rows, commit=True)  # W&B's count would begin anew when resumed offline
            self._num_rows += 1
        if step is not None:  # a probe that is read from disk may be made again
            self._logged |= {(step, name): value for name, value in metrics.items() if name.startswith("probe")}

    def _take_up(self, rows: list[dict[str, Any]], num_received: int) -> None:
        """Go on after the `rows` of the files; online, after those that the server has received, the first ones."""
        if self._wandb_init.get("mode") == "online":
            rows = [row for row in rows if int(row["_step"]) < num_received]
        self._num_rows = max([num_received, *(int(row["_step"]) + 1 for row in rows)])
        for row in rows:
            if (step := row.get(wandb_files.STEP)) is not None:
                self._logged |= {(int(step), name): value for name, value in row.items()}

    def _compare(self, metrics: Mapping[str, Any], step: int) -> None:
        """Says so, once, if what is kept is not what is logged now."""
        for name, value in metrics.items():
            kept = self._logged.get((step, name))
            numbers = isinstance(kept, int | float) and isinstance(value, int | float) and not name.startswith(TIMINGS)
            if numbers and not self._differs and abs(kept - value) > 1e-6 * abs(value):  # type: ignore[operator]
                self._differs = True
                _say(
                    f"W&B keeps what it was told before the run was resumed, and now differs (from step "
                    f"{step}, {name}: {kept:g}, now {value:g}); {METRICS} has the new rows"
                )

    def _log_rows_of_disk(self) -> None:
        for step, metrics in rows_before(self._run_dir, self._first_step):
            self.log_metrics(metrics, step)


def in_sweep() -> bool:
    """Whether an agent of a W&B sweep has started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def wandb_settings() -> wandb.Settings:
    """Quiet, and no waiting without end."""
    limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
    return wandb.Settings(silent=True, console="off", disable_git=True, **limits)


def finish_wandb() -> None:
    """End the W&B run, or W&B would when Python exits. What its server does not receive in time stays in the files."""
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


def _tables(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.parquet")), folder / "summary.json"]


__all__ = ["RunWandbLogger", "finish_wandb", "in_sweep", "wandb_settings"]
