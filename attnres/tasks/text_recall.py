"""Text recall: the recall task in words, so that models with any tokenizer are asked the same questions.

With three pairs, the template `list`, codes of four digits and a distance of one sentence:

    Codes by name:
    Clara: 0715
    Oscar: 3392
    Irene: 8126
    It rained for most of the afternoon.

    The same codes in another order:
    Oscar:                              <- the prompt ends here; the answer is " 3392", the distractors " 0715", " 8126"

One prompt asks one question. Answers in the input would open a second way to gain accuracy, elimination among the codes
that are left (see MQAR), and contexts of their own make questions independent, at the same cost per question.

Templates, names, what codes are made of, and sentences that fill the distance are the JSON files in `data/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np

from attnres.inputs import LARGEST_INTEGER, check_number
from attnres.tasks.settings import MOST_TOKENS, read_settings

MOST_PARTS = 1000
"""Of a code."""


@cache
def read_data(name: str) -> Any:
    """The content of `data/<name>.json`."""
    return json.loads(files("attnres.tasks").joinpath("data", f"{name}.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class TextExample:
    """Facts and a question.

    Attributes:
        template: name of the template.
        names, codes: (pairs,) in context order; `codes[i]` belongs to `names[i]`.
        asked: which of them the question asks for.
        sentences: what stands between the facts and the question.
        spare: a code like the others that is not in the context; `None` where there is none left.
    """

    template: str
    names: tuple[str, ...]
    codes: tuple[str, ...]
    asked: int
    sentences: tuple[str, ...]
    spare: str | None

    @property
    def prompt(self) -> str:
        """All that stands before the answer; no space at its end."""
        template = read_data("templates")[self.template]
        pairs = zip(self.names, self.codes, strict=True)
        facts = (template["fact"].format(name=name, code=code) for name, code in pairs)
        fillers = (template["filler"].format(sentence=sentence) for sentence in self.sentences)
        question = template["question"].format(name=self.names[self.asked])
        return "".join((template["header"], *facts, *fillers, question))

    @property
    def candidates(self) -> tuple[str, ...]:
        """(pairs,) the codes as the text that would follow the prompt: most tokenizers write a space with its word."""
        return tuple(f" {code}" for code in self.codes)

    @property
    def answer(self) -> str:
        """The candidate that is right; the others are its distractors."""
        return self.candidates[self.asked]


@dataclass(frozen=True)
class TextRecall:
    """The task: a pure function from (settings, index) to an example. There is one stream: nothing is trained on it.

    Args:
        num_pairs: K, the number of facts in a context. Names and codes are distinct.
        template: a name in `data/templates.json`.
        alphabet: what codes are made of, a name in `data/codes.json`.
        code_length: parts of a code: digits, letters or words.
        distractor_similarity: how many leading parts all codes of a context share; what is left tells them apart.
        distance: sentences between the last fact and the question, whichever fact is asked for: an earlier one is
            further away by the facts after it.
        seed: another seed is another, independent stream of examples.

    Raises:
        ValueError: a name that does not exist, a number out of range, or fewer possible codes or names than pairs.
    """

    name: ClassVar[str] = "text_recall"

    num_pairs: int = 8
    template: str = "list"
    alphabet: str = "digits"
    code_length: int = 4
    distractor_similarity: int = 0
    distance: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key, known in (("template", "templates"), ("alphabet", "codes")):
            if getattr(self, key) not in read_data(known):
                raise ValueError(
                    f"{key} '{getattr(self, key)}' does not exist; choose from {', '.join(read_data(known))}"
                )
        for key, least in (("num_pairs", 2), ("code_length", 1), ("distractor_similarity", 0), ("distance", 0)):
            check_number(key, getattr(self, key), least, MOST_TOKENS if key == "distance" else MOST_PARTS)
        check_number("seed", self.seed, 0, LARGEST_INTEGER)
        if self.distractor_similarity >= self.code_length:
            raise ValueError(
                f"distractor_similarity ({self.distractor_similarity}) must be below code_length ({self.code_length}): "
                "codes that share all of their parts are the same"
            )
        if self.num_pairs > len(read_data("names")):
            raise ValueError(
                f"num_pairs ({self.num_pairs}) must be at most {len(read_data('names'))}, the number of names"
            )
        if self.num_pairs > self._num_alike:
            raise ValueError(
                f"num_pairs ({self.num_pairs}) is too large: only {self._num_alike} codes of {self.code_length} "
                f"{self.alphabet} share their first {self.distractor_similarity}; make code_length larger"
            )

    @property
    def size(self) -> int:
        """K, as of the tasks in token ids."""
        return self.num_pairs

    @property
    def _num_alike(self) -> int:
        """How many codes share one and the same beginning of `distractor_similarity` parts."""
        return len(read_data("codes")[self.alphabet]["parts"]) ** (self.code_length - self.distractor_similarity)

    @property
    def has_spare(self) -> bool:
        """Whether there is a code like those of a context that is not in it."""
        return self._num_alike > self.num_pairs

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of a guess from all codes that the settings allow."""
        return 1 / len(read_data("codes")[self.alphabet]["parts"]) ** self.code_length

    @property
    def plateau_accuracy(self) -> float:
        """Accuracy of the trivial solution that guesses a code of the context, 1/K; its NLL is ln K.

        So it is for answers of any number of tokens: its probabilities of the tokens multiply to 1/K.
        """
        return 1 / self.num_pairs

    def example(self, index: int) -> TextExample:
        """Example `index` of the stream."""
        rng = np.random.default_rng((self.seed, index))
        names, sentences = read_data("names"), read_data("fillers")
        chosen = rng.choice(len(names), self.num_pairs, replace=False)
        codes = self._draw_codes(rng, self.num_pairs + self.has_spare)
        return TextExample(
            template=self.template,
            names=tuple(names[i] for i in chosen),
            codes=codes[: self.num_pairs],
            asked=int(rng.integers(self.num_pairs)),
            sentences=tuple(sentences[i] for i in rng.integers(len(sentences), size=self.distance)),
            spare=codes[-1] if self.has_spare else None,
        )

    def columns(self, split: str, indices: Iterable[int], size: int | None = None) -> dict[str, list[Any]]:
        """Prompts, answers and candidates of examples, by name. Raises ValueError for any split but `probe`."""
        if split != "probe" or size not in (None, self.num_pairs):
            given = f"'{split}' with {size or self.num_pairs}"
            raise ValueError(f"text_recall has one split, 'probe' with {self.num_pairs} pairs, got {given}")
        drawn = [self.example(index) for index in indices]
        return {name: [getattr(example, name) for example in drawn] for name in ("prompt", "answer", "candidates")}

    def settings_of(self, split: str) -> dict[str, Any]:
        """The settings that examples of `split` depend on: all of them."""
        return self.to_dict()

    def _draw_codes(self, rng: np.random.Generator, count: int) -> tuple[str, ...]:
        """`count` distinct codes with one beginning."""
        alphabet = read_data("codes")[self.alphabet]
        parts = alphabet["parts"]
        shared = rng.integers(len(parts), size=self.distractor_similarity).tolist()
        codes: dict[str, None] = {}  # a set that keeps its order
        while len(codes) < count:
            own = rng.integers(len(parts), size=self.code_length - self.distractor_similarity).tolist()
            codes[alphabet["separator"].join(parts[i] for i in shared + own)] = None
        return tuple(codes)

    def to_dict(self) -> dict[str, Any]:
        """Plain settings, as saved beside a model; `from_dict` reads them back."""
        return {"task": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> TextRecall:
        """Inverse of `to_dict`. Raises ValueError for another task, or for settings that are not this one's."""
        return cls(**read_settings(cls, cls.name, settings))


__all__ = ["TextExample", "TextRecall", "read_data"]
