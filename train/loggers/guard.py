"""Loggers that show a run cannot end it: one that fails or hangs is left out from then on, which a line says.

`metrics.csv` and the tables of `probe/` are the record and are not guarded: a run that cannot write them stops. What
such a logger has not received, it takes up from them when the run is resumed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only

from probe.failures import in_words
from probe.training.loggers import RunLogger, run_logger

Found = TypeVar("Found")
START_SECONDS, CALL_SECONDS, END_SECONDS = 300.0, 60.0, 330.0
"""The longest that training waits for a logger to start (it may read its files), to take something, and to end."""


class GuardedLogger(RunLogger, Logger):
    """Passes all it is told on to `logger`, as long as that takes it.

    Args:
        logger: one of Lightning's.
    """

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self.logger = run_logger(logger)
        self._of_lightning = logger
        self._turn = threading.Lock()  # a call that was interrupted may still be running
        self.has_failed = False

    def call(self, what: str, act: Callable[[], Found], seconds: float | None = None) -> Found | None:
        """`act`, of which a line is to say that the logger has failed to do `what`; None if it has, now or before."""
        if self.has_failed or rank_zero_only.rank != 0:
            return None

        def in_turn() -> Found:
            with self._turn:
                return act()

        try:
            return bounded(in_turn, CALL_SECONDS if seconds is None else seconds)
        except Exception as error:
            self.has_failed = True
            say_failed(type(self._of_lightning).__name__.removeprefix("Run"), what, error)
            return None

    @property
    def experiment(self) -> Any:
        return self.call("start", lambda: self.logger.experiment, START_SECONDS)

    @property
    def name(self) -> str | None:
        return self._of_lightning.name

    @property
    def version(self) -> int | str | None:
        return self._of_lightning.version

    @property
    def save_dir(self) -> str | None:
        return self._of_lightning.save_dir

    @property
    def takes_views(self) -> bool:  # type: ignore[override]
        return self.logger.takes_views and not self.has_failed

    @property
    def is_resumable(self) -> bool:  # type: ignore[override]
        return self.logger.is_resumable

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.call("log metrics", lambda: self.logger.log_metrics(metrics, step))

    def log_view(self, name: str, draw: Callable[[], Any], step: int) -> None:
        self.call("log an image", lambda: self.logger.log_view(name, draw, step))

    def log_start(self, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.call("log the configuration", lambda: self.logger.log_start(config, provenance))

    def write_table(self, name: str, table: pd.DataFrame, step: int) -> None:
        self.call("log a table", lambda: self.logger.write_table(name, table, step))

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        self.call("log a summary", lambda: self.logger.write_summary(fields))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.call("log the configuration", lambda: self._of_lightning.log_hyperparams(*args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self.call("log the model", lambda: self._of_lightning.log_graph(*args, **kwargs))

    def save(self) -> None:
        self.call("save", self._of_lightning.save)

    def finalize(self, status: str) -> None:
        self.call("end", lambda: self._of_lightning.finalize(status), END_SECONDS)


def say_failed(name: str, what: str, error: Exception) -> None:
    print(
        f"attnres-train: {name} has failed to {what} ({in_words(error)[:300]}) and is left out from here on; "
        "metrics.csv and the tables of probe/ have it all",
        file=sys.stderr,
        flush=True,
    )


def bounded(act: Callable[[], Found], seconds: float) -> Found:
    """What `act` returns, or raises, in a thread of its own: one that hangs is left behind, and ends with the process.

    Raises:
        TimeoutError: `seconds` have gone by.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((act(), None))
        except BaseException as error:  # to be raised below
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="logger")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer in {seconds:g} s")
    found, error = outcome[0]
    if error is not None:
        raise error
    return found
