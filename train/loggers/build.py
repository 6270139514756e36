"""Where metrics go: `metrics.csv` in the run directory, always, and what `trainer.logger` names.

W&B, the default, is as WANDB_MODE says; where it is not set, online if an agent of a sweep has started the run, else
offline. All hold every row once, also of a run that was killed and resumed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import wandb
from jsonargparse import ArgumentParser
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch.loggers import Logger

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
"""The loggers of Lightning in whose place we have our own, and the options of theirs that ours take."""


def check_loggers(choice: Any) -> None:
    """Check a value of `trainer.logger`, before Lightning makes loggers of it.

    Raises:
        ValueError: TensorBoard is not installed, or an option that our logger does not take.
    """
    for entry in _entries(choice):
        name, options = _named(entry)
        if name == "TensorBoardLogger":
            check_tensorboard()
        for option in options:
            if name is not None and option not in OPTIONS[name]:
                takes = ", ".join(OPTIONS[name]) or "no options: its files are in the run directory"
                raise ValueError(f"trainer.logger {name} does not take {option} here; it takes {takes}")


def build_loggers(run_dir: str | Path, first_step: int = 0, choice: Any = None, built: Any = None) -> list[Logger]:
    """The loggers of a training run.

    Args:
        choice: `trainer.logger` as it was given: None or True for W&B; the name of one of Lightning's loggers, or its
            class_path and init_args; or a list of these.
        built: what Lightning has made of `choice`, for loggers that we have no other for.

    Raises:
        ValueError: an unknown WANDB_MODE, online without an API key (W&B would stop and ask for one), or what
            `check_loggers` refuses.
    """
    check_loggers(choice)
    loggers: list[Any] = [MetricsLogger(run_dir, first_step)]
    for entry, logger in zip(_entries(choice), _entries(built) if choice not in (None, True) else [None], strict=True):
        name, options = _named(entry)
        if name == "WandbLogger":
            loggers += _wandb_loggers(run_dir, first_step, options)
        elif name == "TensorBoardLogger":
            loggers.append(RunTensorBoardLogger(run_dir, first_step, **options))
        elif name == "CSVLogger":
            loggers.append(ProbesLogger(run_dir, first_step))
        else:
            loggers.append(logger)
    return loggers


def _wandb_loggers(run_dir: str | Path, first_step: int, options: Mapping[str, Any]) -> list[Logger]:
    """One, or none where W&B is disabled."""
    default = "online" if in_sweep() else "offline"
    mode = os.environ.get("WANDB_MODE") or ("offline" if options.get("offline") else default)
    if mode not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {mode}")
    settings = wandb_settings()
    if mode != "disabled":
        wandb.setup(settings)  # silent from here on, not only once the run has started
    if mode == "online" and not wandb.api.api_key:
        raise ValueError(
            "WANDB_MODE=online (a sweep's default) needs an API key: run `wandb login`, or set WANDB_MODE=offline"
        )
    if mode == "disabled":
        return []
    others = {name: value for name, value in options.items() if name != "offline"}
    return [RunWandbLogger(run_dir, first_step, mode=mode, settings=settings, **{"project": WANDB_PROJECT, **others})]


def _entries(choice: Any) -> list[Any]:
    if choice in (None, True):
        return ["WandbLogger"]
    return list(choice) if isinstance(choice, Iterable) and not isinstance(choice, str | Mapping) else [choice]


def _named(entry: Any) -> tuple[str | None, dict[str, Any]]:
    """Which of `OPTIONS` an entry names, if one, and the options that it gives other values than their defaults."""
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


__all__ = ["WANDB_PROJECT", "build_loggers", "check_loggers"]
