"""What an answer is worth: per-query metrics of a model's logits, computed once for clean and ablated runs alike.

An answer of several tokens counts as one: its NLL and KL are sums over its tokens, it is right where all of them are,
and its margins are those at the token where the distractor that comes closest in the clean run parts from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probe.vocabulary import MARGIN, MARGIN_TO_MEAN, MARGINS

LOGITS_PER_PASS = 2**26
"""Logits that are held at once: 256 MiB in float32."""


@dataclass(frozen=True)
class CleanRun:
    """The clean run at query positions, P of them for Q answers: what ablated runs are compared with.

    Attributes:
        log_probs, probs: (P, vocab) float32.
        answers: (P,) token ids.
        rivals: (P, K) context values other than the answer; of the values that part from the answer there, where it
            has several tokens. The rest are below zero.
        distractors: (P,) the rival with the highest clean logit (any token, where there is no rival).
        sizes: (P,) the largest absolute clean logit, to which rounding is relative.
        answer_rows: (Q, A) the positions of each answer's tokens; -1 after its last.
        decisive_rows: (Q,) which of these has the smallest clean logit difference.
    """

    log_probs: Tensor
    probs: Tensor
    answers: Tensor
    rivals: Tensor
    distractors: Tensor
    sizes: Tensor
    answer_rows: Tensor
    decisive_rows: Tensor

    @classmethod
    def from_logits(
        cls, logits: Tensor, answers: Tensor, candidates: Tensor, answer_rows: Tensor | None = None
    ) -> CleanRun:
        """`logits` (P, vocab), `answers` (P,), `candidates` (P, K) values of each one's context.

        Candidates below zero are padding. `answer_rows` (Q, A) as above; `None`: each position is an answer.
        """
        log_probs = _log_softmax(logits)
        if answer_rows is None:
            answer_rows = torch.arange(len(answers), device=answers.device).unsqueeze(1)
        rivals = candidates.masked_fill(candidates == answers[:, None], -1)
        logits = logits.to(log_probs.dtype)  # choices are made of these: rounding of the softmax swaps neighbours
        scores = logits.gather(1, rivals.clamp_min(0)).masked_fill(rivals < 0, -torch.inf)
        distractors = rivals.gather(1, scores.argmax(1, keepdim=True)).squeeze(1).clamp_min(0)
        margins = logits.gather(1, answers[:, None]).squeeze(1) - scores.amax(1)  # inf: no value parts
        margins = margins[answer_rows].masked_fill(answer_rows < 0, torch.inf)
        decisive_rows = answer_rows.gather(1, margins.argmin(1, keepdim=True)).squeeze(1)
        sizes = logits.abs().amax(1)
        return cls(log_probs, log_probs.exp(), answers, rivals, distractors, sizes, answer_rows, decisive_rows)

    def metrics(self, logits: Tensor | None = None) -> dict[str, Tensor]:
        """Per-query metrics, each (..., Q), of runs with these `logits` (..., P, vocab); `None`: of the clean run.

        logit_diff: the margin, answer minus the clean run's strongest in-context distractor. logit_diff_mean: answer
        minus the mean of the in-context distractors. nll: answer NLL. kl: KL(clean || this run) over the vocabulary;
        all in nats. accuracy: whether the answer is the argmax.
        """
        return self.by_answer(self.by_position(logits))

    def of_hidden(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """`metrics` of runs whose logits `head` makes of `hidden` (runs, P, hidden), some positions at a time."""
        runs, positions, _ = hidden.shape
        step = max(1, LOGITS_PER_PASS // (runs * self.log_probs.shape[-1]))
        rows = [slice(first, first + step) for first in range(0, positions, step)]
        parts = [self.by_position(head(hidden[:, part]), part) for part in rows]
        return self.by_answer({name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]})

    def by_position(self, logits: Tensor | None = None, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The same, (..., positions), of each token of an answer alone. `logits` are those of the positions `rows`."""
        clean = self.log_probs[rows]
        log_probs = clean if logits is None else _log_softmax(logits)
        rivals = self.rivals[rows]

        def of(ids: Tensor) -> Tensor:
            """Of tokens (positions, k): (..., positions, k)."""
            return log_probs.gather(-1, ids.expand(*log_probs.shape[:-1], ids.shape[-1]))

        answer, distractor = (of(ids[rows, None]).squeeze(-1) for ids in (self.answers, self.distractors))
        is_rival = rivals >= 0
        mean = of(rivals.clamp_min(0)).where(is_rival, 0.0).sum(-1) / is_rival.sum(-1).clamp_min(1)
        kl = torch.linalg.vecdot(self.probs[rows], clean - log_probs)
        accuracy = (log_probs.argmax(-1) == self.answers[rows]).to(log_probs.dtype)
        margins = {MARGIN: answer - distractor, MARGIN_TO_MEAN: answer - mean}
        return margins | {"nll": -answer, "kl": kl, "accuracy": accuracy}

    def by_answer(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of all positions (..., P) put together for each answer: (..., Q)."""
        is_token = self.answer_rows >= 0
        margins = {name: values[name][..., self.decisive_rows] for name in MARGINS}
        nll, kl, accuracy = (values[name][..., self.answer_rows] for name in ("nll", "kl", "accuracy"))  # (..., Q, A)
        nll, kl = (value.where(is_token, 0.0).sum(-1) for value in (nll, kl))
        return margins | {"nll": nll, "kl": kl, "accuracy": accuracy.where(is_token, 1.0).amin(-1)}

    @property
    def logit_sizes(self) -> Tensor:
        """(Q,) `sizes` where each answer is decided."""
        return self.sizes[self.decisive_rows]


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, or float64 for a float64 model."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def sum_by_sequence(values: Tensor, starts: Tensor) -> np.ndarray:
    """Sum per-query `values` (queries,) over each sequence of the mask `starts` (B, T): (B,) float64."""
    starts = starts.cpu()
    scattered = torch.zeros(starts.shape, dtype=torch.float64)  # on the CPU: not every device has float64
    scattered[starts] = values.cpu().double()
    return scattered.sum(1).numpy()
