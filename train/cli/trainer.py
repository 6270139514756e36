"""Lightning's Trainer with the subcommands `estimate` and `find_lr`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from train.estimate.hardware import DEFAULT_MFU

LoggerName = Literal["WandbLogger", "TensorBoardLogger", "CSVLogger"]
"""Those of Lightning's loggers that need no options here (train/loggers/build.py has our own in their place)."""


class CommandTrainer(Trainer):
    """Its methods are there for their options; what they do is in `TrainCLI`, in the methods of the same names.

    Args:
        logger: What gets metrics besides metrics.csv: WandbLogger (also null and true), TensorBoardLogger, CSVLogger
            (probes.csv), another of Lightning's with its options, or a list of these; false for nothing at all.
    """

    def __init__(
        self,
        *args: Any,
        logger: LoggerName | Logger | Iterable[LoggerName | Logger] | bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, logger=logger, **kwargs)  # type: ignore[arg-type]

    def find_lr(self, min_lr: float = 1e-5, max_lr: float = 0.3, num_steps: int = 100, json: bool = False) -> None:
        """Find a learning rate to begin with.

        Args:
            min_lr: Learning rate of the first step.
            max_lr: Learning rate of the last step; rates grow exponentially in between.
            num_steps: Steps to train; fewer if the loss diverges.
            json: Print JSON instead of a table.
        """

    def estimate(
        self,
        hardware: str | None = None,
        peak_tflops: float | None = None,
        memory_gb: float | None = None,
        mfu: float = DEFAULT_MFU,
        json: bool = False,
    ) -> None:
        """Say what training will cost.

        Args:
            hardware: Device to state hours for: rtx3090, rtx4090, l40s, a100-40gb, a100-80gb, h100, h200; all of these
                if none is given.
            peak_tflops: Peak rate of another device at trainer.precision, in 10^12 operations a second.
            memory_gb: Its memory, in 10^9 bytes.
            mfu: Share of the peak rate that is reached.
            json: Print JSON instead of a table.
        """


__all__ = ["CommandTrainer"]
