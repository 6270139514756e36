"""`attnres-train`: train or validate a model on the recall task, configured by YAML files and flags.

    attnres-train fit --config configs/demo.yaml --run_dir runs/demo
    attnres-train fit --config configs/demo.yaml --run_dir runs/demo --ckpt_path last   # go on where it was killed
    attnres-train validate --config runs/demo/config.yaml    # its last checkpoint, unless --ckpt_path names another
    attnres-train study --config configs/study.yaml --dir runs/study    # several conditions and seeds
    attnres-train estimate --config configs/20m.yaml         # what it will cost; writes nothing
    attnres-train find_lr --config configs/20m.yaml          # a learning rate to begin with; writes nothing
    attnres-train panels ENTITY/PROJECT                      # lay out a W&B workspace

Bad input gives one line on standard error and exit status 2 before anything is written.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from json import dumps
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from probe.settings import TrainingProbeSettings
from probe.training.callback import ProbeCallback
from train.cli.checks import (
    UsageError,
    as_list,
    check_groups,
    check_readable,
    check_record,
    check_run_dir,
    check_same_model,
    check_same_run,
    check_search,
    check_trainer,
    explain,
    last_checkpoint,
    load_checkpoint,
    make_run_dir,
)
from train.cli.find_lr import find_learning_rate
from train.cli.quiet import silence_known_messages
from train.cli.trainer import CommandTrainer
from train.estimate.cost import ConfiguredRun, check_devices, estimate_cost
from train.estimate.hardware import Target
from train.estimate.table import as_json, table
from train.loggers.build import build_loggers, check_loggers
from train.loggers.wandb import RunWandbLogger, finish_wandb
from train.recall.data import MQARDataModule
from train.recall.module import RetrievalModule
from train.run.callbacks import SaveConfig, run_callbacks
from train.run.checkpoints import AtomicCheckpointIO

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
SUBCOMMANDS = {
    "fit": "Train a model into a run directory.",
    "validate": "Measure a checkpoint's accuracy at all K pairs; writes nothing.",
    "find_lr": "Train a few steps with growing learning rates and say where the loss falls fastest; writes nothing.",
    "estimate": "Say what training will cost: parameters, FLOPs, memory, tokens, hours; writes nothing.",
}
PANELS = "a W&B workspace laid out for these runs (attnres-train panels --help)"
STUDY = "several conditions and seeds, each trained and probed, and one table of them (attnres-train study --help)"
# A learning rate is searched in one process, of which nothing is kept.
ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False, "callbacks": None}
ONE_DEVICE |= {"enable_progress_bar": False, "limit_val_batches": 0}
# An estimate can be of another machine: Lightning would look for its devices here.
NO_DEVICES = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}


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
        commands = {"estimate": set[str](), "find_lr": set[str](), **LightningCLI.subcommands()}
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
            help="Folder that receives config.yaml, provenance.json, checkpoints/, hf/, metrics.csv, wandb/, probe/. "
            "Required by fit, which refuses a folder that is not empty unless --ckpt_path goes on with the run in it: "
            "'last' from its newest checkpoint, or from the start where it has none yet.",
        )
        parser.add_argument(
            "--wandb_artifacts",
            type=bool,
            default=False,
            help="When training ends, log hf/ and the tables of probe/ to W&B as artifacts.",
        )
        parser.add_class_arguments(TrainingProbeSettings, "probe")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("data.vocab_size", "model.vocab_size")
        parser.link_arguments("data.num_pairs", "model.num_pairs")
        parser.link_arguments("data.noise_tokens", "model.noise_tokens")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        args = sys.argv[1:] if args is None else args
        files = re.findall(r"(?:^|\0)(?:--config|-c)(?:=|\0)([^\0]+)", "\0".join(args))
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
            check_record(Path(run_dir))
            self.logger_choice = self._get(self.config, "trainer")["logger"]
            try:
                check_loggers(self.logger_choice)
            except ValueError as error:
                raise UsageError(str(error)) from None
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
        if self.checkpoint:
            check_same_run(self.model.hparams, self.datamodule.task.to_dict(), self.checkpoint)
        estimates = self.subcommand == "estimate"
        check_trainer({**config, "accelerator": "auto"} if estimates else config)
        self.probe = ProbeCallback(self._get(self.config_init, "probe"))
        self.probe.check(self.datamodule.task, self.model.model)
        if estimates:
            check_devices(config)
            return super().instantiate_trainer(**{**kwargs, **NO_DEVICES, "logger": False})
        if self.subcommand == "find_lr":
            check_search(config)
            return super().instantiate_trainer(**{**kwargs, **ONE_DEVICE})
        if isinstance(config["val_check_interval"], int):  # Lightning counts batches, we count steps
            kwargs["val_check_interval"] = config["val_check_interval"] * config["accumulate_grad_batches"]
        kwargs["logger"] = config["logger"] is not False and build_loggers(
            config["default_root_dir"], self.checkpoint.get("global_step", 0), self.logger_choice, config["logger"]
        )
        self.wandb_loggers = [logger for logger in kwargs["logger"] or () if isinstance(logger, RunWandbLogger)]
        if self._get(self.config, "wandb_artifacts") and not self.wandb_loggers:
            raise ValueError("wandb_artifacts needs W&B, which WANDB_MODE or trainer.logger leaves out")
        progress, checkpoints = (config[f"enable_{name}"] is not False for name in ("progress_bar", "checkpointing"))
        self.trainer_defaults["callbacks"] = [self.probe, *run_callbacks(progress, checkpoints)]
        kwargs["plugins"] = [AtomicCheckpointIO(), *as_list(config["plugins"])]
        trainer = super().instantiate_trainer(**kwargs)
        if self.datamodule.num_validation_examples < trainer.world_size:
            raise ValueError(
                f"data.num_validation_examples must be at least the number of devices, {trainer.world_size}"
            )
        return trainer

    def fit(self, model: RetrievalModule, datamodule: MQARDataModule, ckpt_path: str | None) -> None:
        self.trainer.fit(model, datamodule, ckpt_path=self.ckpt_path, weights_only=True)

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            if self._get(self.config, "wandb_artifacts"):
                for logger in self.wandb_loggers:
                    logger.log_artifacts()
            finish_wandb()

    def validate(
        self, model: RetrievalModule, datamodule: MQARDataModule, ckpt_path: str | None, verbose: bool
    ) -> None:
        self.trainer.validate(model, datamodule, ckpt_path=self.ckpt_path, verbose=verbose, weights_only=True)

    def find_lr(self, model: RetrievalModule, datamodule: MQARDataModule, json: bool, **options: Any) -> None:
        try:
            found = find_learning_rate(self.trainer, model, datamodule, **options)
        except ValueError as error:
            raise UsageError(str(error)) from None
        print(dumps(found.to_dict()) if json else found)

    def estimate(self, model: RetrievalModule, datamodule: MQARDataModule, json: bool, **target: Any) -> None:
        config = self._get(self.config_init, "trainer")
        run = ConfiguredRun(model, datamodule, self.probe, config)
        try:
            found = estimate_cost(run, Target(**target))
        except ValueError as error:
            raise UsageError(str(error)) from None
        print(as_json(found) if json else table(found))


def run_cli(args: list[str] | None) -> None:
    """Lightning's commands. Raises UsageError."""
    TrainCLI(
        RetrievalModule,
        MQARDataModule,
        trainer_class=CommandTrainer,
        save_config_callback=SaveConfig,
        trainer_defaults=dict(TRAINER_DEFAULTS),
        parser_class=RaisingParser,
        parser_kwargs={
            "description": "Train or validate a Block AttnRes or vanilla Qwen3 on multi-query associative recall.",
            "epilog": f"And attnres-train study: {STUDY}; attnres-train panels: {PANELS}.",
        },
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=args,
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of `attnres-train`; `args` defaults to the command line's."""
    silence_known_messages()
    arguments = sys.argv[1:] if args is None else args
    if arguments[:1] == ["study"]:
        from train.study.cli import main as study  # which reads configurations by `run_cli`

        sys.exit(study(arguments[1:]))
    if arguments[:1] == ["panels"]:
        from train.loggers.wandb_panels import main as panels

        sys.exit(panels(arguments[1:]))
    try:
        run_cli(args)
    except UsageError as error:
        print(f"attnres-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
