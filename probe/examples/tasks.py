"""What a probe needs of a task: examples with answers, and a flip test. Adding a task means writing one such class.

attnres.tasks   a task: token ids or text, as a function of an index
ProbeTask       what stands around it here: `TokenRecall` for token ids, `TextPrompts` (prompts.py) for text
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from attnres.tasks import MQAR, TextRecall
from probe.examples.examples import Examples
from probe.examples.flip import FlipResult, flip_test


@dataclass(frozen=True)
class ProbeTask(ABC):
    """A task that can be probed. The first examples of its probe split are the same for every model.

    Attributes:
        recall: has `num_pairs` (K, the values in each context), `chance_accuracy` and plain settings (`to_dict`).
        num_flips: changes of the flip test, each a forward pass; 0 where there is no new value to change one to.
    """

    recall: MQAR | TextRecall

    @property
    @abstractmethod
    def num_flips(self) -> int: ...

    @abstractmethod
    def check(self, vocab_size: int) -> None:
        """Raise a ValueError if no model with this vocabulary can be probed on the task."""

    @abstractmethod
    def examples(self, count: int) -> Examples:
        """The first `count` examples. Raises ValueError for examples that cannot be probed."""

    @abstractmethod
    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        """The flip test on the same examples; None without a new value to change one to."""

    def flipped(self, count: int, seed: int) -> Iterable[Examples]:
        """The examples of the flip test that have to be checked before work starts."""
        return ()

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Settings, and what else a summary should say of the examples."""
        return self.recall.to_dict()


@dataclass(frozen=True)
class TokenRecall(ProbeTask):
    """Recall in token ids of its own."""

    recall: MQAR

    @property
    def num_flips(self) -> int:
        return min(4, self.recall.num_pairs) if self.recall.num_values > self.recall.num_pairs else 0

    def check(self, vocab_size: int) -> None:
        check_vocabulary(vocab_size, self.recall.vocab_size, "the task's")

    def examples(self, count: int) -> Examples:
        return Examples.from_recall(self.recall.batch("probe", range(count)))

    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        contexts = self.recall.batch("probe", range(count))
        return flip_test(model, self.recall, contexts, self.num_flips, seed, batch_size) if self.num_flips else None


def as_probe_task(task: MQAR | ProbeTask) -> ProbeTask:
    return TokenRecall(task) if isinstance(task, MQAR) else task


def check_vocabulary(of_model: int, of_task: int, whose: str) -> None:
    """Raise a ValueError if the task has token ids that the model does not have."""
    if of_model < of_task:
        raise ValueError(f"the model's vocabulary ({of_model}) is smaller than {whose} ({of_task})")
