"""Every task in token ids: what training and probes rely on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnres.tasks import IGNORE_INDEX, MQAR, SPLITS, TASKS, Hops, Pointer, task_from_dict

ALL = {
    "mqar": MQAR(num_pairs=5, vocab_size=40, noise_tokens=2, noise_vocab_size=4),
    "pointer": Pointer(address_bits=3, vocab_size=40),
    "hops": Hops(num_facts=6, num_entities=9, max_hops=3, min_hops=0),
}


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def task(request):
    return request.param


def test_each_task_is_here():
    assert ALL.keys() == {name for name, known in TASKS.items() if known.__module__.startswith("attnres.")}


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match=r"Mine.name is pointer, which attnres.tasks.pointer has: choose another"):

        class Mine(Pointer):
            name = "pointer"


def test_shapes_and_groups(task):
    for size in range(task.first_size, task.size + 1):
        batch = task.batch("train", range(7), size)
        assert batch.size == size
        assert len(batch) == 7
        assert batch.input_ids.shape == batch.labels.shape
        assert 0 <= batch.input_ids.min() <= batch.input_ids.max() < task.vocab_size
        assert torch.equal(batch.query_positions, (batch.labels != IGNORE_INDEX).any(0).nonzero().squeeze(1))
        assert batch.groups.shape == (7, len(batch.query_positions))
        assert batch.groups.max() < len(task.groups)
    assert batch.input_ids.shape[1] == task.num_tokens
    assert len(batch.query_positions) == task.num_queries
    counts = torch.bincount(batch.groups.flatten(), minlength=len(task.groups))
    assert (counts == counts[0]).all()


def test_answers_are_among_distinct_candidates_as_often_as_guessing_says(task):
    batch = task.batch("train", range(400))
    answers = batch.labels[:, batch.query_positions]
    assert all(len(set(row.tolist())) == len(row) for row in batch.candidates)
    places = (batch.candidates.unsqueeze(1) == answers.unsqueeze(2)).long()
    assert (places.sum(-1) == 1).all()
    shares = places.double().mean((0, 1))  # of each place among the candidates
    assert shares.numpy() == pytest.approx(np.full(len(shares), task.plateau_accuracy), abs=0.08)


def test_an_example_is_a_function_of_its_number(task):
    for split in SPLITS:
        whole = task.batch(split, range(10))
        assert torch.equal(task.batch(split, [7, 3]).input_ids, whole.input_ids[[7, 3]])
        other = replace(task, seed=1).batch(split, range(10))
        assert torch.equal(whole.input_ids, other.input_ids) == (split in ("probe", "placement"))
    contents = [task.batch(split, range(30)).input_ids for split in SPLITS]
    assert all(not torch.equal(a, b) for i, a in enumerate(contents) for b in contents[:i])


def test_settings_and_columns_come_back(task):
    assert task_from_dict(task.to_dict()) == task
    batch, columns = task.batch("validation", range(5)), task.columns("validation", range(5))
    assert torch.equal(task.collate(columns).labels, batch.labels)
    assert columns["input_ids"].tolist() == batch.input_ids.tolist()


def test_flips_change_one_value_of_each_context(task):
    batch = task.batch("probe", range(50))
    labels = batch.labels[:, batch.query_positions]
    flips = list(task.flips(batch, seed=0))
    assert len(flips) == task.num_flips
    assert any((flip.changed.labels != batch.labels).any() for flip in flips)
    for flip in flips:
        ids = flip.changed.input_ids
        assert ((ids != batch.input_ids).sum(1) == 1).all()
        place = (ids != batch.input_ids).long().argmax(1, keepdim=True)
        assert torch.equal(ids.gather(1, place).squeeze(1), flip.value)
        answers = flip.changed.labels[:, batch.query_positions]
        assert ((answers == flip.value[:, None]) | (answers == labels) | (task.name == "hops")).all()
    again = list(task.flips(batch, seed=0))
    assert all(torch.equal(a.value, b.value) for a, b in zip(flips, again, strict=True))


def test_a_pointer_is_read_by_hand():
    batch = Pointer(address_bits=3, vocab_size=40).batch("train", range(60))
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        memory, bits, query = ids[:8], ids[8:11], ids[11]
        assert query == 39
        assert labels == [IGNORE_INDEX] * 11 + [memory[int("".join(str(bit - 37) for bit in bits), 2)]]


def test_hops_are_followed_by_hand():
    task = ALL["hops"]
    batch = task.batch("train", range(40))
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        leads_to = dict(zip(ids[:12:2], ids[1:12:2], strict=True))
        assert len(leads_to) == 6
        asked = set()
        for hop, entity, label in zip(ids[12::2], ids[13::2], labels[13::2], strict=True):
            found = entity
            for _ in range(hop - task.num_entities):
                found = leads_to[found]
            assert label == found
            asked.add((hop, entity))
        assert len(asked) == task.num_queries  # each entity with each number of hops
        assert set(labels[:12] + labels[12::2]) == {IGNORE_INDEX}


def test_hops_are_added_when_all_facts_are_there():
    task = Hops(num_facts=7, num_entities=7, max_hops=5)
    assert (task.first_size, task.size) == (4, 10)
    sizes = [task.batch("train", range(2), size) for size in range(4, 11)]
    assert [batch.keys.shape[1] for batch in sizes] == [4, 5, 6, 7, 7, 7, 7]
    assert [int(batch.hops.max()) for batch in sizes] == [2, 2, 2, 2, 3, 4, 5]
    assert [batch.asked.shape[1] for batch in sizes] == [8, 10, 12, 14, 21, 28, 35]


def test_a_changed_fact_leads_elsewhere():
    """An answer is another exactly where its way goes over the changed fact, in its first `hops` steps."""
    task = Hops(num_facts=5, num_entities=5, max_hops=2)
    batch = task.batch("probe", range(30))
    for flip in task.flips(batch, seed=3):
        key = batch.keys[batch.values != flip.changed.values]
        before = batch.keys.gather(1, (batch.values == key[:, None]).long().argmax(1, keepdim=True)).squeeze(1)
        crosses = (batch.asked == key[:, None]) | ((batch.asked == before[:, None]) & (batch.hops == 2))
        changed = flip.changed.answers != batch.answers
        assert not (changed & ~crosses).any()
        assert (changed == crosses).double().mean() > 0.9  # two ways may end at one place


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pointer(address_bits=0), "address_bits must be at least 1, got 0"),
        (lambda: Pointer(address_bits=7), r"address_bits \(7\) is too large for vocab_size 67.*at least 131"),
        (lambda: Hops(num_facts=3), r"num_facts must be between 4, .* and num_entities \(8\), .*; got 3"),
        (lambda: Hops(num_facts=9), "; got 9"),
        (lambda: Hops(min_hops=3), "min_hops must be at most 2, got 3"),
        (lambda: Hops(max_hops=0), "max_hops must be at least 1, got 0"),
        (lambda: Hops().batch("train", [0], 3), "the number of facts and further hops must be between 4 and 8, got 3"),
        (lambda: Pointer().batch("test", [0]), "split 'test' does not exist"),
        (lambda: task_from_dict({"task": "hops", "num_pairs": 3}), "unknown task setting 'num_pairs'"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)
