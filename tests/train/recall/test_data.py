"""The datamodule: what a step receives, and that it does not depend on how it is loaded."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnres.tasks import MQAR, RecallBatch
from train.recall.curriculum import CurriculumConfig
from train.recall.data import TaskDataModule

ALL_PAIRS = CurriculumConfig(kind="off")


def make(trainer: dict[str, int] | None = None, **changes) -> TaskDataModule:
    arguments = {"num_pairs": 4, "vocab_size": 32, "batch_size": 5, "num_validation_examples": 7, **changes}
    task = {field.name: arguments.pop(field.name) for field in fields(MQAR) if field.name in arguments}
    arguments |= {"task": MQAR(**{**task, "seed": 0}), "seed": task.get("seed", 0)}
    data = TaskDataModule(**arguments)
    values = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "max_steps": 3, "global_step": 0}
    untyped: Any = SimpleNamespace(**{**values, **(trainer or {})})
    data.trainer = untyped
    return data


def rows(batches) -> list[list[list[int]]]:
    """The token ids of each batch."""
    return [batch.input_ids.tolist() for batch in batches]


def expected(split: str, *parts: range, pairs: int | None = None) -> list[list[list[int]]]:
    return rows(MQAR(4, 32).batch(split, part, pairs) for part in parts)


def test_batches_are_the_examples_of_the_task_in_order():
    data = make(curriculum=ALL_PAIRS)
    assert rows(data.train_dataloader()) == expected("train", range(5), range(5, 10), range(10, 15))
    validation = data.val_dataloader()
    assert len(validation) == 2
    assert rows(validation) == rows(validation) == expected("validation", range(4), range(4, 7))  # in equal parts
    (first, *_) = data.train_dataloader()
    batch = data.task.batch("train", range(5))
    assert all(torch.equal(getattr(first, name), getattr(batch, name)) for name in ("keys", "values", "query_order"))


def test_noise_and_lengths_arrive():
    settings = {"noise_tokens": 2, "noise_vocab_size": 4, "min_pairs": 1}
    (first, *_) = make(curriculum=ALL_PAIRS, **settings).train_dataloader()
    batch = MQAR(4, 32, **settings).batch("train", range(5))
    for name in ("input_ids", "labels", "noise", "pairs_before", "num_pairs"):
        assert torch.equal(getattr(first, name), getattr(batch, name))


def test_splits_share_no_example():
    data = make(num_pairs=16, vocab_size=256, curriculum=ALL_PAIRS)
    batches: list[RecallBatch] = [*data.train_dataloader(), *data.val_dataloader(), data.task.batch("probe", range(15))]
    seen = [tuple(row.tolist()) for batch in batches for row in batch.input_ids]
    assert len(set(seen)) == len(seen) == 15 + 7 + 15


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_has_the_pairs_that_the_curriculum_has_decided_before_it(num_workers):
    """Also where workers make examples ahead; and those of a step are the next ones, whatever its pairs."""
    sizes = [1, 1, 3, 3, 2, 4]
    data = make({"max_steps": 3, "accumulate_grad_batches": 2}, num_workers=num_workers)
    received = []
    for number, batch in enumerate(data.train_dataloader()):
        assert batch.keys.shape[1] == sizes[number]
        received += rows([batch])
        data.curriculum.size = sizes[min(number + 1, 5)]
    parts = [range(5 * number, 5 * number + 5) for number in range(6)]
    assert received == [expected("train", part, pairs=size)[0] for part, size in zip(parts, sizes, strict=True)]
    assert {batch.keys.shape[1] for batch in data.val_dataloader()} == {4}


def test_loading_takes_no_random_numbers_of_training():
    data, state = make(num_workers=1), torch.get_rng_state()
    assert len(list(data.train_dataloader())) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_goes_on_with_the_next_examples():
    whole, resumed = (
        make({"max_steps": 6}).train_dataloader(),
        make({"max_steps": 6, "global_step": 2}).train_dataloader(),
    )
    assert len(resumed) == len(whole)  # Lightning counts the steps already done as part of the epoch
    assert rows(resumed) == rows(whole)[2:]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_each_device_takes_its_own_part_of_a_step(world_size):
    devices = [{"global_rank": rank, "world_size": world_size} for rank in range(world_size)]
    parts = [rows(make(device, batch_size=12 // world_size).train_dataloader()) for device in devices]
    for step, batch in enumerate(rows(make(batch_size=12).train_dataloader())):
        assert sorted(row for part in parts for row in part[step]) == sorted(batch)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_devices_validate_in_equally_many_batches(batch_size):
    """Those of a divided model run them together."""
    for world_size in (2, 3, 5):
        for count in range(world_size, 30, 5):
            sizes = {"num_pairs": 1, "batch_size": batch_size, "num_validation_examples": count}
            devices = [{"global_rank": rank, "world_size": world_size} for rank in range(world_size)]
            parts = [rows(make(device, **sizes).val_dataloader()) for device in devices]
            assert len({len(part) for part in parts}) == 1
            seen = [row for part in parts for batch in part for row in batch]
            assert sorted(seen) == sorted(MQAR(1, 32).batch("validation", range(count)).input_ids.tolist())


def test_state_and_hyperparameters_are_plain():
    data, other = make(), make()
    data.curriculum.update(0, 0.5)
    other.load_state_dict(data.state_dict())
    assert other.curriculum.state_dict() == data.curriculum.state_dict()
    noise = {"noise_tokens": 0, "noise_vocab_size": 16, "min_pairs": None}
    assert data.hparams["task"] == {"task": "mqar", "num_pairs": 4, "vocab_size": 32, "seed": 0, **noise}


@pytest.mark.parametrize(
    "bad", [{"batch_size": 0}, {"num_validation_examples": 0}, {"num_workers": -1}, {"num_pairs": 17}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)
