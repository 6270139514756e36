"""What a probe runs on: sequences with answers at some positions, of one length or of many.

An answer is one token or several. Its tokens are asked for one after the other, with those before them in the input
(teacher forcing):

    input_ids   …    name  :     4     8     2
    labels      -100 -100  4     8     2     1
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from attnres.inputs import check_memory
from attnres.tasks import IGNORE_INDEX, TaskBatch
from probe.examples.prompts import Prompt, tokenize

NO_CANDIDATE = -1
Row = tuple[Tensor, Tensor, Tensor]
"""One sequence of `Examples.collate`."""


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
        clusters: (sequences,) the cluster that each belongs to, which is the unit of all statistics; numbered from 0
            as they first appear.
    """

    input_ids: Tensor
    labels: Tensor
    candidates: Tensor
    starts: Tensor
    lengths: Tensor
    clusters: Tensor

    @classmethod
    def from_batch(cls, examples: TaskBatch, group: int | None = None) -> Examples:
        """Of a task's examples, whose answers are one token each.

        Args:
            group: take only the queries of this group (`TaskBatch.groups`).

        Raises:
            ValueError: an example has no query of the group.
        """
        ids, labels = examples.input_ids, examples.labels
        if group is not None:
            others = torch.zeros_like(labels, dtype=torch.bool)
            others[:, examples.query_positions] = examples.groups != group
            labels = labels.masked_fill(others, IGNORE_INDEX)
            if (none := (labels == IGNORE_INDEX).all(1)).any():
                raise ValueError(f"sequence {int(none.nonzero()[0])} has no query of this group")
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        clusters = torch.arange(len(ids), device=ids.device)
        return cls(ids, labels, examples.candidates.unsqueeze(-1), labels != IGNORE_INDEX, lengths, clusters)

    @classmethod
    def from_prompts(
        cls, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, names: Sequence[str] | None = None
    ) -> Examples:
        """Of prompts as `tokenizer` writes them; those of one cluster id are one cluster.

        Args:
            names: what messages call each; `None`: prompt 0 and so on.

        Raises:
            ValueError: no prompts, or one whose answer the tokenizer does not keep apart from the prompt or from a
                distractor.
        """
        if not prompts:
            raise ValueError("there are no prompts")
        rows = []
        for number, prompt in enumerate(prompts):
            try:
                rows.append(as_row(*tokenize(tokenizer, prompt.prompt, (prompt.answer, *prompt.distractors)), 0))
            except ValueError as error:
                name = f"prompt {number}" if names is None else names[number]
                hint = "begin answers with their space, or word them otherwise"
                raise ValueError(f"{name}: the tokenizer {error}: {hint}") from error
        return cls.collate(rows, [prompt.cluster for prompt in prompts])

    @classmethod
    def collate(cls, sequences: Sequence[Row], clusters: Sequence[str | None] | None = None) -> Examples:
        """From (input_ids (t,), labels (t,), candidates (c,) or (c, a)) of each sequence, lengths free.

        Args:
            clusters: the id of each sequence's cluster; `None` for a cluster of its own.

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
        longest, most = max(table.shape[1] for table in tables), max(map(len, tables))
        padded_to = max(map(len, ids))
        check_memory(
            f"{len(ids):,} sequences, padded to {padded_to:,} tokens and {most:,} candidates of {longest:,},",
            len(ids) * (17 * padded_to + 8 * most * longest),
            "take fewer, or of more even lengths",
        )
        tables = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=NO_CANDIDATE) for t in tables]
        lengths = torch.tensor([len(part) for part in ids])
        padded = pad(ids, 0), pad(labels, IGNORE_INDEX), pad(tables, NO_CANDIDATE), pad(starts, False)
        return cls(*padded, lengths, _number_clusters(clusters or [None] * len(ids)))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def plateau_accuracy(self) -> float:
        """Accuracy of the trivial solution, which guesses one of each answer's candidates."""
        candidates = (self.candidates[..., 0] != NO_CANDIDATE).sum(1)
        answers = self.starts.sum(1)
        return sum(int(answers[candidates == k].sum()) / int(answers.sum()) / k for k in candidates.unique().tolist())

    @property
    def num_values(self) -> int:
        """K, the values in a context: the trivial plateau is an accuracy of 1/K and an NLL of ln K.

        Where contexts differ, the whole number at or below 1 / `plateau_accuracy`: the plateau is not put too low.
        """
        return math.floor(1 / self.plateau_accuracy + 1e-9)

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
        return Examples(ids, labels, self.candidates[chosen], starts, lengths, self.clusters[chosen])

    def to(self, device: torch.device | str) -> Examples:
        tensors = (self.input_ids, self.labels, self.candidates, self.starts, self.lengths, self.clusters)
        return Examples(*(tensor.to(device) for tensor in tensors))

    def check_fits(self, config: PreTrainedConfig, names: Sequence[str] | None = None) -> None:
        """Raise a ValueError that names the first sequence that a model of this configuration cannot be run on.

        Args:
            names: what messages call each; `None`: sequence 0 and so on.
        """
        most = config.max_position_embeddings
        largest = torch.stack([t.flatten(1).amax(1) for t in (self.input_ids, self.labels, self.candidates)]).amax(0)
        for number, (length, token) in enumerate(zip(self.lengths.tolist(), largest.tolist(), strict=True)):
            name = f"sequence {number}" if names is None else names[number]
            if length > most:
                raise ValueError(f"{name} has {length} tokens, the model is made for {most} (max_position_embeddings)")
            if token >= config.vocab_size:
                raise ValueError(f"{name} has the token id {token}, the model's vocabulary is {config.vocab_size}")

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
        """Hash of the data: equal where two probes can be compared cluster by cluster."""
        tensors = [self.input_ids, self.labels, self.candidates, self.lengths]  # starts follow from these
        if len(self.clusters.unique()) < len(self):
            tensors.append(self.clusters)
        return hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in tensors)).hexdigest()[:12]


def as_row(prompt: Sequence[int], codes: Sequence[Sequence[int]], answer: int) -> Row:
    """One prompt as a sequence that ends in its answer, but for the last token.

    Args:
        prompt: token ids, at least one.
        codes: of each candidate; none is the beginning of another.
        answer: which of them is asked for.
    """
    tokens = torch.tensor(codes[answer])
    ids = torch.cat((torch.tensor(prompt), tokens[:-1]))
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[len(prompt) - 1 :] = tokens
    longest = max(len(code) for code in codes)
    return ids, labels, torch.tensor([[*code, *[NO_CANDIDATE] * (longest - len(code))] for code in codes])


def _number_clusters(ids: Sequence[str | None]) -> Tensor:
    """(sequences,) numbers from 0 as the ids first appear; each `None` is one of its own."""
    numbers: dict[str | int, int] = {}
    return torch.tensor([numbers.setdefault(i if name is None else name, len(numbers)) for i, name in enumerate(ids)])


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
