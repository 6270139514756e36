"""Text recall through a tokenizer: prompts to token ids, and each answer's tokens found exactly.

    prompt      … Os car :
    input_ids   … Os car :    Ġ    3    3    9          the prompt, then the answer " 3392" but for its last token
    labels      …         Ġ   3    3    9    2          at the position that predicts, no shift

The space before a code belongs to the answer: some tokenizers write it with the code, others as a token of its own,
which is the same for all codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnres.tasks import IGNORE_INDEX, TextExample, TextRecall
from probe.examples.examples import NO_CANDIDATE, Examples
from probe.examples.flip import FlipResult, recall_accuracy
from probe.examples.tasks import ProbeTask, check_vocabulary

Row = tuple[Tensor, Tensor, Tensor]
"""One sequence of `Examples.collate`."""


@dataclass(frozen=True)
class TextPrompts(ProbeTask):
    """Text recall as one tokenizer writes it.

    Attributes:
        source: where the tokenizer is from, for messages and the summary.
    """

    recall: TextRecall
    tokenizer: PreTrainedTokenizerBase
    source: str

    @property
    def num_flips(self) -> int:
        return 2 if self.recall.has_spare else 0

    def check(self, vocab_size: int) -> None:
        check_vocabulary(vocab_size, len(self.tokenizer), f"that of the tokenizer of {self.source}")

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Settings, the tokenizer, and how long it makes prompts and answers."""
        per_answer = examples.queries.sum() / examples.starts.sum()
        return self.recall.to_dict() | {
            "tokenizer": self.source,
            "mean_prompt_tokens": float(examples.lengths.double().mean()),
            "mean_answer_tokens": float(per_answer),
        }

    def examples(self, num_sequences: int) -> Examples:
        """The first prompts of the stream.

        Raises:
            ValueError: the tokenizer does not keep an answer apart from its prompt or from its distractors.
        """
        return Examples.collate([self.encode(self.recall.example(index)) for index in range(num_sequences)])

    def flipped(self, num_sequences: int, seed: int) -> Iterator[Examples]:
        """The same prompts with a new code for the name that is asked for, then for another one.

        The new code is the answer, which is right in the first case alone. None where no code is left for that.

        Raises:
            ValueError: as `examples`: the tokenizer may not be able to write a code that is new to the context.
        """
        if not self.recall.has_spare:
            return
        examples = [self.recall.example(index) for index in range(num_sequences)]
        others = np.random.default_rng(seed).integers(1, self.recall.num_pairs, size=num_sequences).tolist()
        for shifts in ([0] * num_sequences, others):
            rows = []
            for example, shift in zip(examples, shifts, strict=True):
                changed = (example.asked + shift) % self.recall.num_pairs
                codes = [example.spare if i == changed else code for i, code in enumerate(example.codes)]
                rows.append(self.encode(replace(example, codes=tuple(codes)), answer=changed))
            yield Examples.collate(rows)

    def flip_test(self, model: PreTrainedModel, count: int, seed: int, batch_size: int) -> FlipResult | None:
        """Change the code of the name that is asked for, then of another one, in every prompt.

        "The output is the new code" where it is the most probable continuation, token by token.
        """
        if not self.num_flips:
            return None
        queried, other = (recall_accuracy(model, each, batch_size) for each in self.flipped(count, seed))
        return FlipResult(queried, other, n_queried=count, n_other=count, n_sequences=count)

    def encode(self, example: TextExample, answer: int | None = None) -> Row:
        """(input_ids, labels, candidates) of an example, with candidate `answer` as the answer; `None`: the right one.

        Raises ValueError as `examples` does.
        """
        prompt, *wholes = self._token_ids(example)
        if any(whole[: len(prompt)] != prompt for whole in wholes):
            raise self._error(f"joins the end of the prompt, {example.prompt[-12:]!r}, to what follows it", example)
        codes = [tuple(whole[len(prompt) :]) for whole in wholes]
        if any(b[: len(a)] == a for a, b in pairwise(sorted(codes))):
            raise self._error("does not tell the codes apart", example)
        runs = {tuple(prompt[i : i + n]) for n in {len(code) for code in codes} for i in range(len(prompt))}
        if not runs.issuperset(codes):
            raise self._error("writes a code among the facts otherwise than as an answer", example)
        tokens = codes[example.asked if answer is None else answer]
        ids = torch.tensor([*prompt, *tokens[:-1]])
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[len(prompt) - 1 :] = torch.tensor(tokens)
        longest = max(len(code) for code in codes)
        return ids, labels, torch.tensor([[*code, *[NO_CANDIDATE] * (longest - len(code))] for code in codes])

    def _token_ids(self, example: TextExample) -> list[list[int]]:
        """Of the prompt, and of the prompt with each candidate after it.

        With the special tokens that the tokenizer puts before a text, and without those it puts after.
        """
        texts = [example.prompt, *(example.prompt + code for code in example.candidates)]
        encoded = self.tokenizer(texts, return_special_tokens_mask=True)
        found = []
        for ids, is_added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            if any(
                token == self.tokenizer.unk_token_id and not added for token, added in zip(ids, is_added, strict=True)
            ):
                raise self._error("has no token for a part of the text", example)
            end = len(ids)
            while end and is_added[end - 1]:
                end -= 1
            found.append(list(ids[:end]))
        return found

    def _error(self, what: str, example: TextExample) -> ValueError:
        about = f"template '{self.recall.template}', answer '{example.answer}'"
        return ValueError(f"the tokenizer of {self.source} {what} ({about}): choose another template or alphabet")
