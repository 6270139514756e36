"""A task as a LightningDataModule: batches of the streams that `datasets` serves (attnres/tasks/stream.py).

Training reads one stream after the other, each of examples of one size. The curriculum decides the size after every
step; when it changes, the next stream starts with the example that is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from attnres.tasks import MQAR, Task, TaskBatch
from attnres.tasks.stream import stream
from train.recall.curriculum import Curriculum, CurriculumConfig


@dataclass(frozen=True)
class SizedBatches:
    """Batches whose number is known. Of others, Lightning fetches one ahead: before the curriculum knows its size."""

    start: Callable[[], Iterator[TaskBatch]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[TaskBatch]:
        return self.start()


class TaskDataModule(LightningDataModule):
    """A task, every training example seen once.

    Args:
        task: What is learned, and its settings; --data.task.help NAME says which a task has.
        seed: Names the stream of examples.
        batch_size: Sequences per step and device.
        num_validation_examples: Sequences per validation, always of the full task.
        num_workers: Processes that draw training examples ahead of the step; 0 draws them in the training process.
            When the curriculum changes the size, they start again.
        curriculum: How the size of training examples grows to that of the task; what a task counts is its `unit`.

    Raises:
        ValueError: a size that is not positive, or a seed in the task that is not `seed`.
    """

    def __init__(
        self,
        task: Task = MQAR(),  # noqa: B008 (frozen)
        seed: int = 0,
        batch_size: int = 64,
        num_validation_examples: int = 256,
        num_workers: int = 0,
        curriculum: CurriculumConfig = CurriculumConfig(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("num_validation_examples", num_validation_examples)):
            if value < 1:
                raise ValueError(f"{key} must be a positive integer, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if task.seed not in (0, seed):
            raise ValueError(f"the task's seed is that of seed_everything ({seed}): leave it out, got {task.seed}")
        self.task: Any = replace(task, seed=int(seed))  # type: ignore[type-var]
        self.curriculum = Curriculum(curriculum, task.size, task.first_size)
        self.batch_size = batch_size
        self.num_validation_examples = num_validation_examples
        self.num_workers = num_workers
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters({"task": self.task.to_dict()}, logger=False)

    def train_dataloader(self) -> SizedBatches:
        """The batches of all steps; a resumed run reads on where its checkpoint stopped."""
        trainer = self._attached_trainer
        return SizedBatches(self._training_batches, trainer.max_steps * trainer.accumulate_grad_batches)

    def _training_batches(self) -> Iterator[TaskBatch]:
        trainer = self._attached_trainer
        count = trainer.max_steps * trainer.accumulate_grad_batches
        examples = self._own_part(count * self.batch_size * trainer.world_size)
        batches, size = iter(()), None
        for number in range(trainer.global_step * trainer.accumulate_grad_batches, count):
            if size != self.curriculum.size:
                size = self.curriculum.size
                batches = self._open("train", examples[number * self.batch_size :], count - number, size)
            yield next(batches)

    def val_dataloader(self) -> SizedBatches:
        """Drawn once. All devices get equally many batches, as those of a divided model run them together."""
        world_size = self._attached_trainer.world_size
        # With batches of one, a device could have one less than another.
        count = -(-self.num_validation_examples // (max(self.batch_size, 2) * world_size))
        batches = list(self._open("validation", self._own_part(self.num_validation_examples), count))
        return SizedBatches(lambda: iter(batches), count)

    def examples_of_step(self, step: int) -> range:
        """The examples of the split `train` that a step sees, on all devices."""
        trainer = self._attached_trainer
        count = trainer.accumulate_grad_batches * self.batch_size * trainer.world_size
        return range(step * count, (step + 1) * count)

    @property
    def _attached_trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    def _own_part(self, num_examples: int) -> range:
        """This device's part of the first examples: each batch of a step is divided over the devices."""
        return range(num_examples)[self._attached_trainer.global_rank :: self._attached_trainer.world_size]

    def _open(self, split: str, examples: range, count: int, size: int | None = None) -> Iterator[TaskBatch]:
        """`count` equal batches of `examples` of `size`, or of the full task."""
        workers = self.num_workers if split == "train" else 0
        source: Any = stream(self.task, split, examples, size=size, num_batches=count, num_shards=max(workers, 1))
        own = torch.Generator()  # a loader draws a seed for its workers: not from the random numbers of training
        return iter(
            DataLoader(source, batch_size=None, num_workers=workers, collate_fn=self.task.collate, generator=own)
        )

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict["curriculum"])
