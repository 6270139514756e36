"""Which patches are run, and which together: known from the tokens alone, before any model is run.

A patch of one sequence at one site is a *row*. It is not run where that would change nothing: where the two runs are
the same at all of its positions (`live_positions`), and where nothing of the patched run would be left (`is_cut`).
Rows that begin at one read, in either direction, are run together: from the first of their positions that is patched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from probe.trace.flips import Flips
from probe.trace.sites import EDGE, INPUT, OUTPUT, SOURCE, Site, is_cut, live_positions

FIRST_SHARE = 0.75
"""A row of fewer positions than this share of the longest one's begins a pass of its own, if that has enough tokens."""
ENOUGH_TOKENS = 512
KEYS_OF_A_TOKEN = 4
"""Keys and values that an edge's row sees, each taken from a kept run, count as a token of a pass for so many."""


@dataclass(frozen=True)
class Rows:
    """Rows that begin at one read, N of them, in the order of the first position that is patched.

    Attributes:
        at_answer: whether nothing but the position that asks matters: no attention follows.
        site: (N,) index of its site.
        place: (N,) index of its positions.
        sequence: (N,) index of its sequence.
        direction: (N,) index of its direction.
        mask: (N, seq) bool: where it is patched.
        position: (N,) where the answer is asked for.
    """

    kind: str
    read: int
    at_answer: bool
    site: Tensor
    place: Tensor
    sequence: Tensor
    direction: Tensor
    mask: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.site)

    @property
    def first(self) -> Tensor:
        """(N,) the first position that is another: where it is patched, or of an edge, where it is seen."""
        return self.position if self.kind == EDGE else self.mask.int().argmax(1)

    @property
    def span(self) -> tuple[int, int]:
        """The positions that have to be run, up to the last sublayers."""
        return int(self.first[0]), int(self.position.max()) + 1

    def take(self, rows: Any) -> Rows:
        held = ("site", "place", "sequence", "direction", "mask", "position")
        return replace(self, **{name: getattr(self, name)[rows] for name in held})

    def to(self, device: torch.device) -> Rows:
        held = ("sequence", "direction", "mask", "position")
        return replace(self, **{name: getattr(self, name).to(device) for name in held})


@dataclass(frozen=True)
class Work:
    """All that a trace does on a batch of sequences.

    Attributes:
        passes: rows that are run together.
        whole: (sites, positions, sequences) bool: the patched run is the other run.
    """

    passes: tuple[Rows, ...]
    whole: Tensor


def plan_work(
    sites: Sequence[Site],
    masks: Mapping[Any, Tensor],
    flips: Flips,
    directions: Sequence[int],
    tokens_per_pass: int,
    model: Mapping[str, Any],
) -> Work:
    """The work of a trace.

    Args:
        masks: (sequences, seq) bool, of each set of positions.
        directions: indices.
        tokens_per_pass: most positions of one pass; one row is the least.
        model: `num_layers`, and what `is_cut` takes.
    """
    stacked = torch.stack(list(masks.values()))  # (positions, sequences, seq)
    whole = torch.zeros((len(sites), *stacked.shape[:2]), dtype=torch.bool)
    passes: list[Rows] = []
    for _, group in groupby(range(len(sites)), key=lambda i: _begins(sites[i])):
        rows = []
        for index in group:
            live = live_positions(sites[index], model["num_layers"], flips)
            patched = stacked & live
            acts = patched.any(-1)
            if is_cut(sites[index], **model):
                whole[index] = acts & (patched == live).all(-1)
                acts &= ~whole[index]
            rows.append(_rows_of(index, sites[index], patched, acts, flips.position, directions, model))
        passes += _passes(_joined(rows), tokens_per_pass)
    return Work(tuple(passes), whole)


def _begins(site: Site) -> tuple[str, int]:
    """What rows that are run together share: sources and inputs of one read begin alike."""
    return INPUT if site.kind == SOURCE else site.kind, site.read


def _rows_of(
    index: int, site: Site, patched: Tensor, acts: Tensor, position: Tensor, directions: Sequence[int], model: Any
) -> Rows:
    """The rows of one site in all directions; `acts` (positions, sequences) says which there are."""
    place, sequence = acts.nonzero().repeat(len(directions), 1).unbind(1)
    each = len(place) // max(1, len(directions))
    kind, read = _begins(site)
    return Rows(
        kind=kind,
        read=read,
        at_answer=read + (kind in (OUTPUT, EDGE)) >= 2 * model["num_layers"] - 1,
        site=torch.full_like(place, index),
        place=place,
        sequence=sequence,
        direction=torch.tensor(directions, dtype=torch.long).repeat_interleave(each),
        mask=patched[place, sequence],
        position=position[sequence],
    )


def _joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several sites, in the order of their first position."""
    names = ("site", "place", "sequence", "direction", "mask", "position")
    rows = replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
    return rows.take(torch.argsort(rows.first, stable=True))


def _passes(rows: Rows, tokens_per_pass: int) -> Iterator[Rows]:
    """Rows in the order of their first position, as many at once as there may be tokens."""
    done, first = 0, rows.first.tolist()
    while done < len(rows):
        width = 1 if rows.at_answer else int(rows.position.max()) + 1 - first[done]
        held = -(-first[done] // KEYS_OF_A_TOKEN) if rows.kind == EDGE else width
        end = min(len(rows), done + max(1, tokens_per_pass // max(held, width)))
        if not rows.at_answer:
            longer = (x for x in range(done + -(-ENOUGH_TOKENS // width), end))
            end = next((x for x in longer if width - (first[x] - first[done]) < FIRST_SHARE * width), end)
        yield rows.take(slice(done, end))
        done = end


def cost(rows: Rows, num_layers: int) -> int:
    """Positions that sublayers are run for in a pass."""
    begin, end = rows.span
    count, patched, everywhere = len(rows), int(rows.mask.sum()), len(rows) * (end - begin)
    last, read, alone, spent = 2 * num_layers - 1, rows.read, True, 0
    if rows.kind == INPUT and read <= last:  # the sublayer that takes it; later ones as of a stream
        alone = bool(read % 2)
        spent += patched if alone else everywhere
    if rows.kind == EDGE:
        spent += count
    read += rows.kind in (INPUT, OUTPUT, EDGE)
    for sublayer in range(read, last + 1):
        if sublayer == last:
            spent += count
        else:  # an MLP before any attention: where it is patched, the rest is the kept run's
            alone = alone and bool(sublayer % 2)
            spent += patched if alone else everywhere
    return spent
