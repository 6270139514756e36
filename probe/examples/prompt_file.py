"""A file of prompts as a task to probe on: one JSON object a line, of the fields of `Prompt`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from attnres.inputs import parse_json, read_file
from probe.examples.examples import Examples
from probe.examples.prompts import Prompt
from probe.examples.tasks import ProbeTask, describe_tokens

MOST_BYTES = 2**28
"""Of a file of prompts, all of which is held in memory."""
MOST_IN_LINE = 2**20
"""Characters of a line."""


@dataclass(frozen=True)
class PromptTask(ProbeTask):
    """Prompts that somebody wrote, as one tokenizer writes them. They have no flip test.

    Attributes:
        prompts: in order; a probe takes the first of them, or all.
        tokenizer: writes them.
        source: where the tokenizer is from.
        names: what messages call each prompt; `None`: prompt 0 and so on.
        origin: where the prompts are from, for the summary.
    """

    prompts: tuple[Prompt, ...]
    tokenizer: PreTrainedTokenizerBase
    source: str
    names: tuple[str, ...] | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, tokenizer: PreTrainedTokenizerBase, source: str) -> PromptTask:
        """From a file. Raises ValueError, naming file and line, for one that cannot be read or holds no prompts."""
        content = read_file(path, MOST_BYTES)
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: expected one JSON object a line") from error
        found = {f"{path} line {n}": line for n, line in enumerate(text.split("\n"), start=1) if line.strip()}
        if not found:
            raise ValueError(f"{path} holds no prompts: expected one JSON object a line")
        prompts = tuple(_parse(name, line) for name, line in found.items())
        origin = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        return cls(prompts, tokenizer, source, tuple(found), origin)

    def count(self, wanted: int | None) -> int:
        """All prompts, or the first `wanted` where that is fewer."""
        return min(wanted or len(self.prompts), len(self.prompts))

    def examples(self, count: int) -> Examples:
        return Examples.from_prompts(self.prompts[:count], self.tokenizer, self.names)

    def check(self, config: PreTrainedConfig, examples: Sequence[Examples]) -> None:
        for part in examples:
            part.check_fits(config, self.names)

    def describe(self, examples: Examples) -> dict[str, Any]:
        """Where the prompts are from and how many were probed, the tokenizer, how long it makes them."""
        distractors = [len(prompt.distractors) for prompt in self.prompts[: len(examples)]]
        return {
            "task": "prompts",
            **self.origin,
            "n_prompts": len(examples),
            "n_prompts_given": len(self.prompts),
            "n_clusters": len(examples.clusters.unique()),
            "fewest_distractors": min(distractors),
            "most_distractors": max(distractors),
            "tokenizer": self.source,
            **describe_tokens(examples),
        }


def _parse(name: str, line: str) -> Prompt:
    """The prompt in a line of JSON. Raises ValueError, which begins with `name`."""
    if len(line) > MOST_IN_LINE:
        raise ValueError(f"{name} is of {len(line):,} characters: a prompt may have {MOST_IN_LINE:,} with its answers")
    try:
        content = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object, got {type(content).__name__}")
    try:
        return Prompt.from_dict(content)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
