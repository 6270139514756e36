"""What a trace runs on, made of a task's flips: in each context, the value that one query asks for is another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from attnres.tasks import Task, TaskBatch
from probe.trace.flips import Flips

BEFORE_QUERY = 8
"""The most tokens before the query that are patched by name."""


def flips_of_task(task: Task, count: int, seed: int = 0, group: str | None = None) -> tuple[Flips, dict[str, Tensor]]:
    """The first `count` contexts of the split probe, a flip of each, and the places to look at, by name.

    Of each context the first change of `task.flips` is taken that another answer follows from, and of the queries that
    it changes a random one. Places are `value`, which is changed, the tokens next to it, and the query with the tokens
    before it. Left out are places that not every sequence has, and those before the query that reach back to the value.

    Args:
        group: take only queries of this one of `task.groups`.

    Raises:
        ValueError: the task has no value left to change one to, or a context has no query that a change is of.
    """
    if not task.num_flips:
        raise ValueError("a trace needs a value that is not in the context, and this task has none left")
    batch = task.batch("probe", range(count))
    corrupted, query = _changed(task, batch, seed, group)
    rows = torch.arange(count)
    position = batch.query_positions[query]
    answers = [part[rows, position] for part in (batch.labels, corrupted[1])]
    flips = Flips(batch.input_ids, corrupted[0], position, *answers)
    return flips, _places(flips)


def _changed(task: Task, batch: TaskBatch, seed: int, group: str | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(input_ids, labels) with a value changed, each (batch, seq), and (batch,) a query whose answer is another now."""
    rng = np.random.default_rng(seed)
    ids, labels, query = batch.input_ids.clone(), batch.labels.clone(), torch.full((len(batch),), -1)
    taken = (
        torch.ones_like(batch.groups, dtype=torch.bool) if group is None else batch.groups == task.groups.index(group)
    )
    for flip in task.flips(batch, seed):
        differs = (flip.changed.labels != batch.labels)[:, batch.query_positions] & taken
        for row in ((query < 0) & differs.any(1)).nonzero().flatten().tolist():
            ids[row], labels[row] = flip.changed.input_ids[row], flip.changed.labels[row]
            query[row] = int(rng.choice(differs[row].nonzero().flatten().numpy()))
    if (query < 0).any():
        number = int((query < 0).nonzero()[0])
        raise ValueError(f"sequence {number}: none of the changes of the task's flips is of what is asked for")
    return (ids, labels), query


def token_kinds(task: Task, flips: Flips, places: Mapping[str, Tensor]) -> dict[str, str]:
    """What the tokens at each place are, such as "bit", or "bit / query" where contexts differ."""
    rows = torch.arange(len(flips))
    found = {
        name: {task.token_kind(token) for token in flips.clean_ids[rows, at].tolist()} for name, at in places.items()
    }
    return {name: " / ".join(sorted(filter(None, kinds))) for name, kinds in found.items()}


def _places(flips: Flips) -> dict[str, Tensor]:
    value, query = flips.differs.long().argmax(1), flips.position
    places = {name: value + shift for name, shift in (("value - 1", -1), ("value", 0), ("value + 1", 1))}
    before = range(min(BEFORE_QUERY, int((query - value).min()) - 1), 0, -1)
    places |= {f"query - {shift}": query - shift for shift in before} | {"query": query}
    return {name: at for name, at in places.items() if bool((at >= 0).all() and (at <= query).all())}
