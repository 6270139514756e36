"""The options that `fit`, `validate` and `estimate` share: YAML files and flags in, model, data and trainer out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub.errors import StrictDataclassError
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from attnres.inputs import read_yaml
from probe.command_line import OneLineParser, UsageError
from probe.settings import TrailSettings, TrainingProbeSettings
from train.cli.commands import COMMANDS, PROGRAM
from train.cli.quiet import silence_known_messages
from train.recall.data import TaskDataModule
from train.recall.module import RetrievalModule

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
GROUPS = ("trainer", "model", "data", "probe", "trail")
LoggerName = Literal["WandbLogger", "TensorBoardLogger", "CSVLogger"]
"""Those of Lightning's loggers that need no options here (train/loggers/build.py has our own in their place)."""


class TrainParser(OneLineParser, LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""


def make_trainer(
    *args: Any, logger: LoggerName | Logger | Iterable[LoggerName | Logger] | bool | None = None, **kwargs: Any
) -> Trainer:
    """Lightning's Trainer, with loggers by name.

    Args:
        logger: What gets metrics besides metrics.csv: WandbLogger (also null and true), TensorBoardLogger, CSVLogger
            (probes.csv), another of Lightning's with its options, or a list of these; false for nothing at all.
    """
    return Trainer(*args, logger=logger, **kwargs)  # type: ignore[arg-type]


class TrainCLI(LightningCLI):
    """LightningCLI for one command: parses its options and makes model, data and trainer of them.

    Raises:
        UsageError: options that cannot be used.
    """

    command: str

    def __init__(self, args: Sequence[str]) -> None:
        silence_known_messages()
        try:
            super().__init__(
                RetrievalModule,
                TaskDataModule,
                save_config_callback=None,
                trainer_class=make_trainer,
                trainer_defaults=dict(TRAINER_DEFAULTS),
                parser_class=TrainParser,
                parser_kwargs={"prog": f"{PROGRAM} {self.command}", "description": COMMANDS[self.command][0]},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=list(args),
                run=False,
            )
        except (ValueError, TypeError, StrictDataclassError, MisconfigurationException) as error:
            raise UsageError(str(error)) from None

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt, default=0, help="Seed of the initial weights and of the examples."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder that receives config.yaml, provenance.json, checkpoints/, hf/, metrics.csv, wandb/, probe/ "
            "and trail/. Required by fit, which refuses a folder that is not empty unless --ckpt_path goes on with the "
            "run in it.",
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to go on from (fit) or to measure (validate); estimate does not need it. 'last' is the "
            "newest in --run_dir: validate takes it by default, and fit starts at step 0 where there is none yet.",
        )
        parser.add_argument(
            "--wandb_artifacts",
            type=bool,
            default=False,
            help="When training ends, log hf/ and the tables of probe/ to W&B as artifacts.",
        )
        parser.add_class_arguments(TrainingProbeSettings, "probe")
        parser.add_class_arguments(TrailSettings, "trail")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.set_defaults({"data.task": {"class_path": "attnres.tasks.MQAR"}})
        parser.link_arguments("data.task", "model.task", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:  # type: ignore[override]
        check_files(re.findall(r"(?:^|\0)(?:--config|-c)(?:=|\0)([^\0]+)", "\0".join(args)))
        self.config = parser.parse_args(args)


class ConfigReader(TrainCLI):
    """Parses the options of `fit` and makes nothing of them."""

    command = "fit"

    def _set_seed(self) -> None:
        """Not of this process."""

    def instantiate_classes(self) -> None:
        """None."""


def read_config(args: Sequence[str]) -> dict[str, Any]:
    """The whole configuration that `fit` has with these options. Raises UsageError for options that it refuses."""
    reader = ConfigReader(args)
    skip_null = False  # by position, as releases of jsonargparse name it differently
    return yaml.safe_load(reader.parser.dump(reader.config, "parser_mode", skip_null))


def check_files(files: Iterable[str]) -> None:
    """Raises ValueError for a configuration file that is no YAML, or has a group that the parser would ignore.

    The parser itself explains files that do not exist and keys that it does not know.
    """
    for file in files:
        if not Path(file).exists():
            continue
        try:
            content = read_yaml(Path(file))
        except ValueError as error:
            raise ValueError(f"--config {error}") from None
        for key in GROUPS if isinstance(content, dict) else ():
            if not isinstance(content.get(key), dict | str | None):
                raise ValueError(f"{key} in '{file}' must be a mapping of options, got {content[key]}")
