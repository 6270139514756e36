"""What a probe runs on: sequences with answers at some positions, of one length or of many.

An answer is one token or several. Its tokens are asked for one after the other, with those before them in the input
(teacher forcing):

    input_ids   …    name  :     4     8     2
    labels      -100 -100  4     8     2     1
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from attnres.tasks import IGNORE_INDEX, RecallBatch

NO_CANDIDATE = -1


@dataclass(frozen=True)
class Examples:
    """Sequences, padded on the right (which a causal model never sees).

    Attributes:
        input_ids: (sequences, seq) token ids.
        labels: (sequences, seq) the answer at each query position, -100 elsewhere and on padding.
        candidates: (sequences, C, A) tokens of the values in each context, answers among them, none the beginning of
            another; -1 where a value has fewer than A tokens, or a context fewer than C values.
        starts: (sequences, seq) bool: where an answer's first token is asked for; up to the next come its others.
        lengths: (sequences,) tokens without padding.
    """

    input_ids: Tensor
    labels: Tensor
    candidates: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def from_recall(cls, examples: RecallBatch) -> Examples:
        """Of answers of one token."""
        ids, labels = examples.input_ids, examples.labels
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        return cls(ids, labels, examples.values.unsqueeze(-1), labels != IGNORE_INDEX, lengths)

    @classmethod
    def collate(cls, sequences: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Examples:
        """From (input_ids (t,), labels (t,), candidates (c,) or (c, a)) of each sequence, lengths free.

        Raises:
            ValueError: a sequence without a query, or with an answer that is not among its candidates.
        """
        starts = []
        for number, (ids, labels, candidates) in enumerate(sequences):
            if len(ids) != len(labels) or not (labels != IGNORE_INDEX).any():
                raise ValueError(f"sequence {number}: labels must be as long as input_ids and hold at least one answer")
            try:
                starts.append(_find_starts(labels, candidates))
            except ValueError as error:
                raise ValueError(f"sequence {number}: {error}") from error

        def pad(parts: Sequence[Tensor], value: int) -> Tensor:
            return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=value)

        ids, labels, candidates = zip(*sequences, strict=True)
        tables = [part.view(len(part), -1) for part in candidates]
        longest = max(table.shape[1] for table in tables)
        tables = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=NO_CANDIDATE) for t in tables]
        lengths = torch.tensor([len(part) for part in ids])
        return cls(pad(ids, 0), pad(labels, IGNORE_INDEX), pad(tables, NO_CANDIDATE), pad(starts, False), lengths)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_values(self) -> int:
        """K, the values in a context: guessing one of them is the trivial plateau, with accuracy 1/K and NLL ln K."""
        return self.candidates.shape[1]

    @property
    def queries(self) -> Tensor:
        """(sequences, seq) bool: where an answer, or one of its tokens, is asked for."""
        return self.labels != IGNORE_INDEX

    @property
    def answer_rows(self) -> Tensor:
        """(answers, A): which of the query positions ask for the tokens of each answer; -1 after its last token."""
        first = self.starts[self.queries].nonzero()  # (answers, 1)
        end = torch.cat((first[1:], self.queries.sum().view(1, 1)))
        rows = first + torch.arange(self.candidates.shape[2], device=first.device)
        return rows.masked_fill(rows >= end, NO_CANDIDATE)

    @property
    def rivals(self) -> Tensor:
        """(query positions, C): what each candidate that is the answer up to there goes on with; -1 for the others.

        With answers of one token these are the candidates, for each of their sequence's queries.
        """
        rows = self.answer_rows
        candidates = self.candidates.repeat_interleave(self.starts.sum(1), dim=0)
        answers = self.labels[self.queries][rows.clamp_min(0)].unsqueeze(1)
        has_parted = (candidates != answers).cumsum(-1).roll(1, -1) > 0
        has_parted[..., 0] = False
        return candidates.masked_fill(has_parted, NO_CANDIDATE).transpose(1, 2)[rows >= 0]

    @property
    def real(self) -> Tensor:
        """(sequences, seq) bool: not padding."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """These sequences, cut to the longest of them."""
        chosen = torch.as_tensor(np.asarray(indices), device=self.input_ids.device)
        lengths = self.lengths[chosen]
        ids, labels, starts = (t[chosen, : int(lengths.max())] for t in (self.input_ids, self.labels, self.starts))
        return Examples(ids, labels, self.candidates[chosen], starts, lengths)

    def to(self, device: torch.device | str) -> Examples:
        tensors = (self.input_ids, self.labels, self.candidates, self.starts, self.lengths)
        return Examples(*(tensor.to(device) for tensor in tensors))

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
        tensors = (self.input_ids, self.labels, self.candidates, self.lengths)  # starts follow from these
        return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()[:12]


def _find_starts(labels: Tensor, candidates: Tensor) -> Tensor:
    """(t,) bool: where answers begin, if `labels` (t,) hold candidates (c,) or (c, a) and nothing else, in a row.

    Raises:
        ValueError: they do not, or the candidates cannot be told apart.
    """
    rows = candidates.view(len(candidates), -1).tolist()
    known = {tuple(token for token in row if token != NO_CANDIDATE) for row in rows}
    if any(a == b[: len(a)] for a, b in pairwise(sorted(known))):
        raise ValueError("no candidate may be the beginning of another")
    starts = torch.zeros_like(labels, dtype=torch.bool)
    positions = (labels != IGNORE_INDEX).nonzero().flatten().tolist()
    answers, done = [int(labels[position]) for position in positions], 0
    while done < len(answers):
        found = next((code for code in known if tuple(answers[done : done + len(code)]) == code), ())
        if not found or len(known) < 2:
            raise ValueError("candidates must hold every answer, and one value more")
        starts[positions[done]] = True
        done += len(found)
    return starts
