"""The recall task as a LightningDataModule.

`datasets` serves example *indices*; the tokens are made in the main process when the step takes its batch, because
the curriculum decides the number of pairs at the step and a worker that prefetches would use a stale one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from attnres.tasks import MQAR, RecallBatch
from train.recall.curriculum import Curriculum, CurriculumConfig


class MQARDataModule(LightningDataModule):
    """Multi-query associative recall, every training example seen once.

    Args:
        num_pairs: K, the number of key-value pairs of the full task. A sequence has 3 K tokens.
        vocab_size: Number of token ids. Of those that are not noise, the lower half are keys, the upper half values.
        seed: Names the stream of examples.
        noise_tokens: Tokens of noise between the pairs of every example.
        noise_vocab_size: How many of the token ids, the last, are noise, where there is any.
        min_pairs: Each training example has a number of pairs of its own, from this one to the curriculum's; null for
            the curriculum's in all.
        batch_size: Sequences per step and device.
        num_validation_examples: Sequences per validation, always with K pairs.
        num_workers: Loader processes. They serve indices only, so that 0 is as fast as any other number.
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
        noise = {"noise_tokens": noise_tokens, "noise_vocab_size": noise_vocab_size}
        self.task = MQAR(num_pairs=num_pairs, vocab_size=vocab_size, seed=int(seed), **noise, min_pairs=min_pairs)
        self.curriculum = Curriculum(curriculum, num_pairs)
        self.batch_size = batch_size
        self.num_validation_examples = num_validation_examples
        self.num_workers = num_workers
        # Plain values only, so that checkpoints load with weights_only=True.
        self.save_hyperparameters({"task": self.task.to_dict()}, logger=False)

    def train_dataloader(self) -> DataLoader:
        """Indices in order, one pass over all steps; a resumed run goes on where the checkpoint stopped.

        Of the batch of a step each device takes its own part, so that the step sees the same examples on any number.
        """
        trainer = self.trainer
        assert trainer is not None
        per_step = self.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        size = trainer.max_steps * per_step
        # Lightning counts the batches of a resumed epoch but does not skip them. Rotating the indices keeps the
        # length it counts against.
        indices = (np.arange(size) + trainer.global_step * per_step) % size
        return self._loader(self._own(indices), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Each device's part in equally many batches: where a model is divided, devices run them together."""
        trainer = self.trainer
        assert trainer is not None
        # With batches of one, a device would have one less than another.
        num_batches = -(-self.num_validation_examples // (max(self.batch_size, 2) * trainer.world_size))
        own = self._own(np.arange(self.num_validation_examples))
        batches = np.array_split(np.arange(len(own)), num_batches)
        return self._loader(own, batch_sampler=[batch.tolist() for batch in batches])

    def _own(self, indices: np.ndarray) -> np.ndarray:
        """This device's part."""
        assert self.trainer is not None
        return indices[self.trainer.global_rank :: self.trainer.world_size]

    def _loader(self, indices: np.ndarray, **batching: Any) -> DataLoader:
        # No shuffling: examples are independent draws, and the order makes a resumed run exact. (Lightning's sampler
        # for several devices would shuffle.)
        dataset: Any = Dataset.from_dict({"index": indices})
        persistent = self.num_workers > 0
        return DataLoader(dataset, num_workers=self.num_workers, persistent_workers=persistent, **batching)

    def on_before_batch_transfer(self, batch: dict[str, Tensor] | Tensor, dataloader_idx: int) -> RecallBatch:
        """Indices (batch,) to the examples of the step's split and number of pairs."""
        assert self.trainer is not None
        indices = torch.as_tensor(batch["index"]).tolist()  # type: ignore[call-overload]
        if self.trainer.training:
            return self.task.batch("train", indices, self.curriculum.pairs)
        return self.task.batch("validation", indices)

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curriculum.load_state_dict(state_dict["curriculum"])


__all__ = ["MQARDataModule"]
