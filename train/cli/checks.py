"""What users give to `attnres-train`, checked before any work starts: each mistake is one line."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from probe.files.checkpoints import RUN_FILE
from train.run.checkpoints import FOLDER, newest_checkpoint, read_checkpoint
from train.run.provenance import FILE as PROVENANCE
from train.run.provenance import read_segments
from train.run.sharding import FSDP2, divides

POSITIVE_TRAINER_OPTIONS = (
    "max_steps",
    "val_check_interval",
    "accumulate_grad_batches",
    "log_every_n_steps",
)
# Of a configuration, what says where it was written and not what the model is.
NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}


class UsageError(Exception):
    """Input that cannot be used; the message is one line for the user."""


def explain(message: str, known_keys: list[str], files: list[str]) -> str:
    """A parser's message with the nearest option for an unknown one, and the file for what is no YAML."""
    message = re.sub(r"<class '(\w+)'>", r"\1", message).replace("Expected a ", "expected ")
    message = message.replace("typing.Literal", "one of ").replace("Parser key", "option")
    unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
    if unknown:
        key = unknown[1] or unknown[2]
        nearest = nearest_option(key, known_keys)
        hint = f"did you mean {nearest}?" if nearest else "`attnres-train fit --help` lists the options"
        return f"option {key} does not exist; {hint}"
    if group := re.match(r"option \"(model|data|probe|trainer)\":\s+Unable to load config ['\"]([^'\"]*)", message):
        example = "; the plain Qwen3 is model.architecture: vanilla" if group[1] == "model" else ""
        return f"{group[1]} must be a mapping of options or a file that holds one, got {group[2]}{example}"
    # A value of none of several types comes with a paragraph on each.
    several = r"Does not validate against any of the Union subtypes\s+Subtypes: [\[(](.*)[\])]\s+Errors:.*value: (.*)"
    message = re.sub(several, r"expected \1, got \2", message, flags=re.DOTALL)
    return message.replace("NoneType", "null").replace("<unicode string>", ", ".join(files))


def nearest_option(key: str, known_keys: list[str]) -> str | None:
    """The known option most like `key`, if also its last part is: the group alone makes no option alike."""
    matcher = difflib.SequenceMatcher(b=key.rpartition(".")[2])
    alike = []
    for known in known_keys:
        matcher.set_seq1(known.rpartition(".")[2])
        if matcher.ratio() > 0.6:
            alike.append(known)
    return next(iter(difflib.get_close_matches(key, alike, n=1, cutoff=0.6)), None)


def check_readable(files: list[str]) -> None:
    """Raises UsageError for a configuration file that is no text; the parser explains those that do not exist."""
    for file in files:
        try:
            Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"--config '{file}' is not a text file in UTF-8; give a YAML file") from None
        except OSError:
            pass


def check_groups(files: list[str]) -> None:
    """Raises UsageError for a group of options that is a bare number or list, which the parser would ignore."""
    for file in files:
        for key, value in (yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}).items():
            if key in ("trainer", "model", "data", "probe") and not isinstance(value, dict | str | None):
                raise UsageError(f"{key} in '{file}' must be a mapping of options, got {value}")


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


def check_search(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of the trainer with which a learning rate cannot be searched."""
    if divides(options["strategy"]):
        raise ValueError(f"find_lr runs on one device: trainer.strategy must not be {FSDP2}")
    if options["fast_dev_run"]:
        raise ValueError("find_lr takes --num_steps steps: trainer.fast_dev_run must be false")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`; raises UsageError if there is none or it is not one of ours."""
    if not path.is_file():
        raise UsageError(f"--ckpt_path '{path}' does not exist; give a file such as RUN_DIR/checkpoints/last.ckpt")
    try:
        return read_checkpoint(path)
    except ValueError as error:
        raise UsageError(f"--ckpt_path {error}") from None


def last_checkpoint(run_dir: str | None, required: bool) -> tuple[str | None, dict[str, Any]]:
    """The newest whole checkpoint in `run_dir` and what it holds; says which ones are torn, or that there is none yet.

    Raises UsageError if there is none and one is `required`, or all are torn.
    """
    if not run_dir:
        raise UsageError("--run_dir is required: give the folder whose checkpoint is meant, or its --ckpt_path")
    try:
        path, checkpoint, torn = newest_checkpoint(Path(run_dir))
    except OSError as error:
        raise UsageError(f"--run_dir '{run_dir}': a checkpoint cannot be read: {error.strerror}") from None
    for name in torn:
        print(f"attnres-train: '{name}' is not whole and is passed over", file=sys.stderr)
    if path is not None:
        if not required:  # or the next checkpoint that is written would put it in the place of the whole one
            set_aside(torn)
        return str(path), checkpoint
    if torn:
        raise UsageError(f"--run_dir '{run_dir}' holds no whole checkpoint; remove {FOLDER}/ to start at step 0")
    if required:
        raise UsageError(
            f"--ckpt_path is required, as --run_dir '{run_dir}' holds no {FOLDER}/last.ckpt; "
            "give the checkpoint to validate"
        )
    print(f"attnres-train: '{run_dir}' has no checkpoint yet, training starts at step 0", file=sys.stderr)
    return None, {}


def set_aside(torn: list[Path]) -> None:
    for path in torn:
        with suppress(FileNotFoundError):  # another process was first
            path.replace(path.with_name(f"{path.name}.torn"))


def as_list(value: Any) -> list[Any]:
    """An option that takes one or several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_run_dir(run_dir: str | None, ckpt_path: str | None, goes_on: bool) -> None:
    """Raises UsageError if training must not write to `run_dir`."""
    if not run_dir:
        raise UsageError("--run_dir is required: give the folder that is to receive the run, e.g. --run_dir runs/demo")
    folder = Path(run_dir)
    # wandb/ alone is what a run leaves that failed while setting up; the rest, one that was killed early.
    files = {name + end for name in ("metrics.csv", PROVENANCE) for end in ("", ".part")}
    left = {"wandb"} | ({"config.yaml", "probe", FOLDER, *files} if goes_on else set())
    if goes_on and not (folder / "hf" / RUN_FILE).exists():  # of an export that was not finished
        left.add("hf")
    try:
        if all(path.name in left for path in folder.iterdir()):
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"--run_dir '{folder}' cannot be used: {error.strerror}; give another folder") from None
    if ckpt_path is None:
        raise UsageError(
            f"--run_dir '{folder}' is not empty; give another folder, or go on with the run in it by --ckpt_path last"
        )
    if folder.resolve() not in Path(ckpt_path).resolve().parents:
        raise UsageError(
            f"--run_dir '{folder}' is not empty and --ckpt_path is of another run; give that run's folder or a new one"
        )


def check_record(run_dir: Path) -> None:
    """Raises UsageError if the record of a run's earlier starts cannot be added to."""
    try:
        if (run_dir / PROVENANCE).exists():
            read_segments(run_dir / PROVENANCE)
    except ValueError as error:
        raise UsageError(str(error)) from None


def make_run_dir(folder: Path) -> None:
    """Creates `folder`; raises UsageError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--run_dir '{folder}' cannot be created: {error.strerror}; give another folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--run_dir '{folder}' cannot be written to: Permission denied; give another folder")


def check_same_model(config: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Raises ValueError naming the first option in which the configured model and the checkpoint's differ."""
    saved = checkpoint["hyper_parameters"]["model_config"]
    names = {"qwen3": "vanilla", "qwen3_attnres": "attnres"}
    held, configured = (names.get(c["model_type"], c["model_type"]) for c in (saved, config))
    if held != configured:
        raise ValueError(
            f"--ckpt_path holds a model of architecture {held}, the configuration says {configured}; "
            "give the config.yaml of the checkpoint's run"
        )
    for key in sorted((saved.keys() | config.keys()) - NOT_OF_THE_MODEL):
        if saved.get(key) != config.get(key):
            raise ValueError(
                f"--ckpt_path holds a model with {key} {saved.get(key)}, the configuration says {config.get(key)}; "
                "give the config.yaml of the checkpoint's run"
            )


def check_same_run(hparams: Mapping[str, Any], task: Mapping[str, Any], checkpoint: dict[str, Any]) -> None:
    """Raises ValueError for options that a resumed run would not take up, or not all at once: of the optimiser, whose
    state and schedule are the checkpoint's, and of the examples."""
    groups = [(checkpoint["hyper_parameters"].get("optimizer", {}), hparams["optimizer"], "model")]
    groups.append((checkpoint.get("datamodule_hyper_parameters", {}).get("task", {}), task, "data"))
    for saved, configured, group in groups:
        for key, value in saved.items():
            if configured.get(key) != value:
                raise ValueError(
                    f"--ckpt_path holds a run with {group}.{key} {value}, the configuration says "
                    f"{configured.get(key)}: a run goes on as it began; give its config.yaml, or start another"
                )
