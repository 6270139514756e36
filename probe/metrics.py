"""What an answer is worth: per-query metrics of a model's logits, computed once for clean and ablated runs alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

METRICS = ("nll", "logit_diff", "kl", "accuracy")
PRIMARY = "nll"
HARM_SIGN = {"nll": 1.0, "logit_diff": -1.0, "kl": 1.0, "accuracy": -1.0}
"""Multiply an effect by this to get harm: positive is worse for the model."""


@dataclass(frozen=True)
class CleanRun:
    """The clean run of some queries: what ablated runs are compared with.

    Attributes:
        log_probs, probs: (queries, vocab) float32.
        answers: (queries,) token ids.
        distractors: (queries,) the context value, other than the answer, with the highest clean logit.
    """

    log_probs: Tensor
    probs: Tensor
    answers: Tensor
    distractors: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, answers: Tensor, candidates: Tensor) -> CleanRun:
        """`logits` (queries, vocab), `answers` (queries,), `candidates` (queries, K) values of each one's context.

        Candidates below zero are padding.
        """
        log_probs = _log_softmax(logits)
        excluded = (candidates == answers[:, None]) | (candidates < 0)
        candidates = candidates.clamp_min(0)
        candidate_scores = log_probs.gather(1, candidates).masked_fill(excluded, -torch.inf)
        distractors = candidates.gather(1, candidate_scores.argmax(1, keepdim=True)).squeeze(1)
        return cls(log_probs, log_probs.exp(), answers, distractors)

    def rows(self, rows: slice) -> CleanRun:
        """The same run of some of the queries; nothing is copied."""
        return CleanRun(self.log_probs[rows], self.probs[rows], self.answers[rows], self.distractors[rows])

    def metrics(self, logits: Tensor | None = None) -> dict[str, Tensor]:
        """Per-query metrics, each (..., queries), of runs with these `logits` (..., queries, vocab); `None`: of the
        clean run.

        nll: answer NLL in nats. logit_diff: answer minus the clean run's strongest in-context distractor.
        kl: KL(clean || this run) in nats over the vocabulary. accuracy: whether the answer is the argmax.
        """
        log_probs = self.log_probs if logits is None else _log_softmax(logits)
        answer, distractor = (
            log_probs.gather(-1, ids.expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)
            for ids in (self.answers, self.distractors)
        )
        kl = torch.linalg.vecdot(self.probs, self.log_probs - log_probs)
        accuracy = (log_probs.argmax(-1) == self.answers).to(log_probs.dtype)
        return {"nll": -answer, "logit_diff": answer - distractor, "kl": kl, "accuracy": accuracy}


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, or float64 for a float64 model."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
