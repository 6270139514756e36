"""What a probe needs: examples with answers.

attnres.tasks   a task: token ids or text, as a function of an index
ProbeTask       what stands around it here: `TokenTask` for any task in token ids, `TextPrompts` (text_recall.py) for
                text; `PromptTask` (prompt_file.py) is of prompts that somebody wrote
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from transformers import PreTrainedConfig, PreTrainedModel

from attnres.inputs import check_memory
from attnres.tasks import Task, TextRecall
from probe.examples.examples import Examples
from probe.examples.flip import FlipResult, flip_outcomes
from probe.settings import fewest_sequences
from probe.vocabulary import check_names

GROUP = "group"
"""What a summary calls the group of queries that were probed, if not all were."""
FEWER_TOKENS = "make the task's settings that decide its length smaller"


class ProbeTask(ABC):
    """A task that can be probed. Its first examples are the same for every model."""

    @property
    def settings(self) -> dict[str, Any] | None:
        """Plain values from which the task can be made again, to lie beside a model; None where they are not enough."""
        return None

    @property
    def chance_accuracy(self) -> float | None:
        """Of a guess from all answers that there could be; None where these are not known."""
        return None

    @property
    def num_flips(self) -> int:
        """Changes of the flip test, each a forward pass; 0 where there is no new value to change one to."""
        return 0

    @abstractmethod
    def count(self, wanted: int | None) -> int:
        """How many examples a probe takes that wants so many; `None`: as many as the task thinks fit."""

    def check_sizes(self, config: PreTrainedConfig) -> None:  # noqa: B027 (there may be nothing to check)
        """As `check`, by the settings alone: before an example is made that may be of any length."""

    @abstractmethod
    def examples(self, count: int) -> Examples:
        """The first `count` examples. Raises ValueError for examples that cannot be probed."""

    @abstractmethod
    def check(self, config: PreTrainedConfig, examples: Sequence[Examples]) -> None:
        """Raise a ValueError if a model of this configuration cannot be run on `examples`, the flipped among them."""

    @abstractmethod
    def describe(self, examples: Examples) -> dict[str, Any]:
        """What a summary should say of the task and of the examples."""

    def flipped(self, count: int, seed: int) -> Iterable[Examples]:
        """The examples of the flip test that have to be checked before work starts."""
        return ()

    def flip_outcomes(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> pd.DataFrame | None:
        """The flip test on the same examples (`probe.examples.flip`); None without a new value to change one to."""
        return None

    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        """Its shares."""
        outcomes = self.flip_outcomes(model, count, seed, batch_size)
        return None if outcomes is None else FlipResult.of(outcomes)


@dataclass(frozen=True)
class SyntheticTask(ProbeTask):
    """One of `attnres.tasks`, which make as many examples as one likes."""

    task: Task | TextRecall

    @property
    def settings(self) -> dict[str, Any]:
        return self.task.to_dict()

    @property
    def chance_accuracy(self) -> float:
        return self.task.chance_accuracy

    @property
    @abstractmethod
    def least_tokens(self) -> int:
        """Of a sequence, as far as settings tell."""

    def check_sizes(self, config: PreTrainedConfig) -> None:
        self._check_length(config, self.least_tokens)
        check_memory(f"two sequences of {self.least_tokens:,} tokens", 64 * self.least_tokens, FEWER_TOKENS)

    def check(self, config: PreTrainedConfig, examples: Sequence[Examples]) -> None:
        self.check_sizes(config)
        self._check_length(config, max(part.input_ids.shape[1] for part in examples))

    def _check_length(self, config: PreTrainedConfig, longest: int) -> None:
        most = getattr(config, "max_position_embeddings", None)  # not all models have a limit; -1 is none, too
        if most is not None and 0 < most < longest:
            raise ValueError(
                f"the task's longest sequence has at least {longest:,} tokens, the model is made for {most:,} "
                f"(max_position_embeddings): {FEWER_TOKENS}"
            )

    def check_count(self, count: int) -> None:
        """Raise a ValueError for more examples than memory can hold."""
        what = f"{count:,} sequences of {self.least_tokens:,} tokens"
        check_memory(what, 32 * count * self.least_tokens, "take fewer (num_sequences)")

    def describe(self, examples: Examples) -> dict[str, Any]:
        return self.settings


@dataclass(frozen=True)
class TokenTask(SyntheticTask):
    """A task in token ids of its own.

    Args:
        group: probe only the queries of this one of `task.groups`; `None`: all.

    Raises:
        ValueError: the task has no such group.
    """

    task: Task
    group: str | None = None

    def __post_init__(self) -> None:
        if self.group is not None:
            check_names("group of queries", [self.group], self.task.groups)

    def count(self, wanted: int | None) -> int:
        return wanted or fewest_sequences(self.task.num_queries)

    def describe(self, examples: Examples) -> dict[str, Any]:
        return self.settings | ({} if self.group is None else {GROUP: self.group})

    @property
    def num_flips(self) -> int:
        return self.task.num_flips

    @property
    def least_tokens(self) -> int:
        return self.task.num_tokens

    def check_sizes(self, config: PreTrainedConfig) -> None:
        check_vocabulary(config, self.task.vocab_size, "the task's")
        super().check_sizes(config)

    def examples(self, count: int) -> Examples:
        return Examples.from_batch(self.task.batch("probe", range(count)), self._asked)

    @property
    def _asked(self) -> int | None:
        return None if self.group is None else self.task.groups.index(self.group)

    def flip_outcomes(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> pd.DataFrame | None:
        contexts = self.task.batch("probe", range(count))
        found = flip_outcomes(model, self.task, contexts, seed, batch_size) if self.num_flips else None
        return found if found is None or self.group is None else found[found["group"] == self.group]


def as_probe_task(task: Task | ProbeTask) -> ProbeTask:
    return TokenTask(task) if isinstance(task, Task) else task


def check_vocabulary(config: PreTrainedConfig, of_task: int, whose: str) -> None:
    """Raise a ValueError if the task has token ids that the model does not have."""
    if config.vocab_size < of_task:
        raise ValueError(f"the model's vocabulary ({config.vocab_size}) is smaller than {whose} ({of_task})")


def describe_tokens(examples: Examples) -> dict[str, float]:
    """How long a tokenizer makes prompts and answers, where each prompt has one answer, at its end."""
    of_answers = examples.queries.sum(1).double()
    return {
        "mean_prompt_tokens": float((examples.lengths - of_answers + 1).mean()),  # its last token asks for the first
        "mean_answer_tokens": float(of_answers.mean()),
    }
