"""`attnres-train fit`, which trains a model into a run directory, and `validate`, which measures a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from probe.training.callback import ProbeCallback
from train.cli import checks
from train.cli.options import TrainCLI
from train.loggers.build import build_loggers, check_loggers
from train.loggers.wandb import RunWandbLogger, finish_wandb
from train.run.callbacks import SaveConfig, run_callbacks
from train.run.checkpoints import AtomicCheckpointIO
from train.run.provenance import FILE as PROVENANCE
from train.run.provenance import read_segments
from train.run.trail import TrailCallback


class FitCLI(TrainCLI):
    """Everything that `fit` needs, checked in order of cost."""

    command = "fit"

    def before_instantiate_classes(self) -> None:
        run_dir, ckpt_path = self.config.run_dir, self.config.ckpt_path
        self.ckpt_path, self.checkpoint = checks.find_checkpoint(ckpt_path, run_dir)
        checks.check_run_dir(run_dir, self.ckpt_path, goes_on=ckpt_path == "last")
        if (record := Path(run_dir) / PROVENANCE).exists():
            read_segments(record)  # of its earlier starts, to which this one is added
        check_loggers(self.config.trainer.logger)

    def instantiate_trainer(self, **_: Any) -> Trainer:
        if self.checkpoint:
            checks.check_same_model(self.model.hparams["model_config"], self.model.model.state_dict(), self.checkpoint)
            checks.check_same_run(self.model.hparams, self.datamodule.task.to_dict(), self.checkpoint)
        config = self.config_init["trainer"]
        checks.check_trainer(config)
        probe = ProbeCallback(self.config_init["probe"])
        probe.check(self.datamodule.task, self.model.model)
        loggers = config.logger is not False and build_loggers(
            config.default_root_dir,
            self.checkpoint.get("global_step", 0),
            self.config.trainer.logger,
            config.logger,
        )
        self.wandb_loggers = [logger for logger in loggers or () if isinstance(logger, RunWandbLogger)]
        if self.config.wandb_artifacts and not self.wandb_loggers:
            raise ValueError("wandb_artifacts needs W&B, which WANDB_MODE or trainer.logger leaves out")
        interval = config.val_check_interval
        if isinstance(interval, int):  # Lightning counts batches, we count steps
            interval *= config.accumulate_grad_batches
        self.save_config_callback = SaveConfig
        progress, checkpoints = config.enable_progress_bar is not False, config.enable_checkpointing is not False
        trail = TrailCallback(self.config_init["trail"])
        self.trainer_defaults["callbacks"] = [trail, probe, *run_callbacks(progress, checkpoints)]
        given = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        plugins = [AtomicCheckpointIO(), *given]
        trainer = super().instantiate_trainer(logger=loggers, val_check_interval=interval, plugins=plugins)
        if self.datamodule.num_validation_examples < trainer.world_size:
            raise ValueError(
                f"data.num_validation_examples must be at least the number of devices, {trainer.world_size}"
            )
        return trainer

    def after_instantiate_classes(self) -> None:
        checks.make_run_dir(Path(self.config.run_dir))  # nothing is left to refuse


class ValidateCLI(TrainCLI):
    command = "validate"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--verbose", type=bool, default=True, help="Print the results.")

    def before_instantiate_classes(self) -> None:
        ckpt_path, run_dir = self.config.ckpt_path or "last", self.config.run_dir
        self.ckpt_path, self.checkpoint = checks.find_checkpoint(ckpt_path, run_dir, required=True)

    def instantiate_trainer(self, **_: Any) -> Trainer:
        checks.check_same_model(self.model.hparams["model_config"], self.model.model.state_dict(), self.checkpoint)
        return super().instantiate_trainer(logger=False)


def fit(args: Sequence[str]) -> int:
    cli = FitCLI(args)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
    if cli.trainer.is_global_zero:
        if cli.config.wandb_artifacts:
            for logger in cli.wandb_loggers:
                logger.log_artifacts()
        finish_wandb()
    return 0


def validate(args: Sequence[str]) -> int:
    cli = ValidateCLI(args)
    verbose = cli.config.verbose
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, verbose=verbose, weights_only=True)
    return 0
