"""What a run can tell its loggers, and the one memory of what each of them was told.

To add a logger, put `RunLogger` before one of Lightning's loggers in the bases of a class, and override what it is to
show. Any other logger is wrapped by `run_logger`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only

PROBE = "probe"
"""All names of what a probe has found begin with this."""


class Told:
    """What a logger was told, by step and name. Nothing is told twice, even in a run that was killed and resumed.

    Lightning logs a training metric only once, so these are not remembered unless a file held them. A step may be
    probed twice, and a probe on disk may be told to a logger that lacks it.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Any] = {}

    def __contains__(self, entry: tuple[int, str]) -> bool:
        return entry in self._values

    def get(self, step: int, name: str) -> Any:
        """The value that was told, or None."""
        return self._values.get((step, name))

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        self._values |= {(step, name): value for name, value in values.items()}

    def new(self, step: int | None, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The `metrics` that are to be told now. Those without a step always are."""
        if step is None:
            return dict(metrics)
        new = {name: value for name, value in metrics.items() if (step, name) not in self}
        self.add(step, {name: value for name, value in new.items() if name.startswith(PROBE)})
        return new


class RunLogger:
    """A logger of a run. The methods `log_*` are what a run calls; the methods `write_*` are for a logger to override.

    Attributes:
        takes_views: whether the logger shows images, tables and summaries, which take time to make.
        is_resumable: whether `told` holds what was logged before the run was resumed.
    """

    takes_views: ClassVar[bool] = False
    is_resumable: ClassVar[bool] = True
    experiment: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._told = Told()

    @property
    def told(self) -> Told:
        """What the logger was told. To have what its files hold, they are opened first."""
        _ = self.experiment
        return self._told

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if new := self.told.new(step, metrics):
            self.write_metrics(new, step)

    def log_view(self, name: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        """Log an image, which is drawn only if it is needed. There may be nothing to draw."""
        if self.takes_views and (step, name) not in self.told and (image := draw()) is not None:
            self.write_image(name, image, step)
            self.told.add(step, {name: True})

    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        """Log the run's configuration and its record, each time that training starts."""

    def write_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        super().log_metrics(metrics, step)  # type: ignore[misc]

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an image: (height, width, 3) uint8."""

    def write_table(self, name: str, table: pd.DataFrame, step: int) -> None:
        """Write a table."""

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        """Write what the run has come to: one value for each name."""


class WandbViews(RunLogger):
    """Images, tables and a summary in W&B."""

    takes_views = True

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        from wandb import Image  # the command line for probes does without W&B

        self.write_metrics({name: Image(image)}, step)

    def write_table(self, name: str, table: pd.DataFrame, step: int) -> None:
        from wandb import Table

        values = table.astype(object).where(table.notna(), None)
        self.log_metrics({name: Table(dataframe=values)}, step)

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        self.experiment.summary.update(dict(fields))


class TensorBoardViews(RunLogger):
    """Images in TensorBoard, and tables and a summary as texts: its page of texts shows Markdown."""

    takes_views = True

    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.experiment.add_image(name, image, step, dataformats="HWC")

    def write_table(self, name: str, table: pd.DataFrame, step: int) -> None:
        """Of a table with steps, the rows of `step` alone: thousands of rows would be slow and unreadable."""
        rows = table[table["step"] == step] if "step" in table else table
        lines = [list(table.columns), ["---"] * table.shape[1]]
        lines += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows.itertuples(index=False)]
        self.experiment.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        self.write_table("probe/summary", pd.DataFrame({"field": list(fields), "value": list(fields.values())}), 0)


class _Wrapper(RunLogger):
    """A logger of which nobody knows what its files hold: it is told of what happens from now on."""

    is_resumable = False

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    @property
    def experiment(self) -> Any:
        return getattr(self._logger, "experiment", None)

    def write_metrics(self, metrics: Mapping[str, Any], step: int | None) -> None:
        self._logger.log_metrics(metrics, step)


class _WandbWrapper(WandbViews, _Wrapper):
    pass


class _TensorBoardWrapper(TensorBoardViews, _Wrapper):
    pass


def run_logger(logger: Logger) -> RunLogger:
    """`logger` itself if it is a `RunLogger`, else one that passes metrics on to it, and views if it can show them."""
    if isinstance(logger, RunLogger):
        return logger
    if isinstance(logger, WandbLogger):
        return _WandbWrapper(logger)
    return _TensorBoardWrapper(logger) if isinstance(logger, TensorBoardLogger) else _Wrapper(logger)


__all__ = ["PROBE", "RunLogger", "TensorBoardViews", "Told", "WandbViews", "run_logger"]
