"""Make the loggers of a run: one for `metrics.csv` in the run directory, always, and those that `trainer.logger` names,
which cannot end the run (`train.loggers.guard`).

W&B, the default, follows WANDB_MODE. Without it, W&B is online if a sweep's agent has started the run, else offline.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import wandb
from jsonargparse import ArgumentParser
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import Logger

from train.loggers.guard import START_SECONDS, GuardedLogger, bounded, say_failed
from train.loggers.metrics_file import MetricsLogger, ProbesLogger
from train.loggers.tensorboard import RunTensorBoardLogger, check_tensorboard
from train.loggers.wandb import RunWandbLogger, in_sweep, wandb_settings

WANDB_PROJECT = "attnres"
WANDB_MODES = ("online", "offline", "disabled")
OPTIONS = {
    "WandbLogger": ("name", "project", "entity", "tags", "notes", "group", "job_type", "offline"),
    "TensorBoardLogger": ("save_dir", "name", "version"),
    "CSVLogger": (),
}
"""Lightning's loggers that are replaced by our own, and which of their options ours take."""


def check_loggers(choice: Any) -> None:
    """Check a value of `trainer.logger` before Lightning makes loggers of it.

    Raises:
        ValueError: TensorBoard is not installed, or our logger does not take an option.
    """
    for entry in _entries(choice):
        name, options = _named(entry)
        if name == "TensorBoardLogger":
            check_tensorboard()
        for option in options:
            if name and option not in OPTIONS[name]:
                takes = ", ".join(OPTIONS[name]) or "no options: its files are in the run directory"
                raise ValueError(f"trainer.logger {name} does not take {option} here; it takes {takes}")


def build_loggers(run_dir: str | Path, first_step: int = 0, choice: Any = None, built: Any = None) -> list[Logger]:
    """The loggers of a training run.

    Args:
        choice: `trainer.logger` as it was given: None or True for W&B; the name of one of Lightning's loggers, or its
            class_path and init_args; or a list of these.
        built: what Lightning has made of `choice`. Loggers that we do not replace are taken from it.

    Raises:
        ValueError: WANDB_MODE is unknown, or online without an API key (W&B would stop and ask for one), or
            `check_loggers` refuses `choice`.
    """
    check_loggers(choice)
    loggers: list[Any] = [MetricsLogger(run_dir, first_step)]
    for entry, logger in zip(_entries(choice), _entries(built) if choice not in (None, True) else [None], strict=True):
        name, options = _named(entry)
        if name == "WandbLogger":
            make = partial(_wandb_logger, run_dir, first_step, **options)
        elif name == "TensorBoardLogger":
            make = partial(RunTensorBoardLogger, run_dir, first_step, **options)
        elif name == "CSVLogger":
            make = partial(ProbesLogger, run_dir, first_step)
        else:
            make = partial(lambda logger: logger, logger)
        loggers += _guarded(name or type(logger).__name__, make)
    return loggers


def _guarded(name: str, make: Callable[[], Logger | None]) -> list[Logger]:
    """A logger that cannot end the run; none if there is none to make, or it cannot be made."""
    try:
        logger = bounded(make, START_SECONDS)
    except ValueError:  # bad input
        raise
    except Exception as error:
        say_failed(name, "start", error)
        return []
    return [] if logger is None else [GuardedLogger(logger)]


def _wandb_logger(run_dir: str | Path, first_step: int, offline: bool = False, **options: Any) -> Logger | None:
    """None if W&B is disabled."""
    mode = os.environ.get("WANDB_MODE") or ("online" if in_sweep() and not offline else "offline")
    if mode not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {mode}")
    if mode == "disabled":
        return None
    settings = wandb_settings()
    wandb.setup(settings)  # silent from here on, not only once the run has started
    if mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "WANDB_MODE=online (a sweep's default) needs an API key: run `wandb login`, or set WANDB_MODE=offline"
        )
    options.setdefault("project", WANDB_PROJECT)
    return RunWandbLogger(run_dir, first_step, mode=mode, settings=settings, **options)


def _entries(choice: Any) -> list[Any]:
    if choice in (None, True):
        return ["WandbLogger"]
    return list(choice) if isinstance(choice, Iterable) and not isinstance(choice, str | Mapping) else [choice]


def _named(entry: Any) -> tuple[str | None, dict[str, Any]]:
    """The name in `OPTIONS` that an entry stands for, if any, and the options that differ from their defaults."""
    if isinstance(entry, str):
        return entry, {}
    path = getattr(entry, "class_path", "")
    name = path.rpartition(".")[2]
    if name not in OPTIONS or not path.startswith("lightning."):
        return None, {}
    parser = ArgumentParser()
    parser.add_class_arguments(getattr(lightning_loggers, name))
    defaults, given = vars(parser.get_defaults()), vars(entry.init_args)
    return name, {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}
