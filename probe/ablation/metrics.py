"""What an answer is worth: per-query metrics of a model's logits, computed once for clean and ablated runs alike.

An answer of several tokens counts as one: its NLL and KL are sums over its tokens, it is right where all of them are,
and its logit difference is that at the token where the distractor that comes closest in the clean run parts from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CleanRun:
    """The clean run at query positions, P of them for Q answers: what ablated runs are compared with.

    Attributes:
        log_probs, probs: (P, vocab) float32.
        answers: (P,) token ids.
        distractors: (P,) the context value, other than the answer, with the highest clean logit; of the values that
            part from the answer there, where it has several tokens (any token, where none does).
        answer_rows: (Q, A) the positions of each answer's tokens; -1 after its last.
        decisive_rows: (Q,) which of these has the smallest clean logit difference.
    """

    log_probs: Tensor
    probs: Tensor
    answers: Tensor
    distractors: Tensor
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
        excluded = (candidates == answers[:, None]) | (candidates < 0)
        candidates = candidates.clamp_min(0)
        candidate_scores = log_probs.gather(1, candidates).masked_fill(excluded, -torch.inf)
        distractors = candidates.gather(1, candidate_scores.argmax(1, keepdim=True)).squeeze(1)
        margins = log_probs.gather(1, answers[:, None]).squeeze(1) - candidate_scores.amax(1)  # inf: no value parts
        margins = margins[answer_rows].masked_fill(answer_rows < 0, torch.inf)
        decisive_rows = answer_rows.gather(1, margins.argmin(1, keepdim=True)).squeeze(1)
        return cls(log_probs, log_probs.exp(), answers, distractors, answer_rows, decisive_rows)

    def metrics(self, logits: Tensor | None = None) -> dict[str, Tensor]:
        """Per-query metrics, each (..., Q), of runs with these `logits` (..., P, vocab); `None`: of the clean run.

        nll: answer NLL in nats. logit_diff: answer minus the clean run's strongest in-context distractor.
        kl: KL(clean || this run) in nats over the vocabulary. accuracy: whether the answer is the argmax.
        """
        return self.by_answer(self.by_position(logits))

    def by_position(self, logits: Tensor | None = None, rows: slice = slice(None)) -> dict[str, Tensor]:
        """The same, (..., positions), of each token of an answer alone. `logits` are those of the positions `rows`."""
        clean = self.log_probs[rows]
        log_probs = clean if logits is None else _log_softmax(logits)
        answer, distractor = (
            log_probs.gather(-1, ids[rows].expand(log_probs.shape[:-1]).unsqueeze(-1)).squeeze(-1)
            for ids in (self.answers, self.distractors)
        )
        kl = torch.linalg.vecdot(self.probs[rows], clean - log_probs)
        accuracy = (log_probs.argmax(-1) == self.answers[rows]).to(log_probs.dtype)
        return {"nll": -answer, "logit_diff": answer - distractor, "kl": kl, "accuracy": accuracy}

    def by_answer(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values of all positions (..., P) put together for each answer: (..., Q)."""
        is_token = self.answer_rows >= 0
        tokens = {name: value[..., self.answer_rows] for name, value in values.items()}  # (..., Q, A)
        return {
            "nll": tokens["nll"].where(is_token, 0.0).sum(-1),
            "logit_diff": values["logit_diff"][..., self.decisive_rows],
            "kl": tokens["kl"].where(is_token, 0.0).sum(-1),
            "accuracy": tokens["accuracy"].where(is_token, 1.0).amin(-1),
        }


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, or float64 for a float64 model."""
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
