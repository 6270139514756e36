"""The datamodule: what a step receives, and that it does not depend on how it is loaded."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attnres.tasks import MQAR, RecallBatch
from train.recall.curriculum import CurriculumConfig
from train.recall.data import MQARDataModule


def trainer(**changes) -> Any:
    values = {"global_rank": 0, "world_size": 1, "accumulate_grad_batches": 1, "max_steps": 3, "global_step": 0}
    values["training"] = True
    return SimpleNamespace(**{**values, **changes})


def batches(data: MQARDataModule, split: str, **changes) -> list[RecallBatch]:
    data.trainer = trainer(training=split == "train", **changes)
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def same(batch: RecallBatch, other: RecallBatch) -> bool:
    return torch.equal(batch.input_ids, other.input_ids) and torch.equal(batch.labels, other.labels)


def make(**changes) -> MQARDataModule:
    arguments = {"num_pairs": 4, "vocab_size": 32, "batch_size": 5, "num_validation_examples": 7, **changes}
    return MQARDataModule(**arguments)


def test_batches_are_the_examples_of_the_task_in_order():
    data = make(seed=3, curriculum=CurriculumConfig(kind="off"))
    task = MQAR(num_pairs=4, vocab_size=32, seed=3)
    for step, batch in enumerate(batches(data, "train")):
        assert same(batch, task.batch("train", range(5 * step, 5 * step + 5)))
    first, second = batches(data, "validation")
    assert same(first, task.batch("validation", range(4)))  # in equal parts
    assert same(second, task.batch("validation", range(4, 7)))


def test_splits_share_no_stream():
    data = make(num_pairs=16, vocab_size=256, curriculum=CurriculumConfig(kind="off"))
    seen = {
        split: {tuple(row.tolist()) for batch in batches(data, split) for row in batch.input_ids}
        for split in ("train", "validation")
    }
    seen["probe"] = {tuple(row.tolist()) for row in data.task.batch("probe", range(15)).input_ids}
    assert len(set.union(*seen.values())) == sum(map(len, seen.values())) == 15 + 7 + 15


def test_the_curriculum_decides_the_pairs_of_training_but_not_of_validation():
    data = make()
    assert [batch.keys.shape[1] for batch in batches(data, "train")] == [1, 1, 1]
    data.curriculum.load_state_dict({"pairs": 2, "running_accuracy": 0.0})
    assert [batch.keys.shape[1] for batch in batches(data, "train")] == [2, 2, 2]
    assert [batch.keys.shape[1] for batch in batches(data, "validation")] == [4, 4]


def test_workers_change_nothing():
    alone, with_workers = make(), make(num_workers=2)
    for batch, other in zip(batches(alone, "train"), batches(with_workers, "train"), strict=True):
        assert same(batch, other)


def test_workers_do_not_see_a_stale_number_of_pairs():
    data = make(num_workers=1)
    data.trainer = trainer(max_steps=8)
    sizes = []
    for step, indices in enumerate(data.train_dataloader()):
        sizes.append(data.on_before_batch_transfer(indices, 0).keys.shape[1])
        data.curriculum.pairs = 1 + step % 4  # decided after the step, while later batches are already loaded
    assert sizes == [1, 1, 2, 3, 4, 1, 2, 3]


def test_a_resumed_run_goes_on_with_the_next_examples():
    whole = batches(make(), "train", max_steps=6)
    resumed = batches(make(), "train", max_steps=6, global_step=2)
    assert len(resumed) == len(whole)  # Lightning counts the steps already done as part of the epoch
    assert all(same(batch, other) for batch, other in zip(whole[2:], resumed, strict=False))


def test_state_and_hyperparameters_are_plain():
    data = make()
    data.curriculum.update(0, 0.5)
    other = make()
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
