"""Text recall through a tokenizer: its examples as token ids, and the flip test on them.

    prompt      … Os car :
    input_ids   … Os car :    Ġ    3    3    9          the prompt, then the answer " 3392" but for its last token
    labels      …         Ġ   3    3    9    2          at the position that predicts, no shift

The space before a code belongs to the answer: some tokenizers write it with the code, others as a token of its own,
which is the same for all codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnres.tasks import TextExample, TextRecall
from probe.examples.examples import Examples, Row, as_row
from probe.examples.flip import outcomes_of_prompts
from probe.examples.prompts import tokenize
from probe.examples.tasks import SyntheticTask, check_vocabulary, describe_tokens
from probe.settings import fewest_sequences


@dataclass(frozen=True)
class TextPrompts(SyntheticTask):
    """Text recall as one tokenizer writes it.

    Attributes:
        source: where the tokenizer is from, for messages and the summary.
    """

    task: TextRecall
    tokenizer: PreTrainedTokenizerBase
    source: str

    def count(self, wanted: int | None) -> int:
        return wanted or fewest_sequences(self.task.num_pairs)

    @property
    def num_flips(self) -> int:
        return 2 if self.task.has_spare else 0

    @property
    def least_tokens(self) -> int:
        return self.task.num_pairs + self.task.distance  # each fact and each sentence is a token or more

    def check_sizes(self, config: PreTrainedConfig) -> None:
        check_vocabulary(config, len(self.tokenizer), f"that of the tokenizer of {self.source}")
        super().check_sizes(config)

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Settings, the tokenizer, and how long it makes prompts and answers."""
        return super().describe(examples) | {"tokenizer": self.source, **describe_tokens(examples)}

    def examples(self, count: int) -> Examples:
        """The first prompts of the stream.

        Raises:
            ValueError: the tokenizer does not keep an answer apart from its prompt or from its distractors.
        """
        return Examples.collate([self.encode(self.task.example(index)) for index in range(count)])

    def flipped(self, count: int, seed: int) -> Iterator[Examples]:
        """The same prompts with a new code for the name that is asked for, then for another one.

        The new code is the answer, which is right in the first case alone. None where no code is left for that.

        Raises:
            ValueError: as `examples`: the tokenizer may not be able to write a code that is new to the context.
        """
        if not self.task.has_spare:
            return
        examples = [self.task.example(index) for index in range(count)]
        others = np.random.default_rng(seed).integers(1, self.task.num_pairs, size=count).tolist()
        for shifts in ([0] * count, others):
            rows = []
            for example, shift in zip(examples, shifts, strict=True):
                changed = (example.asked + shift) % self.task.num_pairs
                codes = [example.spare if i == changed else code for i, code in enumerate(example.codes)]
                rows.append(self.encode(replace(example, codes=tuple(codes)), answer=changed))
            yield Examples.collate(rows)

    def flip_outcomes(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> pd.DataFrame | None:
        """Change the code of the name that is asked for, then of another one, in every prompt.

        "The output is the new code" where it is the most probable continuation, token by token.
        """
        if not self.num_flips:
            return None
        changed = zip((True, False), self.flipped(count, seed), strict=True)
        return outcomes_of_prompts(model, self.examples(count), changed, batch_size)

    def encode(self, example: TextExample, answer: int | None = None) -> Row:
        """(input_ids, labels, candidates) of an example, with candidate `answer` as the answer; `None`: the right one.

        Raises ValueError as `examples` does.
        """
        try:
            prompt, codes = tokenize(self.tokenizer, example.prompt, example.candidates)
            runs = {tuple(prompt[i : i + n]) for n in {len(code) for code in codes} for i in range(len(prompt))}
            if not runs.issuperset(codes):
                raise ValueError("writes a code among the facts otherwise than as an answer")
        except ValueError as error:
            about = f"template '{self.task.template}', answer '{example.answer}'"
            raise ValueError(
                f"the tokenizer of {self.source} {error} ({about}): choose another template or alphabet"
            ) from error
        return as_row(prompt, codes, example.asked if answer is None else answer)
