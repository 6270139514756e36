"""The flip test: behavioural ground truth for recall, without looking inside.

Change the queried key's value in the context and the output must follow; change another key's and it must not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnres.tasks import Task, TaskBatch
from probe.examples.examples import Examples


@dataclass(frozen=True)
class FlipResult:
    """Shares of queries whose output is the new value, after the value of one key was changed.

    Attributes:
        follows_queried: over queries of the changed key (should be 1).
        follows_other: over queries of the other keys of the same context (should be 0).
        n_queried, n_other: the queries these rest on.
        n_sequences: contexts.
    """

    follows_queried: float
    follows_other: float
    n_queried: int
    n_other: int
    n_sequences: int


@torch.no_grad()
def _predict(model: PreTrainedModel, examples: TaskBatch, batch_size: int) -> Tensor:
    """The most probable token at each query, (sequences, queries), on the CPU."""
    positions, predictions = examples.query_positions.to(model.device), []
    for input_ids in examples.input_ids.split(batch_size):
        logits = model(input_ids.to(model.device), logits_to_keep=positions, use_cache=False).logits
        predictions.append(logits.argmax(-1).cpu())
    return torch.cat(predictions)


@torch.no_grad()
def recall_accuracy(model: PreTrainedModel, inputs: Examples, batch_size: int = 64) -> float:
    """Share of queries that the model answers rightly: with every token of the answer."""
    answered = []
    for first in range(0, len(inputs), batch_size):
        batch = inputs.take(np.arange(first, min(first + batch_size, len(inputs))))
        first_query = int(batch.queries.any(0).nonzero()[0])
        kept = batch.input_ids.shape[1] - first_query
        logits = model(batch.input_ids.to(model.device), logits_to_keep=kept, use_cache=False).logits
        is_right = logits.argmax(-1).cpu() == batch.labels[:, first_query:]
        is_right = is_right[batch.queries[:, first_query:]]
        answered.append((is_right[batch.answer_rows] | (batch.answer_rows < 0)).all(1))
    return float(torch.cat(answered).double().mean())


def flip_test(
    model: PreTrainedModel, task: Task, examples: TaskBatch, seed: int = 0, batch_size: int = 64
) -> FlipResult:
    """Change one value of every context, `task.num_flips` times; see `Task.flips`.

    Raises:
        ValueError: the task has no value left that is not in the context.
    """
    if not task.num_flips:
        raise ValueError("the flip test needs a value that is not in the context: all values are in use")
    labels = examples.labels[:, examples.query_positions]
    hits, counts = {True: 0, False: 0}, {True: 0, False: 0}
    for flip in task.flips(examples, seed):
        answers = flip.changed.labels[:, flip.changed.query_positions]
        follows = _predict(model, flip.changed, batch_size)
        is_queried = answers != labels
        follows = follows == torch.where(is_queried, answers, flip.value[:, None])
        is_other = ~is_queried & (labels != flip.value[:, None])  # it may be right, for another reason
        for queried, chosen in ((True, is_queried), (False, is_other)):
            hits[queried] += int(follows[chosen].sum())
            counts[queried] += int(chosen.sum())
    return FlipResult(
        follows_queried=hits[True] / counts[True],
        follows_other=hits[False] / counts[False],
        n_queried=counts[True],
        n_other=counts[False],
        n_sequences=len(examples),
    )
