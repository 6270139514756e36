"""A split of a task as a streaming `datasets.IterableDataset`: examples are drawn as they are read.

    >>> stream(MQAR(num_pairs=4), "validation", 100).with_format("torch")

A stream is a pure function of the task's settings, the split, the numbers of the examples and their size. Its
fingerprint says these; two streams of one fingerprint hold the same examples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnres.tasks.task import Task
from attnres.tasks.text_recall import TextRecall

if TYPE_CHECKING:
    from datasets import IterableDataset

CHUNK = 64
"""Examples that are drawn at a time."""


def stream(
    task: Task | TextRecall,
    split: str,
    examples: int | range,
    *,
    size: int | None = None,
    num_batches: int | None = None,
    num_shards: int = 1,
) -> IterableDataset:
    """Examples of a split, in order. `info.config_name` is their fingerprint.

    A row of a task in token ids holds `input_ids`, `labels` and the fields of its batch as arrays; one of text recall
    holds `prompt`, `answer` and `candidates`. `datasets` puts an empty lock file into its cache for each new stream.

    Args:
        examples: which examples, or how many from the first one on.
        size: of each example (pairs, cells, facts); `None` for that of the full task.
        num_batches: make a row of each batch, for so many batches of equal sizes (some have one example more).
        num_shards: processes that the batches can be shared among: the i-th makes every i-th of `num_shards`.

    Raises:
        ValueError: the task does not have this split, or not this size.
    """
    from datasets import IterableDataset

    task.columns(split, range(1), size)  # bad arguments are named here, not when the first row is read
    examples = range(examples) if isinstance(examples, int) else examples
    arguments = {
        "task": task,
        "split": split,
        "examples": examples,
        "size": size,
        "num_batches": num_batches,
        "num_shards": num_shards,
        "shards": list(range(num_shards)),  # a list is what datasets divides among the workers of a DataLoader
    }
    dataset = IterableDataset.from_generator(_rows, gen_kwargs=arguments)
    dataset.info.dataset_name = str(task.to_dict()["task"])
    dataset.info.config_name = fingerprint(task, split, examples, size)
    return dataset


def fingerprint(task: Task | TextRecall, split: str, examples: int | range, size: int | None = None) -> str:
    """Of the stream of these arguments: a hash of the settings that its examples depend on, the same on any machine."""
    numbers = range(examples) if isinstance(examples, int) else examples
    content = {
        "task": task.settings_of(split),
        "split": split,
        "examples": [numbers.start, numbers.stop, numbers.step],
        "num_pairs": task.size if size is None else size,  # as it was called first: fingerprints outlive names
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _rows(
    task: Task | TextRecall,
    split: str,
    examples: range,
    size: int | None,
    num_batches: int | None,
    num_shards: int,
    shards: list[int],
) -> Iterator[dict[str, Any]]:
    num_chunks = -(-len(examples) // CHUNK) if num_batches is None else num_batches
    for shard in shards:
        for number in range(shard, num_chunks, num_shards):
            columns = task.columns(split, _part(examples, number, num_chunks), size)
            if num_batches is not None:
                yield columns
            else:
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))


def _part(examples: range, number: int, count: int) -> range:
    """Part `number` of `count` equal parts; the first ones have one example more where they cannot be equal."""
    size, longer = divmod(len(examples), count)
    start = number * size + min(number, longer)
    return examples[start : start + size + (number < longer)]


__all__ = ["fingerprint", "stream"]
