"""Multi-query associative recall (MQAR): a context of key-value pairs, then the keys again in random order.

With three pairs, keys k*, values v* (arXiv:2312.04927, with the answers kept out of the input):

    input_ids   k1   v1   k2   v2   k3   v3   k2   k3   k1
    labels      -100 -100 -100 -100 -100 -100 v2   v3   v1

Labels stand *at* the query (no shift). Keys are distinct and come from the lower half of the vocabulary, values are
distinct and come from the upper half. Answers never follow their query: if they did, elimination among the values
left over would be a second way to gain accuracy, and the lookup is not learned.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
SPLITS = ("train", "validation", "probe")


@dataclass(frozen=True)
class RecallBatch:
    """A batch of recall examples, p pairs each.

    Attributes:
        keys: (batch, p) token ids in context order.
        values: (batch, p) token ids; `values[:, j]` belongs to `keys[:, j]`.
        query_order: (batch, p) a permutation; query i asks for `keys[query_order[i]]`.
    """

    keys: Tensor
    values: Tensor
    query_order: Tensor

    @property
    def input_ids(self) -> Tensor:
        """(batch, 3 p): pairs interleaved, then the queries."""
        pairs = torch.stack((self.keys, self.values), dim=-1).flatten(1)
        return torch.cat((pairs, self.keys.gather(1, self.query_order)), dim=1)

    @property
    def answers(self) -> Tensor:
        """(batch, p): the value asked for by each query."""
        return self.values.gather(1, self.query_order)

    @property
    def labels(self) -> Tensor:
        """(batch, 3 p): the answer at each query position, -100 elsewhere."""
        context = torch.full((self.keys.shape[0], 2 * self.keys.shape[1]), IGNORE_INDEX, device=self.keys.device)
        return torch.cat((context, self.answers), dim=1)

    def to(self, device: torch.device | str) -> RecallBatch:
        return RecallBatch(self.keys.to(device), self.values.to(device), self.query_order.to(device))


@dataclass(frozen=True)
class MQAR:
    """The task: a pure function from (seed, split, index, pairs) to an example.

    Args:
        num_pairs: K, the number of pairs of the full task.
        vocab_size: keys are in [0, vocab_size // 2), values in [vocab_size // 2, vocab_size).
        seed: names the training and validation streams: the same index of another seed or split is another,
            independent example. The probe split is one and the same for every seed, so that models of different
            seeds are compared on the same examples.

    Raises:
        ValueError: fewer than one pair, or more pairs than there are keys or values.
    """

    num_pairs: int = 16
    vocab_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {self.num_pairs}")
        if self.num_pairs > self.vocab_size // 2:
            raise ValueError(
                f"num_pairs ({self.num_pairs}) is too large for vocab_size {self.vocab_size}: keys and values are "
                f"distinct and each come from one half, so num_pairs must be at most {self.vocab_size // 2}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def num_values(self) -> int:
        """Token ids that are values: the upper half of the vocabulary."""
        return self.vocab_size - self.vocab_size // 2

    @property
    def chance_accuracy(self) -> float:
        """Accuracy of a guess from the whole vocabulary."""
        return 1 / self.vocab_size

    @property
    def plateau_accuracy(self) -> float:
        """Accuracy of the trivial solution that guesses a value of the context, 1/K; its NLL is ln K."""
        return 1 / self.num_pairs

    def batch(self, split: str, indices: Iterable[int], num_pairs: int | None = None) -> RecallBatch:
        """Examples `indices` of `split`, with `num_pairs` pairs each (default: all K)."""
        num_pairs = self.num_pairs if num_pairs is None else num_pairs
        if split not in SPLITS:
            raise ValueError(f"split '{split}' does not exist; choose from {', '.join(SPLITS)}")
        if not 1 <= num_pairs <= self.num_pairs:
            raise ValueError(f"num_pairs must be between 1 and {self.num_pairs}, got {num_pairs}")
        examples = [self._draw(split, int(index), num_pairs) for index in indices]
        keys, values, query_order = (torch.from_numpy(np.stack(part)) for part in zip(*examples, strict=True))
        return RecallBatch(keys, values, query_order)

    def _draw(self, split: str, index: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # numpy's SeedSequence mixes all four numbers, so no two streams coincide, and any example can be made again.
        seed = 0 if split == "probe" else self.seed
        rng = np.random.default_rng((seed, SPLITS.index(split), index, num_pairs))
        half = self.vocab_size // 2
        keys = rng.choice(half, num_pairs, replace=False)
        values = half + rng.choice(self.num_values, num_pairs, replace=False)
        return keys, values, rng.permutation(num_pairs)

    def to_dict(self) -> dict[str, str | int]:
        """Plain settings, as saved beside a model; `from_dict` reads them back."""
        return {"task": "mqar", **asdict(self)}

    @classmethod
    def from_dict(cls, settings: dict[str, str | int]) -> MQAR:
        """Inverse of `to_dict`. Raises ValueError for another task, or for settings that are not this one's."""
        fields = dict(settings)
        if fields.pop("task", None) != "mqar":
            raise ValueError(f"task '{settings.get('task')}' is not supported; the one task is 'mqar'")
        unknown = fields.keys() - {"num_pairs", "vocab_size", "seed"}
        for key, value in fields.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"task setting {key} must be an integer, got {value!r}")
        if unknown:
            raise ValueError(f"unknown task setting '{min(unknown)}'; choose from num_pairs, vocab_size, seed")
        return cls(**fields)  # type: ignore[arg-type]


__all__ = ["IGNORE_INDEX", "MQAR", "SPLITS", "RecallBatch"]
