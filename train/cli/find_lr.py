"""A learning-rate range test (arXiv:1506.01186, section 3.3) by Lightning's finder.

The rate grows exponentially from step to step; where the loss falls most steeply is a rate to begin with.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.tuner.tuning import Tuner

NUM_LINES = 15
SMOOTHING = 0.98
"""Of Lightning's finder: the weight of the past in the mean of losses."""


@dataclass(frozen=True)
class RangeTest:
    """The result.

    Attributes:
        rates, losses: (steps,) learning rate and smoothed training loss of each step, until the loss diverged.
        suggestion: the rate at which the loss falls most steeply; `None` where it did not fall.
        configured: `model.learning_rate`.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float | None
    configured: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "suggestion": self.suggestion,
            "configured": self.configured,
            "rates": self.rates,
            "losses": self.losses,
        }

    def __str__(self) -> str:
        every = max(1, len(self.rates) // NUM_LINES)
        lines = ["learning rate   loss (smoothed)"]
        lines += [f"{r:13.2e}   {x:.3f}" for r, x in zip(self.rates[::every], self.losses[::every], strict=True)]
        if self.suggestion is None:
            lines.append("the loss did not fall: give more --num_steps, or a larger --max_lr")
        else:
            best = self.rates[self.losses.index(min(self.losses))]
            lines.append(f"steepest fall at {self.suggestion:.2e}, lowest loss at {best:.2e}")
        return "\n".join([*lines, f"model.learning_rate is {self.configured:.2e}"])


def find_learning_rate(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule,
    min_lr: float,
    max_lr: float,
    num_steps: int,
) -> RangeTest:
    """Train for `num_steps` steps with rates from `min_lr` to `max_lr`; nothing is kept.

    Raises:
        ValueError: rates that do not grow from above zero, or too few steps for a slope.
    """
    if not 0 < min_lr < max_lr:
        raise ValueError(f"min_lr ({min_lr:g}) must be positive and below max_lr ({max_lr:g})")
    if num_steps < 20:
        raise ValueError(f"num_steps must be at least 20, got {num_steps}")
    options: dict[str, Any] = {"min_lr": min_lr, "max_lr": max_lr, "num_training": num_steps, "update_attr": False}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer._default_root_dir = folder  # type: ignore[attr-defined]  # it saves the model here, and restores it
        finder = Tuner(trainer).lr_find(module, datamodule=data, **options)
    assert finder is not None
    rates, losses = finder.results["lr"], finder.results["loss"]
    # Lightning (2.6) divides a smoothed loss by what would be right one step later, the first by about twice too much.
    steps = range(1, len(losses) + 1)
    losses = [x * (1 - SMOOTHING ** (n + 1)) / (1 - SMOOTHING**n) for n, x in zip(steps, losses, strict=True)]
    finder.results["loss"] = losses
    fell = min(losses) < losses[0]
    return RangeTest(rates, losses, finder.suggestion() if fell else None, float(module.learning_rate))  # type: ignore[arg-type]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the finder's words on the checkpoint that it makes and restores."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["RangeTest", "find_learning_rate"]
