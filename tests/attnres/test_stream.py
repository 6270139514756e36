"""Tasks as streams of `datasets`: the task's own examples in order, and a fingerprint that says which ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from attnres.tasks import MQAR, SPLITS, Hops, Pointer, TextRecall
from attnres.tasks.stream import CHUNK, fingerprint, stream

TASK = MQAR(num_pairs=4, vocab_size=64, seed=3, noise_tokens=2, min_pairs=2)
ranges = st.builds(range, st.integers(0, 9), st.integers(20, 2 * CHUNK), st.integers(1, 2))


@settings(max_examples=10)
@given(st.sampled_from(SPLITS), ranges, st.integers(1, 4), st.integers(1, 5))
def test_rows_are_the_examples_in_order(split, examples, pairs, num_batches):
    batch = TASK.batch(split, examples, pairs)
    rows = list(stream(TASK, split, examples, size=pairs))
    assert [row["input_ids"].tolist() for row in rows] == batch.input_ids.tolist()
    assert [row["labels"].tolist() for row in rows] == batch.labels.tolist()
    batches = list(stream(TASK, split, examples, size=pairs, num_batches=num_batches))
    sizes = [len(row["input_ids"]) for row in batches]
    assert len(sizes) == num_batches
    assert max(sizes) - min(sizes) <= 1
    assert [labels for row in batches for labels in row["labels"].tolist()] == batch.labels.tolist()


def test_workers_change_nothing():
    alone = stream(TASK, "train", 12, num_batches=5)
    shared: Any = stream(TASK, "train", 12, num_batches=5, num_shards=2)
    loaded = [row["input_ids"].tolist() for row in DataLoader(shared, batch_size=None, num_workers=2)]
    assert loaded == [row["input_ids"].tolist() for row in alone]


@pytest.mark.parametrize("task", [TASK, Pointer(3, 40), Hops(6, 9, max_hops=3)], ids=lambda task: task.name)
def test_a_row_of_any_task_is_its_batch_again(task):
    (row,) = stream(task, "validation", 5, num_batches=1)
    batch = task.batch("validation", range(5))
    assert torch.equal(task.collate(row).labels, batch.labels)
    assert row["input_ids"].tolist() == batch.input_ids.tolist()


def test_text_is_streamed_too():
    task = TextRecall(seed=2)
    dataset = stream(task, "probe", range(3, 6))
    assert isinstance(dataset, IterableDataset)
    expected = [task.example(index) for index in range(3, 6)]
    assert [(row["prompt"], row["answer"]) for row in dataset] == [(e.prompt, e.answer) for e in expected]
    with pytest.raises(ValueError, match="text_recall has one split, 'probe'"):
        stream(task, "train", 3)


@pytest.mark.parametrize(("arguments", "message"), [(("test", 3), "split 'test'"), (("train", 3, 5), "of pairs")])
def test_bad_arguments_are_named_at_once(arguments, message):
    split, examples, *pairs = arguments
    with pytest.raises(ValueError, match=message):
        stream(TASK, split, examples, size=pairs[0] if pairs else None)


def test_equal_fingerprints_are_equal_examples():
    """And the other way round, so that models of different seeds are probed on the same data."""
    tasks = [TASK, replace(TASK, seed=4), replace(TASK, min_pairs=None), replace(TASK, noise_tokens=1)]
    for split in SPLITS:
        content = [task.batch(split, range(8), 4).input_ids.tolist() for task in tasks]
        prints = [fingerprint(task, split, 8) for task in tasks]
        same = [[a == b for b in content] for a in content]
        assert [[a == b for b in prints] for a in prints] == same
    variants = {fingerprint(TASK, "train", n, pairs) for n in (8, 9, range(1, 9)) for pairs in (1, 2, None)}
    assert len(variants) == 9
    assert fingerprint(TASK, "probe", 8) == fingerprint(TASK, "probe", range(8), 4)
    assert stream(TASK, "probe", 8).info.config_name == fingerprint(TASK, "probe", 8)
    assert (
        fingerprint(TASK, "probe", 8) == "ebb7b7dbca678482"
    )  # on every machine and release, as runs are compared by it
