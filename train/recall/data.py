"""The recall task as a LightningDataModule: batches of the streams that `datasets` serves (attnres/tasks/stream.py).

Training reads one stream after the other, each of a constant number of pairs. The curriculum decides this number after
every step; when it changes, the next stream starts with the example that is next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from attnres.tasks import MQAR, RecallBatch
from attnres.tasks.stream import stream
from train.recall.curriculum import Curriculum, CurriculumConfig

FIELDS = [field.name for field in fields(RecallBatch)]


@dataclass(frozen=True)
class SizedBatches:
    """Batches whose number is known. Of others, Lightning fetches one ahead: before the curriculum knows its pairs."""

    start: Callable[[], Iterator[RecallBatch]]
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[RecallBatch]:
        return self.start()


class MQARDataModule(LightningDataModule):
    """Multi-query associative recall, every training example seen once.

    Args:
        num_pairs: K, the number of key-value pairs of the full task. A sequence has 3 K tokens.
        vocab_size: Number of token ids. Of those that are not noise, the lower half are keys, the upper half values.
        seed: Names the stream of examples.
        noise_tokens: Tokens of noise between the pairs of every example.
        noise_vocab_size: How many of the token ids are noise (the last ones), if noise_tokens is positive.
        min_pairs: Draw the number of pairs of each training example from this one to the curriculum's; null to give
            all of them the curriculum's.
        batch_size: Sequences per step and device.
        num_validation_examples: Sequences per validation, always with K pairs.
        num_workers: Processes that draw training examples ahead of the step; 0 draws them in the training process.
            When the curriculum changes the number of pairs, they start again.
        curriculum: How the number of pairs grows during training.

    Raises:
        ValueError: a size that is not positive, or more pairs than the vocabulary has keys or values for.
    """

    def __init__(
        self,
        num_pairs: int = 16,
        vocab_size: int = 256,
        seed: int = 0,
        noise_tokens: int = 0,
        noise_vocab_size: int = 16,
        min_pairs: int | None = None,
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
        self.task = MQAR(num_pairs, vocab_size, int(seed), noise_tokens, noise_vocab_size, min_pairs)
        self.curriculum = Curriculum(curriculum, num_pairs)
        self.batch_size = batch_size
        self.num_validation_examples = num_validation_examples
        self.num_workers = num_workers
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters({"task": self.task.to_dict()}, logger=False)

    def train_dataloader(self) -> SizedBatches:
        """The batches of all steps; a resumed run reads on where its checkpoint stopped."""
        trainer = self._attached_trainer
        return SizedBatches(self._training_batches, trainer.max_steps * trainer.accumulate_grad_batches)

    def _training_batches(self) -> Iterator[RecallBatch]:
        trainer = self._attached_trainer
        count = trainer.max_steps * trainer.accumulate_grad_batches
        examples = self._own_part(count * self.batch_size * trainer.world_size)
        batches, pairs = iter(()), None
        for number in range(trainer.global_step * trainer.accumulate_grad_batches, count):
            if pairs != self.curriculum.pairs:
                pairs = self.curriculum.pairs
                batches = self._open("train", examples[number * self.batch_size :], count - number, pairs)
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

    def _open(self, split: str, examples: range, count: int, pairs: int | None = None) -> Iterator[RecallBatch]:
        """`count` equal batches of `examples` with `pairs` pairs, or K."""
        workers = self.num_workers if split == "train" else 0
        source: Any = stream(self.task, split, examples, num_pairs=pairs, num_batches=count, num_shards=max(workers, 1))
        own = torch.Generator()  # a loader draws a seed for its workers: not from the random numbers of training
        return iter(DataLoader(source, batch_size=None, num_workers=workers, collate_fn=_collate, generator=own))

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict["curriculum"])


def _collate(row: Any) -> RecallBatch:
    """The batch that a row of a stream holds."""
    return RecallBatch(**{name: torch.from_numpy(row[name]) for name in FIELDS if name in row})
