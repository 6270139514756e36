"""The flip test: behavioural ground truth, without looking inside.

Change a value in the context. Where it was asked for, the output must follow; where another was, it must stay.

An output *follows* if it is the answer after the change; where another value was asked for, if it is the new value.
It *moves* if its first token is another than before the change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnres.tasks import Task, TaskBatch
from probe.examples.examples import Examples


@dataclass(frozen=True)
class FlipResult:
    """Shares of queries whose output follows the change of one value of their context.

    Attributes:
        follows_queried: over queries whose answer it changes (should be 1); NaN where there are none.
        follows_other: over the other queries of the same context (should be 0).
        n_queried, n_other: the queries these rest on.
        n_sequences: contexts.
    """

    follows_queried: float
    follows_other: float
    n_queried: int
    n_other: int
    n_sequences: int

    @classmethod
    def of(cls, outcomes: pd.DataFrame) -> FlipResult:
        """From a table of `flip_outcomes`."""
        parts = [outcomes.loc[outcomes["asked"] == asked, "follows"] for asked in (True, False)]
        queried, other = (float(part.mean()) if len(part) else math.nan for part in parts)
        return cls(queried, other, len(parts[0]), len(parts[1]), outcomes["sequence"].nunique())


@torch.no_grad()
def answered(model: PreTrainedModel, inputs: Examples, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Of each answer: the most probable first token, and whether all of its tokens are the most probable; on the CPU.

    Returns:
        (answers,) int64 and (answers,) bool, sequence by sequence.
    """
    firsts, rights = [], []
    for first in range(0, len(inputs), batch_size):
        batch = inputs.take(np.arange(first, min(first + batch_size, len(inputs))))
        first_query = int(batch.queries.any(0).nonzero()[0])
        kept = batch.input_ids.shape[1] - first_query
        logits = model(batch.input_ids.to(model.device), logits_to_keep=kept, use_cache=False).logits
        found = logits.argmax(-1).cpu()
        is_right = (found == batch.labels[:, first_query:])[batch.queries[:, first_query:]]
        firsts.append(found[batch.starts[:, first_query:]])
        rights.append((is_right[batch.answer_rows] | (batch.answer_rows < 0)).all(1))
    return torch.cat(firsts), torch.cat(rights)


def recall_accuracy(model: PreTrainedModel, inputs: Examples, batch_size: int = 64) -> float:
    """Share of queries that the model answers rightly: with every token of the answer."""
    return float(answered(model, inputs, batch_size)[1].double().mean())


def flip_outcomes(
    model: PreTrainedModel, task: Task, batch: TaskBatch, seed: int = 0, batch_size: int = 64
) -> pd.DataFrame:
    """What each change of `task.flips` does to the output at each query of `batch`.

    Left out are queries of other values whose answer is the new value already.

    Returns:
        A row per change, sequence and query: `change`, `sequence`, `query` (its number), `group` (a name of
        `task.groups`), `asked` (whether the change was of what is asked for), `follows`, `moves`.

    Raises:
        ValueError: the task has no value left that is not in the context.
    """
    if not task.num_flips:
        raise ValueError("the flip test needs a value that is not in the context: all values are in use")
    examples = Examples.from_batch(batch)
    before, _ = answered(model, examples, batch_size)
    labels, groups = examples.labels[examples.queries], np.array(task.groups)[batch.groups.cpu().numpy()]
    per_sequence, rows = groups.shape[1], []
    for number, flip in enumerate(task.flips(batch, seed)):
        changed = Examples.from_batch(flip.changed)
        after, is_right = answered(model, changed, batch_size)
        asked = changed.labels[changed.queries] != labels.cpu()
        value = flip.value.cpu().repeat_interleave(per_sequence)
        table = pd.DataFrame(
            {
                "change": number,
                "sequence": np.arange(len(batch)).repeat(per_sequence),
                "query": np.tile(np.arange(per_sequence), len(batch)),
                "group": groups.ravel(),
                "asked": asked.numpy(),
                "follows": torch.where(asked, is_right, after == value).numpy(),
                "moves": (after != before).numpy(),
            }
        )
        rows.append(table[(asked | (labels.cpu() != value)).numpy()])
    return pd.concat(rows, ignore_index=True)


def outcomes_of_prompts(
    model: PreTrainedModel, before: Examples, changed: Iterable[tuple[bool, Examples]], batch_size: int
) -> pd.DataFrame:
    """As `flip_outcomes`, of prompts with one answer each, which is the new one after each change.

    Args:
        changed: whether what is asked for was changed, and the prompts afterwards.
    """
    first, _ = answered(model, before, batch_size)
    rows = []
    for number, (asked, examples) in enumerate(changed):
        after, follows = answered(model, examples, batch_size)
        about = {"change": number, "sequence": np.arange(len(first)), "query": 0, "group": "answer", "asked": asked}
        rows.append(pd.DataFrame(about | {"follows": follows.numpy(), "moves": (after != first).numpy()}))
    return pd.concat(rows, ignore_index=True)
