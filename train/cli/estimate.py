"""`attnres-train estimate`: say what training will cost; writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from probe.settings import TrailSettings
from probe.training.callback import ProbeCallback
from train.cli.checks import check_trainer
from train.cli.options import TrainCLI
from train.estimate.cost import ConfiguredRun, check_devices, estimate_cost
from train.estimate.hardware import Target
from train.estimate.table import as_json, table

# An estimate can be of another machine: Lightning would look for its devices here.
NO_DEVICES: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "logger": False,
}


class EstimateCLI(TrainCLI):
    """The model has no weights: it is on the "meta" device."""

    command = "estimate"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        self.target_options = parser.add_class_arguments(Target)
        parser.add_argument("--json", type=bool, default=False, help="Print JSON instead of a table.")

    def instantiate_classes(self) -> None:
        with torch.device("meta"):
            super().instantiate_classes()

    def instantiate_trainer(self, **_: Any) -> Trainer:
        config = self.config_init["trainer"]
        check_trainer({**config, "accelerator": "auto"})
        self.probe = ProbeCallback(self.config_init["probe"])
        self.trail = self.config_init["trail"] or TrailSettings()
        self.probe.check(self.datamodule.task, self.model.model)
        check_devices(config)
        return super().instantiate_trainer(**NO_DEVICES)

    def after_instantiate_classes(self) -> None:
        run = ConfiguredRun(self.model, self.datamodule, self.probe, self.trail, self.config_init["trainer"])
        target = Target(**{name: self.config[name] for name in self.target_options})
        self.found = estimate_cost(run, target)


def estimate(args: Sequence[str]) -> int:
    cli = EstimateCLI(args)
    print(as_json(cli.found) if cli.config.json else table(cli.found))
    return 0
