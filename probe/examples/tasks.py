"""What a probe needs of a task: examples with answers, and a flip test. Adding a task means writing one such class.

task        one of attnres/tasks: token ids or text, as a function of an index
ProbeTask   what stands around it here: `TokenRecall` for token ids, `TextPrompts` (prompts.py) for text
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedModel

from attnres.tasks import MQAR
from probe.examples.examples import Examples
from probe.examples.flip import FlipResult, flip_test


class ProbeTask(Protocol):
    """A task that can be probed. The first `count` examples of its probe split are the same for every model."""

    @property
    def num_pairs(self) -> int:
        """K, the values in each context."""
        ...

    @property
    def chance_accuracy(self) -> float:
        """Of a guess among all answers that there could be."""
        ...

    @property
    def num_flips(self) -> int:
        """Changes of the flip test, each a forward pass; 0 where there is no new value to change one to."""
        ...

    def check(self, vocab_size: int) -> None:
        """Raise a ValueError if no model with this vocabulary can be probed on the task."""
        ...

    def examples(self, count: int) -> Examples:
        """The first `count` examples. Raises ValueError for examples that cannot be probed."""
        ...

    def flipped(self, count: int, seed: int) -> Iterable[Examples]:
        """The examples of the flip test, where they have to be checked before work starts."""
        ...

    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        """The flip test on the same examples; None without a new value to change one to."""
        ...

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Settings, and what else a summary should say of the examples."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Settings, as saved beside a model."""
        ...


@dataclass(frozen=True)
class TokenRecall:
    """Recall in token ids of its own (`attnres.tasks.MQAR`)."""

    task: MQAR

    @property
    def num_pairs(self) -> int:
        return self.task.num_pairs

    @property
    def chance_accuracy(self) -> float:
        return self.task.chance_accuracy

    @property
    def num_flips(self) -> int:
        return min(4, self.task.num_pairs) if self.task.num_values > self.task.num_pairs else 0

    def check(self, vocab_size: int) -> None:
        check_vocabulary(vocab_size, self.task.vocab_size, "the task's")

    def examples(self, count: int) -> Examples:
        return Examples.from_recall(self.task.batch("probe", range(count)))

    def flipped(self, count: int, seed: int) -> Iterable[Examples]:
        """None: token ids can be changed as they are."""
        return ()

    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        if not self.num_flips:
            return None
        contexts = self.task.batch("probe", range(count))
        return flip_test(model, self.task, contexts, self.num_flips, seed, batch_size)

    def describe(self, examples: Examples) -> dict[str, Any]:
        return self.task.to_dict()

    def to_dict(self) -> dict[str, Any]:
        return self.task.to_dict()


def as_probe_task(task: MQAR | ProbeTask) -> ProbeTask:
    return TokenRecall(task) if isinstance(task, MQAR) else task


def check_vocabulary(of_model: int, of_task: int, whose: str) -> None:
    """Raise a ValueError if the task has token ids that the model does not have."""
    if of_model < of_task:
        raise ValueError(f"the model's vocabulary ({of_model}) is smaller than {whose} ({of_task})")
