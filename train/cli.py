"""`attnres-train`: train or validate a model on the recall task, configured by YAML files and flags.

    attnres-train fit --config configs/demo.yaml --run_dir runs/demo
    attnres-train fit --config configs/demo.yaml --run_dir runs/demo --ckpt_path last   # go on where it was killed
    attnres-train validate --config runs/demo/config.yaml    # its last checkpoint, unless --ckpt_path names another
    attnres-train estimate --config configs/20m.yaml         # what it will cost; writes nothing

Bad input gives one line on standard error and exit status 2 before anything is written.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
import wandb
import yaml
from huggingface_hub.errors import StrictDataclassError
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from probe.callback import ProbeCallback
from train.callbacks import SaveConfig, run_callbacks
from train.checkpoints import FOLDER, AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from train.data import MQARDataModule
from train.estimate import Run, Target, check_devices, estimate
from train.estimate_table import as_json, table
from train.loggers import build_loggers
from train.module import RetrievalModule
from train.quiet import silence_known_messages
from train.sharding import FSDP2, FSDP2Strategy
from train.trainer import EstimatingTrainer

TRAINER_DEFAULTS = {
    "max_steps": 600,
    "max_epochs": -1,
    "val_check_interval": 50,
    "check_val_every_n_epoch": None,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
POSITIVE_TRAINER_OPTIONS = (
    "max_steps",
    "val_check_interval",
    "accumulate_grad_batches",
    "log_every_n_steps",
    "limit_train_batches",
)
SUBCOMMANDS = {
    "fit": "Train a model into a run directory.",
    "validate": "Measure a checkpoint's accuracy at all K pairs; writes nothing.",
    "estimate": "Say what training will cost: parameters, FLOPs, memory, tokens, hours; writes nothing.",
}
# An estimate can be of another machine: Lightning would look for its devices here.
NO_DEVICES = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
# Of a configuration, what says where it was written and not what the model is.
NOT_OF_THE_MODEL = {"_name_or_path", "transformers_version"}


class UsageError(Exception):
    """Input that cannot be used; the message is one line for the user."""


class RaisingParser(LightningArgumentParser):
    """Raises instead of printing its usage, and takes no abbreviated options: they would hide typos."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(message)


class TrainCLI(LightningCLI):
    """LightningCLI with a run directory."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = {"estimate": set[str](), **LightningCLI.subcommands()}
        # weights_only is not an option: our checkpoints hold plain values, and what does not is refused.
        return {name: commands[name] | {"weights_only"} for name in SUBCOMMANDS}

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **{name: {"description": text} for name, text in SUBCOMMANDS.items()})
        for action in parser._subcommands_action._choices_actions:  # type: ignore[union-attr]
            action.help = SUBCOMMANDS[action.dest]  # Lightning's are those of Trainer.fit and Trainer.validate

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt, default=0, help="Seed of the initial weights and of the examples."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder that receives config.yaml, checkpoints/, hf/, metrics.csv, wandb/ and probe/. Required by "
            "fit, which refuses a folder that is not empty unless --ckpt_path goes on with the run in it: 'last' from "
            "its newest checkpoint, or from the start where it has none yet.",
        )
        parser.add_lightning_class_args(ProbeCallback, "probe")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("data.vocab_size", "model.vocab_size")
        parser.link_arguments("data.num_pairs", "model.num_pairs")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        args = sys.argv[1:] if args is None else args
        files = re.findall(r"(?:--config|-c)(?:=|\0)([^\0]+)", "\0".join(args))
        check_readable(files)
        try:
            self.config = parser.parse_args(args)
        except UsageError as error:
            command = next((word for word in args if word in SUBCOMMANDS), "fit")
            known = list(self._subcommand_parsers[command].get_defaults().keys())
            raise UsageError(explain(str(error), known, files)) from None
        check_groups(files)

    def _parse_ckpt_path(self) -> None:
        """Not Lightning's, which takes a checkpoint's hyperparameters for options of the model."""

    def before_instantiate_classes(self) -> None:
        run_dir, ckpt_path = (self._get(self.config, key) for key in ("run_dir", "ckpt_path"))
        validates, goes_on = self.subcommand == "validate", ckpt_path == "last"
        self.checkpoint: dict[str, Any] = {}
        if goes_on or (validates and ckpt_path is None):
            ckpt_path, self.checkpoint = last_checkpoint(run_dir, required=validates)
        elif ckpt_path is not None:
            self.checkpoint = load_checkpoint(Path(ckpt_path))
        if self.subcommand == "fit":
            check_run_dir(run_dir, ckpt_path, goes_on)
        self.ckpt_path = ckpt_path

    def instantiate_classes(self) -> None:
        device = torch.device("meta") if self.subcommand == "estimate" else nullcontext()
        try:
            with device:
                super().instantiate_classes()
        except (ValueError, TypeError, StrictDataclassError, MisconfigurationException) as error:
            raise UsageError(str(error)) from None
        if self.subcommand == "fit":  # nothing is left to refuse
            make_run_dir(Path(self._get(self.config, "run_dir")))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        if self.checkpoint:
            check_same_model(self.model.hparams["model_config"], self.checkpoint)
        if self.subcommand == "validate":
            return super().instantiate_trainer(**{**kwargs, "logger": False})
        estimates = self.subcommand == "estimate"
        check_trainer({**config, "accelerator": "auto"} if estimates else config)
        self._get(self.config_init, "probe").check(self.datamodule.task, self.model.model)
        if estimates:
            check_devices(config)
            return super().instantiate_trainer(**{**kwargs, **NO_DEVICES, "logger": False})
        if isinstance(config["val_check_interval"], int):  # Lightning counts batches, we count steps
            kwargs["val_check_interval"] = config["val_check_interval"] * config["accumulate_grad_batches"]
        if config["logger"] in (None, True):
            kwargs["logger"] = build_loggers(config["default_root_dir"], self.checkpoint.get("global_step", 0))
        progress, checkpoints = (config[f"enable_{name}"] is not False for name in ("progress_bar", "checkpointing"))
        self.trainer_defaults["callbacks"] = run_callbacks(progress, checkpoints)
        kwargs["plugins"] = [AtomicCheckpointIO(), *as_list(config["plugins"])]
        return super().instantiate_trainer(**kwargs)

    def fit(self, model: RetrievalModule, datamodule: MQARDataModule, ckpt_path: str | None) -> None:
        self.trainer.fit(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True)

    def after_fit(self) -> None:
        if wandb.run is not None:  # or W&B would write the rest when Python exits
            wandb.finish()

    def validate(
        self, model: RetrievalModule, datamodule: MQARDataModule, ckpt_path: str | None, verbose: bool
    ) -> None:
        self.trainer.validate(model, datamodule, ckpt_path=self.ckpt_path, verbose=verbose, weights_only=True)

    def estimate(self, model: RetrievalModule, datamodule: MQARDataModule, json: bool, **target: Any) -> None:
        config = self._get(self.config_init, "trainer")
        run = Run(model, datamodule, self._get(self.config_init, "probe"), config)
        try:
            found = estimate(
                run, Target(**target), lambda: self._get(self.parser.instantiate_classes(self.config), "model")
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        print(as_json(found) if json else table(found))


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
    if options["max_epochs"] != -1:
        raise ValueError(
            f"trainer.max_epochs must be -1, got {options['max_epochs']}: trainer.max_steps says how long to train"
        )


def check_strategy(strategy: Any) -> None:
    """Raises ValueError for a strategy under which models would not train, or not resume."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    known = isinstance(strategy, DDPStrategy | SingleDeviceStrategy | FSDP2Strategy)
    if not known and not re.match(rf"auto$|ddp|{FSDP2}$", str(name)):
        raise ValueError(f"trainer.strategy must be auto, ddp or {FSDP2} (parameters divided over devices), got {name}")


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
    path, checkpoint, torn = newest_checkpoint(Path(run_dir))
    for name in torn:
        print(f"attnres-train: '{name}' is not whole and is passed over", file=sys.stderr)
    if path is not None:
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


def as_list(value: Any) -> list[Any]:
    """An option that takes one or several."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def check_run_dir(run_dir: str | None, ckpt_path: str | None, goes_on: bool) -> None:
    """Raises UsageError if training must not write to `run_dir`."""
    if not run_dir:
        raise UsageError("--run_dir is required: give the folder that is to receive the run, e.g. --run_dir runs/demo")
    folder = Path(run_dir)
    # wandb/ alone is what a run leaves that failed while setting up; the rest, one that was killed early.
    left = {"wandb"} | ({"config.yaml", "metrics.csv", "metrics.csv.part", "probe", FOLDER} if goes_on else set())
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


def main(args: list[str] | None = None) -> None:
    """Entry point of `attnres-train`; `args` defaults to the command line's."""
    silence_known_messages()
    try:
        TrainCLI(
            RetrievalModule,
            MQARDataModule,
            trainer_class=EstimatingTrainer,
            save_config_callback=SaveConfig,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            parser_class=RaisingParser,
            parser_kwargs={
                "description": "Train or validate a Block AttnRes or vanilla Qwen3 on multi-query associative recall.",
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )
    except UsageError as error:
        print(f"attnres-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
