"""What users give to `attnres-train`, checked before any work starts: each mistake is a ValueError of one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from attnres.files import MANIFEST
from probe.files.checkpoints import check_state, read_lightning
from probe.files.layout import CONFIG, EXPORT, RUN_FILE, TRAIL, lock_file
from train.run.checkpoints import FOLDER, newest_checkpoint, newest_file
from train.run.provenance import FILE as PROVENANCE
from train.run.sharding import FSDP2, divides

POSITIVE_TRAINER_OPTIONS = ("max_steps", "val_check_interval", "accumulate_grad_batches", "log_every_n_steps")
ARCHITECTURES = {"qwen3": "vanilla", "qwen3_attnres": "attnres"}
# Keys of a model's configuration that say where it was written, not what the model is.
NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}


def check_trainer(options: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers with which Lightning would train nothing, or fail once it has begun."""
    for key in POSITIVE_TRAINER_OPTIONS:
        value = options[key]
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"trainer.{key} must be positive, got {value}")
    if options["use_distributed_sampler"]:
        raise ValueError("trainer.use_distributed_sampler must be false: each device draws its part of a batch itself")
    check_strategy(options["strategy"])
    if options["accelerator"] == "gpu" and not (CUDAAccelerator.is_available() or MPSAccelerator.is_available()):
        raise ValueError("trainer.accelerator is gpu, and there is none here; cpu, or auto, takes what there is")
    clip = options["gradient_clip_val"]
    if clip is not None and not clip >= 0:
        raise ValueError(f"trainer.gradient_clip_val must not be negative, got {clip}")
    if options["gradient_clip_algorithm"] == "value" and divides(options["strategy"]):
        raise ValueError(f"trainer.gradient_clip_algorithm must be norm with trainer.strategy {FSDP2}, got value")
    for key in ("limit_train_batches", "overfit_batches"):
        if options[key]:
            raise ValueError(f"trainer.{key} must be left out: examples would repeat; trainer.max_steps says how long")
    if options["max_epochs"] != -1:
        raise ValueError(
            f"trainer.max_epochs must be -1, got {options['max_epochs']}: trainer.max_steps says how long to train"
        )


def check_strategy(strategy: Any) -> None:
    """Raises ValueError for a strategy under which models would not train, or not resume."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    known = isinstance(strategy, DDPStrategy | SingleDeviceStrategy) or divides(strategy)
    if not known and not re.match(r"auto$|ddp", str(name)):
        raise ValueError(f"trainer.strategy must be auto, ddp or {FSDP2} (parameters divided over devices), got {name}")


def find_checkpoint(
    ckpt_path: str | None, run_dir: str | None, required: bool = False
) -> tuple[str | None, dict[str, Any]]:
    """The path and content of the checkpoint that `ckpt_path` means: a file, `last` in `run_dir`, or none.

    Raises:
        ValueError: the file is no checkpoint of ours; the newest one is `required` and there is none; or all are torn.
    """
    if ckpt_path is None:
        return None, {}
    return last_checkpoint(run_dir, required) if ckpt_path == "last" else (ckpt_path, given_checkpoint(ckpt_path))


def given_checkpoint(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--ckpt_path '{path}' does not exist; give a file such as RUN_DIR/checkpoints/last.ckpt")
    try:
        return read_lightning(Path(path))
    except ValueError as error:
        raise ValueError(f"--ckpt_path {error}") from None


def last_checkpoint(run_dir: str | None, required: bool) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint in `run_dir`. Tells the user which ones are torn, or that there is none yet."""
    if not run_dir:
        raise ValueError("--run_dir is required: give the folder whose checkpoint is meant, or its --ckpt_path")
    try:
        path, checkpoint, torn = newest_checkpoint(Path(run_dir))
    except OSError as error:
        raise ValueError(f"--run_dir '{run_dir}': a checkpoint cannot be read: {error.strerror}") from None
    for name in torn:
        print(f"attnres-train: '{name}' is not whole and is passed over", file=sys.stderr)
    if path is not None:
        for name in () if required else torn:  # or the next checkpoint would keep the torn one, not the whole one
            with suppress(FileNotFoundError):  # another process was first
                name.replace(name.with_name(f"{name.name}.torn"))
        return str(path), checkpoint
    if torn:
        raise ValueError(f"--run_dir '{run_dir}' holds no whole checkpoint; remove {FOLDER}/ to start at step 0")
    if required:
        raise ValueError(
            f"--ckpt_path is required, as --run_dir '{run_dir}' holds no {FOLDER}/last.ckpt; "
            "give the checkpoint to validate"
        )
    print(f"attnres-train: '{run_dir}' has no checkpoint yet, training starts at step 0", file=sys.stderr)
    return None, {}


def check_run_dir(run_dir: str | None, ckpt_path: str | None, goes_on: bool) -> None:
    """Raises ValueError if training must not write to `run_dir`."""
    if not run_dir:
        raise ValueError("--run_dir is required: give the folder that is to receive the run, e.g. --run_dir runs/demo")
    folder = Path(run_dir)
    # A run that failed while setting up leaves wandb/ alone; one that was killed early leaves the rest.
    files = {name + end for name in ("metrics.csv", PROVENANCE, CONFIG, MANIFEST) for end in ("", ".part")}
    folders = {"probe", TRAIL, FOLDER, f"{EXPORT}.part", f"{EXPORT}.replaced.part"}
    left = {"wandb", lock_file(folder, "train").name} | (folders | files if goes_on else set())
    is_stopped = (folder / FOLDER).is_dir() and newest_file(folder) is None  # before its first checkpoint
    if goes_on and (is_stopped or not (folder / EXPORT / RUN_FILE).exists()):
        left.add(EXPORT)
    try:
        if all(path.name in left for path in folder.iterdir()):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"--run_dir '{folder}' cannot be used: {error.strerror}; give another folder") from None
    if ckpt_path is None:
        raise ValueError(
            f"--run_dir '{folder}' is not empty; give another folder, or go on with the run in it by --ckpt_path last"
        )
    if folder.resolve() not in Path(ckpt_path).resolve().parents:
        raise ValueError(
            f"--run_dir '{folder}' is not empty and --ckpt_path is of another run; give that run's folder or a new one"
        )


def make_run_dir(folder: Path) -> None:
    """Creates `folder`; raises ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--run_dir '{folder}' cannot be created: {error.strerror}; give another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"--run_dir '{folder}' cannot be written to: Permission denied; give another folder")


OF_THE_TASK = {"task": "data.task", "seed": "seed_everything"}
DATA = "TaskDataModule"
"""What Lightning calls the data in a checkpoint."""


def check_same_model(config: Mapping[str, Any], state: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first option, or tensor, in which the configured model and the checkpoint differ."""
    saved = checkpoint["hyper_parameters"]["model_config"]
    _compare("architecture", *(ARCHITECTURES.get(c["model_type"], c["model_type"]) for c in (saved, config)))
    for key in sorted((saved.keys() | config.keys()) - NOT_OF_THE_MODEL):
        _compare(f"model.{key}", saved.get(key), config.get(key))
    held = checkpoint["state_dict"].items()
    check_state("--ckpt_path", {k.removeprefix("model."): v for k, v in held if k.startswith("model.")}, state)


def check_same_run(hparams: Mapping[str, Any], task: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError for changed options that a resumed run would ignore or take up in part.

    These are the optimiser's, whose state and schedule come from the checkpoint, and those of the examples.
    """
    for key, value in checkpoint["hyper_parameters"].get("optimizer", {}).items():
        _compare(f"model.{key}", value, hparams["optimizer"].get(key))
    for key, value in checkpoint.get("datamodule_hyper_parameters", {}).get("task", {}).items():
        _compare(OF_THE_TASK.get(key, f"data.task.{key}"), value, task.get(key))
    if "size" not in checkpoint.get(DATA, {}).get("curriculum", {}):
        raise ValueError(
            "--ckpt_path is of an earlier version, whose curriculum this one cannot take up: go on with that version, "
            "or start another run"
        )


def _compare(option: str, saved: Any, configured: Any) -> None:
    if saved != configured:
        raise ValueError(
            f"--ckpt_path holds a run with {option} {saved}, the configuration says {configured}: "
            "a run goes on as it began; give the config.yaml of that run, or start another"
        )
