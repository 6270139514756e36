"""What a probe runs on: sequences with answers at some positions, of one length or of many."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnres.tasks import IGNORE_INDEX, RecallBatch

NO_CANDIDATE = -1


@dataclass(frozen=True)
class ProbeInputs:
    """Sequences, padded on the right (which a causal model never sees).

    Attributes:
        input_ids: (sequences, seq) token ids.
        labels: (sequences, seq) the answer at each query position, -100 elsewhere and on padding.
        candidates: (sequences, C) the values in each context, answers among them; -1 where there are fewer than C.
        lengths: (sequences,) tokens without padding.
    """

    input_ids: Tensor
    labels: Tensor
    candidates: Tensor
    lengths: Tensor

    @classmethod
    def from_recall(cls, examples: RecallBatch) -> ProbeInputs:
        ids = examples.input_ids
        return cls(ids, examples.labels, examples.values, torch.full((len(ids),), ids.shape[1], device=ids.device))

    @classmethod
    def collate(cls, sequences: Sequence[tuple[Tensor, Tensor, Tensor]]) -> ProbeInputs:
        """From (input_ids (t,), labels (t,), candidates (c,)) of each sequence, lengths free.

        Raises:
            ValueError: a sequence without a query, or with an answer that is not among its candidates.
        """
        for number, (ids, labels, candidates) in enumerate(sequences):
            answers = labels[labels != IGNORE_INDEX]
            if len(ids) != len(labels) or not len(answers):
                raise ValueError(f"sequence {number}: labels must be as long as input_ids and hold at least one answer")
            if not torch.isin(answers, candidates).all() or len(candidates) < 2:
                raise ValueError(f"sequence {number}: candidates must hold every answer, and one value more")

        def pad(parts: Sequence[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)

        ids, labels, candidates = zip(*sequences, strict=True)
        lengths = torch.tensor([len(part) for part in ids])
        return cls(pad(ids, 0), pad(labels, IGNORE_INDEX), pad(candidates, NO_CANDIDATE), lengths)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def queries(self) -> Tensor:
        """(sequences, seq) bool: where an answer is asked for."""
        return self.labels != IGNORE_INDEX

    @property
    def real(self) -> Tensor:
        """(sequences, seq) bool: not padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def take(self, indices: Sequence[int] | np.ndarray) -> ProbeInputs:
        """These sequences, cut to the longest of them."""
        chosen = torch.as_tensor(np.asarray(indices), device=self.input_ids.device)
        lengths = self.lengths[chosen]
        seq = int(lengths.max())
        return ProbeInputs(self.input_ids[chosen, :seq], self.labels[chosen, :seq], self.candidates[chosen], lengths)

    def to(self, device: torch.device | str) -> ProbeInputs:
        return ProbeInputs(*(t.to(device) for t in (self.input_ids, self.labels, self.candidates, self.lengths)))

    def partners(self, seed: int = 0) -> np.ndarray:
        """(sequences,) another sequence for each, of the same length and with queries at the same positions.

        A seeded random cycle through each group of such sequences, so that each serves once.

        Raises:
            ValueError: a sequence is the only one of its shape.
        """
        rng = np.random.default_rng(seed)
        groups: dict[bytes, list[int]] = {}
        for number, (row, length) in enumerate(zip(self.queries.cpu().numpy(), self.lengths.tolist(), strict=True)):
            groups.setdefault(row[:length].tobytes(), []).append(number)
        partners = np.empty(len(self), dtype=np.int64)
        for members in groups.values():
            if len(members) < 2:
                raise ValueError(
                    f"sequence {members[0]} has no partner: kinds that take another example's content or weights need "
                    "two sequences of each length, with queries at the same positions"
                )
            cycle = rng.permutation(members)
            partners[cycle] = np.roll(cycle, -1)
        return partners

    def data_id(self) -> str:
        """Hash of the data: equal where two probes can be compared sequence by sequence."""
        tensors = (self.input_ids, self.labels, self.candidates, self.lengths)
        return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()[:12]
