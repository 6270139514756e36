"""A prompt of any task, its answer and distractors; and how a tokenizer writes them.

prompt      The capital of Peru is
answer       Lima                          with the space before it: it is what follows the prompt
distractors  Quito,  Oslo
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from attnres.inputs import first_repeated

MOST_DISTRACTORS = 1000
"""Of a prompt, which is written once with each."""
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
"""NUL, where some tokenizers end, and halves of surrogate pairs, which are not in UTF-8."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        prompt: all that stands before the answer.
        answer: the text that should follow, from its space on.
        distractors: texts that could follow in its place; they need not be in the prompt.
        cluster: prompts of one id depend on each other (one story, one template) and are one cluster of all statistics;
            `None` for a cluster of its own.

    Raises:
        ValueError: a field of another type, an empty text, no distractor, one that is the answer, or one twice.
    """

    prompt: str
    answer: str
    distractors: tuple[str, ...]
    cluster: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.distractors, str) or not isinstance(self.distractors, Sequence):
            raise ValueError(f"distractors must be a list of strings, got {reprlib.repr(self.distractors)}")
        object.__setattr__(self, "distractors", tuple(self.distractors))  # frozen, and lists are welcome
        named = [("prompt", self.prompt), ("answer", self.answer), *(("a distractor", d) for d in self.distractors)]
        for name, text in named + [("cluster", self.cluster)] * (self.cluster is not None):
            if not isinstance(text, str):
                raise ValueError(f"{name} must be a string, got {reprlib.repr(text)}")
            if not text:
                raise ValueError(f"{name} is empty")
            if wrong := UNWRITABLE.search(text):
                raise ValueError(f"{name} holds {wrong[0]!r}, which is no character of a text: leave it out")
        if len(self.distractors) > MOST_DISTRACTORS:
            raise ValueError(
                f"there are {len(self.distractors):,} distractors, at most {MOST_DISTRACTORS:,} are compared"
            )
        if not self.distractors:
            raise ValueError("distractors is empty: the answer is compared with at least one")
        if self.answer in self.distractors:
            raise ValueError(f"the distractor {self.answer!r} is the answer")
        if repeated := first_repeated(self.distractors):
            raise ValueError(f"the distractor {repeated!r} is there twice")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Prompt:
        """From plain values. Raises ValueError as the class does, and for a key that is unknown or missing."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(content.keys() - known):
            raise ValueError(f"unknown key {reprlib.repr(unknown[0])}; choose from {', '.join(known)}")
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in content]:
            raise ValueError(f"key '{missing[0]}' is missing")
        return cls(**content)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, prompt: str, texts: Sequence[str]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """Token ids of `prompt`, and of each of `texts` as it is written after the prompt.

    With the special tokens that the tokenizer puts before a text, and without those it puts after.

    Raises:
        ValueError: why the texts' tokens cannot be asked for, as what follows "the tokenizer".
    """
    encoded = tokenizer([prompt, *(prompt + text for text in texts)], return_special_tokens_mask=True)
    found: list[list[int]] = []
    for ids, is_added in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if any(token == tokenizer.unk_token_id and not added for token, added in zip(ids, is_added, strict=True)):
            raise ValueError("has no token for a part of the text")
        end = len(ids)
        while end and is_added[end - 1]:
            end -= 1
        found.append(list(ids[:end]))
    start, *wholes = found
    if not start:
        raise ValueError("writes the prompt with no token")
    codes = [tuple(whole[len(start) :]) for whole in wholes]
    if any(whole[: len(start)] != start for whole in wholes) or not all(codes):
        raise ValueError(f"joins the end of the prompt, {prompt[-12:]!r}, to what follows it")
    for (code, text), (other, longer) in pairwise(sorted(zip(codes, texts, strict=True))):
        if other[: len(code)] == code:
            why = "the same tokens" if code == other else f"the tokens of {text!r} begin those of {longer!r}"
            raise ValueError(f"does not tell {text!r} and {longer!r} apart ({why})")
    return start, codes
