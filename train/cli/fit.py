"""`attnres-train fit`, which trains a model into a run directory, and `validate`, which measures a checkpoint."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning_utilities.core.rank_zero import rank_zero_only

from probe.failures import CannotGoOn, Stopped, goes_on_with
from probe.files.locks import held
from probe.training.callback import ProbeCallback
from train.cli import checks
from train.cli.commands import PROGRAM
from train.cli.options import TrainCLI
from train.loggers.build import build_loggers, check_loggers
from train.loggers.guard import END_SECONDS, GuardedLogger
from train.loggers.wandb import RunWandbLogger, finish_wandb
from train.run.callbacks import SaveConfig, Watch, run_callbacks
from train.run.checkpoints import AtomicCheckpointIO, newest_file
from train.run.ending import end_processes, explain
from train.run.provenance import FILE as PROVENANCE
from train.run.provenance import read_segments
from train.run.trail import TrailCallback


class FitCLI(TrainCLI):
    """Everything that `fit` needs, checked in order of cost."""

    command = "fit"

    def before_instantiate_classes(self) -> None:
        run_dir, ckpt_path = self.config.run_dir, self.config.ckpt_path
        self.ckpt_path, self.checkpoint = checks.find_checkpoint(ckpt_path, run_dir)
        self.newest = ckpt_path == "last" and newest_file(Path(run_dir))
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
        guarded = [logger for logger in loggers or () if isinstance(logger, GuardedLogger)]
        self.wandb_loggers = [(x, x.logger) for x in guarded if isinstance(x.logger, RunWandbLogger)]
        if self.config.wandb_artifacts and not self.wandb_loggers:
            raise ValueError("wandb_artifacts needs W&B, which WANDB_MODE or trainer.logger leaves out")
        interval = config.val_check_interval
        if isinstance(interval, int):  # Lightning counts batches, we count steps
            interval *= config.accumulate_grad_batches
        self.save_config_callback = SaveConfig
        progress, checkpoints = config.enable_progress_bar is not False, config.enable_checkpointing is not False
        trail = TrailCallback(self.config_init["trail"])
        self.trainer_defaults["callbacks"] = [Watch(), trail, probe, *run_callbacks(progress, checkpoints)]
        given = config.plugins if isinstance(config.plugins, list) else [config.plugins] if config.plugins else []
        plugins = [AtomicCheckpointIO(), *given]
        trainer = super().instantiate_trainer(logger=loggers, val_check_interval=interval, plugins=plugins)
        if self.datamodule.num_validation_examples < trainer.world_size:
            raise ValueError(
                f"data.num_validation_examples must be at least the number of devices, {trainer.world_size}"
            )
        return trainer

    def after_instantiate_classes(self) -> None:
        """Nothing is left to refuse, but that another process was faster."""
        run_dir, goes_on = Path(self.config.run_dir), self.config.ckpt_path == "last"
        checks.make_run_dir(run_dir)
        # Lightning's handlers would end a stopped training with exit status 0; ours raise (`probe.failures`).
        self.trainer._signal_connector.register_signal_handlers = lambda: None
        self.lock = ExitStack()
        if rank_zero_only.rank == 0:
            self.lock.enter_context(held(run_dir, "train"))
            checks.check_run_dir(str(run_dir), self.ckpt_path, goes_on)
            if goes_on and newest_file(run_dir) != self.newest:
                raise ValueError(f"--run_dir '{run_dir}': another process has trained there; give the command again")


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
    with cli.lock, _ending(cli, [PROGRAM, "fit", *args]):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, weights_only=True)
        for guard, logger in cli.wandb_loggers:
            if cli.config.wandb_artifacts:
                guard.call("log artifacts", logger.log_artifacts)
            guard.call("end", finish_wandb, END_SECONDS)
    return 0


@contextmanager
def _ending(cli: FitCLI, command: Sequence[str]) -> Iterator[None]:
    """What ends training ends all of its processes, and the first of them says which command goes on."""
    try:
        yield
    except (Exception, Stopped) as error:
        end_processes(cli.trainer.strategy.launcher)
        error = explain(error)
        if not cli.trainer.is_global_zero and isinstance(error, CannotGoOn | Stopped):
            sys.exit(0)  # or whoever started the processes would kill the first, which tells the status
        goes_on_with(error, _command_that_goes_on(cli.config, command))
        raise error


def _command_that_goes_on(config: Any, command: Sequence[str]) -> str:
    has_checkpoint = newest_file(Path(config.run_dir)) is not None
    if config.ckpt_path not in (None, "last") and not has_checkpoint:
        return f"{shlex.join(command)}, with another --run_dir, as there is no checkpoint in this one yet"
    return shlex.join([*command, *([] if config.ckpt_path == "last" else ["--ckpt_path", "last"])])


def validate(args: Sequence[str]) -> int:
    cli = ValidateCLI(args)
    verbose = cli.config.verbose
    cli.trainer.validate(cli.model, cli.datamodule, ckpt_path=cli.ckpt_path, verbose=verbose, weights_only=True)
    return 0
