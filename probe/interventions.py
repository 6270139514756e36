"""Interventions on a read (`attnres.Intervention`), one small class for each kind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnres import Read
from probe.families import is_maskable, source_mask

MIN_REMAINING = 1e-3
"""Positions with less than this weight left over are not applicable: renormalising would scale it by over 1,000."""


@dataclass(frozen=True)
class MaskRenormalise:
    """Set a family's weights to zero and scale the rest back to sum to one.

    The read moves by `alpha / (1 - alpha) * (h - mean source of the family)`: the dose grows with the mass `alpha`.

    Args:
        family: the source family.
        reads: indices of the reads at which to act.
        with_aliases: take the family out together with sources that are the same tensor.
        positions: (batch, seq) bool, where to act; `None` for everywhere.

    Nothing happens at a read without the family or with nothing else, nor at a position where less than
    `MIN_REMAINING` would be left; results say how often that was so.
    """

    family: str
    reads: frozenset[int]
    with_aliases: bool = False
    positions: Tensor | None = None

    kind = "mask_renormalise"

    def __call__(self, read: Read) -> Read:
        if read.site.index not in self.reads or not is_maskable(read.site, self.family, self.with_aliases):
            return read
        weights, remaining = mask_family(read, self.family, self.with_aliases)
        acts = remaining >= MIN_REMAINING
        if self.positions is not None:
            acts = acts & self.positions
        masked = weights / remaining.clamp_min(MIN_REMAINING).unsqueeze(-1)
        return read._replace(routing_weights=torch.where(acts.unsqueeze(-1), masked, read.routing_weights))


def mask_family(read: Read, family: str, with_aliases: bool) -> tuple[Tensor, Tensor]:
    """Routing weights (batch, seq, n) with the family's at zero, not renormalised, and their sum (batch, seq)."""
    mask = torch.tensor(source_mask(read.site, family, with_aliases), device=read.routing_weights.device)
    weights = read.routing_weights.masked_fill(mask, 0.0)
    return weights, weights.sum(-1)
