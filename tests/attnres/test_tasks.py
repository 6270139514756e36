"""Recall examples: right by a dictionary lookup, and a pure function of (seed, split, index, pairs)."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres.tasks import IGNORE_INDEX, MQAR, SPLITS, RecallBatch
from attnres.tasks.task import SHARED_SPLITS

splits = st.sampled_from(SPLITS)
indices = st.lists(st.integers(0, 2**40), min_size=1, max_size=5)


@st.composite
def tasks(draw: st.DrawFn) -> MQAR:
    vocab_size = draw(st.integers(2, 70))
    num_pairs = draw(st.integers(1, vocab_size // 2))
    return MQAR(num_pairs=num_pairs, vocab_size=vocab_size, seed=draw(st.integers(0, 2**31)))


def same(a: RecallBatch, b: RecallBatch) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


@st.composite
def irregular_tasks(draw: st.DrawFn) -> MQAR:
    """Plain, with noise, with examples of different lengths, or with both."""
    task, noise = draw(tasks()), draw(st.integers(0, 5))
    lengths = draw(st.none() | st.integers(1, task.num_pairs))
    ids = draw(st.integers(1, 4))
    return replace(task, vocab_size=task.vocab_size + ids, noise_tokens=noise, noise_vocab_size=ids, min_pairs=lengths)


@given(task=irregular_tasks(), split=splits, indices=indices, data=st.data())
def test_examples_are_right(task, split, indices, data):
    most = data.draw(st.integers(1, task.num_pairs))
    batch = task.batch(split, indices, most)
    assert batch.input_ids.shape == batch.labels.shape == (len(indices), 3 * most + task.noise_tokens)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert most < task.num_pairs or same(batch, task.batch(split, indices))
    sizes = [most] * len(indices) if batch.num_pairs is None else batch.num_pairs.tolist()
    for row, pairs in enumerate(sizes):
        if split != "train" or task.min_pairs is None:
            assert pairs == most
        else:
            assert min(task.min_pairs, most) <= pairs <= most
        tokens, labels = batch.input_ids[row].tolist(), batch.labels[row].tolist()
        end = 3 * pairs + task.noise_tokens
        context, queries = tokens[: end - pairs], tokens[end - pairs : end]
        assert tokens[end:] == [0] * (len(tokens) - end)
        is_noise = [task.noise_tokens > 0 and token >= task.vocab_size - task.noise_vocab_size for token in context]
        assert sum(is_noise) == task.noise_tokens
        facts = [token for token, noisy in zip(context, is_noise, strict=True) if not noisy]
        keys, values = facts[::2], facts[1::2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(task.first_value <= value < task.first_noise for value in values)
        assert all(0 <= key < task.first_value for key in keys)
        starts = [context.index(key) for key in keys]
        assert [context[start + 1] for start in starts] == values  # no noise within a pair
        assert sorted(queries) == sorted(keys)
        lookup = dict(zip(keys, values, strict=True))
        expected = [IGNORE_INDEX] * (end - pairs) + [lookup[query] for query in queries]
        assert labels == expected + [IGNORE_INDEX] * (len(labels) - end)
    asked = [i for i in range(batch.labels.shape[1]) if any(row[i] != IGNORE_INDEX for row in batch.labels.tolist())]
    assert batch.query_positions.tolist() == asked
    if batch.num_pairs is None:
        assert torch.equal(batch.labels[:, -most:], batch.answers)
    backwards = replace(task).batch(split, reversed(indices), most)  # an example does not depend on its batch
    alone = [task.batch(split, [index], most) for index in indices]
    for name in ("input_ids", "labels"):
        assert torch.equal(getattr(backwards, name).flip(0), getattr(batch, name))
        assert torch.equal(torch.cat([getattr(one, name) for one in alone]), getattr(batch, name))
    assert same(batch.to("cpu"), batch)
    assert batch.to("meta").labels.device.type == "meta"
    assert task.to_dict()["task"] == "mqar"
    assert MQAR.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_all_lengths_and_places_of_noise_occur():
    batch = MQAR(num_pairs=4, vocab_size=40, noise_tokens=2, min_pairs=2).batch("train", range(300))
    assert batch.num_pairs is not None
    assert batch.pairs_before is not None
    assert batch.num_pairs.unique().tolist() == [2, 3, 4]
    assert batch.pairs_before[batch.num_pairs == 4].unique().tolist() == [0, 1, 2, 3, 4]
    assert not batch.noise.equal(batch.noise.sort(1).values)  # type: ignore[union-attr]


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), split=splits, index=st.integers(0, 2**40), data=st.data())
def test_another_seed_split_or_index_is_another_example(seed, split, index, data):
    # 16 of 128 keys and values in order: two independent examples agree with probability below 1e-60.
    example = MQAR(seed=seed).batch(split, [index])
    other_split = data.draw(splits.filter(lambda other: other != split))
    other_seed = data.draw(st.integers(0, 2**31).filter(lambda other: other != seed))
    other_index = data.draw(st.integers(0, 2**40).filter(lambda other: other != index))
    assert not same(example, MQAR(seed=seed).batch(other_split, [index]))
    # Splits for probes are the same for every seed: models of different seeds are compared on the same examples.
    assert same(example, MQAR(seed=other_seed).batch(split, [index])) == (split in SHARED_SPLITS)
    assert not same(example, MQAR(seed=seed).batch(split, [other_index]))


def test_neighbouring_streams_share_no_example():
    streams = [
        MQAR(num_pairs=8, seed=seed).batch(split, range(50), pairs).input_ids[:, :6]
        for seed in (0, 1)
        for split in SPLITS
        for pairs in (7, 8)
        if seed == 0 or split not in SHARED_SPLITS  # else the same as that of seed 0
    ]
    heads = [tuple(row) for stream in streams for row in stream.tolist()]
    assert len(set(heads)) == len(heads)


def test_all_keys_values_and_positions_are_used():
    batch = MQAR(num_pairs=3, vocab_size=11).batch("train", range(300))
    assert batch.keys.unique().tolist() == list(range(5))
    assert batch.values.unique().tolist() == list(range(5, 11))
    assert len({tuple(order) for order in batch.query_order.tolist()}) == 6
    assert not torch.equal(batch.keys[:, 0], batch.keys.min(dim=1).values)  # keys are not sorted


def test_trivial_accuracies():
    task = MQAR(num_pairs=16, vocab_size=256)
    assert task.chance_accuracy == 1 / 256
    assert task.plateau_accuracy == 1 / 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "copy"}, "task 'copy' is not mqar"),
        ({"num_pairs": 3}, "task None is not mqar"),
        ({"task": "mqar", "pairs": 3}, "unknown task setting 'pairs'; choose from num_pairs, .*, min_pairs"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        MQAR.from_dict(settings)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"num_pairs": 0}, ["num_pairs", "at least 1", "0"]),
        ({"num_pairs": 129}, ["num_pairs", "129", "vocab_size", "256", "at most 128"]),
        ({"num_pairs": 1, "vocab_size": 1}, ["num_pairs", "vocab_size"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"noise_tokens": -1}, ["noise_tokens", "at least 0", "-1"]),
        ({"noise_tokens": 1, "noise_vocab_size": 0}, ["noise_vocab_size", "at least 1", "0"]),
        ({"noise_tokens": 1, "noise_vocab_size": 250}, ["num_pairs", "250 ids of noise", "at most 3"]),
        ({"seed": 2**64}, ["seed", "at most 9,223,372,036,854,775,807", "18446744073709551616"]),
        ({"noise_tokens": 10**30}, ["noise_tokens", "at most 2,147,483,647"]),
        ({"vocab_size": 10**30}, ["vocab_size", "at most 2,147,483,647"]),
        ({"vocab_size": -4}, ["vocab_size", "at least 1", "-4"]),
        ({"min_pairs": 17}, ["min_pairs", "between 1 and num_pairs (16)", "17"]),
        ({"min_pairs": 0}, ["min_pairs", "between 1", "0"]),
    ],
)
def test_bad_task(fields, names):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (all of the message is checked)
        MQAR(**fields)
    assert all(name in str(error.value) for name in names)
    assert "\n" not in str(error.value)


def test_bad_batch():
    for pairs in (0, -1, 17):
        with pytest.raises(ValueError, match=f"the number of pairs must be between 1 and 16, got {pairs}"):
            MQAR().batch("train", [0], pairs)
    with pytest.raises(ValueError, match=r"'test' does not exist; choose from train, validation, probe"):
        MQAR().batch("test", [0])
