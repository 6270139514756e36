"""The size of examples at each training step: a function of the step number, or of earlier accuracies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EMA_DECAY = 0.8


@dataclass(frozen=True)
class CurriculumConfig:
    """Growth of the examples from the smallest size to that of the task, K, during training. The task says what counts.

    Args:
        kind: `off` (size K from the start), `linear` (with the step number) or `when_solved` (with the accuracy).
        steps: linear: the number of steps after which size K is reached.
        threshold: when_solved: the running training accuracy at the current size, in (0, 1), above which it grows.
        growth: when_solved: `double` (1, 2, 4, ..., K, from a smallest size of 1) or `increment` (1, 2, 3, ..., K).

    Raises:
        ValueError: `steps` is not positive or `threshold` is outside (0, 1).
    """

    kind: Literal["off", "linear", "when_solved"] = "when_solved"
    steps: int = 600
    threshold: float = 0.9
    growth: Literal["double", "increment"] = "double"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"curriculum.steps must be a positive integer, got {self.steps}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"curriculum.threshold must be between 0 and 1 (exclusive), got {self.threshold}")


class Curriculum:
    """The current size, and the state it depends on.

    Args:
        config: how it grows.
        full_size: K, the final one.
        first_size: the one that it begins with.
    """

    def __init__(self, config: CurriculumConfig, full_size: int, first_size: int = 1) -> None:
        self.config = config
        self.full_size = full_size
        self.first_size = first_size
        self.size = full_size if config.kind == "off" else first_size
        self.running_accuracy = 0.0

    def update(self, step: int, accuracy: float) -> None:
        """Decide the size of step `step + 1` from the result of step `step` (the first is 0).

        Args:
            accuracy: training accuracy of step `step`, in [0, 1], over all devices.
        """
        if self.config.kind == "linear":
            grown = (self.full_size - self.first_size) * (step + 1) // self.config.steps
            self.size = min(self.first_size + grown, self.full_size)
        elif self.config.kind == "when_solved":
            self.running_accuracy = EMA_DECAY * self.running_accuracy + (1 - EMA_DECAY) * accuracy
            if self.running_accuracy > self.config.threshold and self.size < self.full_size:
                larger = 2 * self.size if self.config.growth == "double" else self.size + 1
                self.size = min(larger, self.full_size)
                self.running_accuracy = 0.0  # says nothing about the new size

    def state_dict(self) -> dict[str, int | float]:
        return {"size": self.size, "running_accuracy": self.running_accuracy}

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        self.size = min(int(state["size"]), self.full_size)
        self.running_accuracy = float(state["running_accuracy"])
