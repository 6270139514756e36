"""What the clean run's routing looks like: masses, doses and applicability of ablations, and the sources' geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from attnres import FAMILIES, Read
from probe.ablation.interventions import Ablation, source_mask

FAMILY_PAIRS = tuple(combinations(FAMILIES, 2))
GEOMETRY = (
    "entropy",
    "effective_sources",
    "effective_distinct_sources",
    *(f"cosine_{a}_{b}" for a, b in FAMILY_PAIRS),
)
"""Columns of `Routing.geometry`: see `geometry`."""


@dataclass
class Routing:
    """The clean run's routing. N sequences, R reads, P (sequence, position) pairs that are not padding.

    Attributes:
        mass: [positions] -> (N, R, families) mean mass.
        applicable: [positions, kind, aliases] -> (N, R, labels) share of positions where the kind can act.
        dose: [kind, aliases] -> (R, labels, P) ||dh|| / ||h||; NaN where it cannot act.
        weight_left: likewise, the weight that the other families have.
        is_query: (P,) bool.
        geometry: (N, R, len(GEOMETRY)) means over positions; NaN for families that are not there.
    """

    mass: dict[str, np.ndarray]
    applicable: dict[tuple[str, str, bool], np.ndarray]
    dose: dict[tuple[str, bool], np.ndarray]
    weight_left: dict[tuple[str, bool], np.ndarray]
    is_query: np.ndarray
    geometry: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Routing]) -> Routing:
        """The routing of all parts' sequences, in their order."""

        def each(name: str, axis: int) -> dict:
            first = getattr(parts[0], name)
            return {key: np.concatenate([getattr(part, name)[key] for part in parts], axis) for key in first}

        return cls(
            *(each("mass", 0), each("applicable", 0), each("dose", 2), each("weight_left", 2)),
            is_query=np.concatenate([part.is_query for part in parts]),
            geometry=np.concatenate([part.geometry for part in parts]),
        )


@dataclass
class Observer:
    """A no-op intervention that measures every read of a clean run.

    Args:
        positions: [name] -> (batch, seq) bool, over which masses are taken; never padding.
        real: (batch, seq) bool, what is not padding.
        queries: (batch, seq) bool.
        ablations: [kind, aliases] -> an ablation for each label of the kind, to act on all reads and positions.
    """

    positions: dict[str, Tensor]
    real: Tensor
    queries: Tensor
    ablations: Mapping[tuple[str, bool], Sequence[Ablation]]
    _mass: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _applicable: dict[tuple[str, str, bool], list[np.ndarray]] = field(default_factory=dict)
    _dose: dict[tuple[str, bool], list[np.ndarray]] = field(default_factory=dict)
    _weight_left: dict[tuple[str, bool], list[np.ndarray]] = field(default_factory=dict)
    _geometry: list[np.ndarray] = field(default_factory=list)

    def __call__(self, read: Read) -> Read:
        weights = read.routing_weights
        hidden = read.hidden_states
        families = torch.tensor([source_mask(read.site, [f]) for f in FAMILIES], device=weights.device)
        mass = weights @ families.T.to(weights.dtype)  # (B, T, families)
        self._geometry.append(_mean_over(geometry(read), self.real))
        for name, where in self.positions.items():
            self._mass.setdefault(name, []).append(_mean_over(mass, where))
        for (kind, aliases), ablations in self.ablations.items():
            measured = [_measure(read, hidden, ablation) for ablation in ablations]
            acts, dose, left = (torch.stack(parts, -1) for parts in zip(*measured, strict=True))  # (B, T, labels)
            for name, where in self.positions.items():
                share = _mean_over(acts.to(weights.dtype), where)
                self._applicable.setdefault((name, kind, aliases), []).append(share)
            for kept, values in ((self._dose, dose), (self._weight_left, left)):
                values = values.masked_fill(~acts, torch.nan)[self.real]  # (P, labels)
                kept.setdefault((kind, aliases), []).append(values.float().T.cpu().numpy())
        return read

    def routing(self) -> Routing:
        return Routing(
            mass={key: np.stack(parts, 1) for key, parts in self._mass.items()},
            applicable={key: np.stack(parts, 1) for key, parts in self._applicable.items()},
            dose={key: np.stack(parts) for key, parts in self._dose.items()},
            weight_left={key: np.stack(parts) for key, parts in self._weight_left.items()},
            is_query=self.queries[self.real].cpu().numpy(),
            geometry=np.stack(self._geometry, 1),
        )


def _measure(read: Read, hidden: Tensor, ablation: Ablation) -> tuple[Tensor, Tensor, Tensor]:
    """Where an ablation can act, its dose there, and the weight of the sources it leaves alone: each (B, T)."""
    left = read.routing_weights.masked_fill(ablation.members(read), 0.0).sum(-1)
    if not ablation.exists_at(read.site):
        return torch.zeros_like(left, dtype=torch.bool), torch.zeros_like(left), left
    new, acts = ablation.outcome(read)
    ablation.check_values(read, new, acts)
    return acts, ((new.hidden_states - hidden).norm(dim=-1) / hidden.norm(dim=-1)).to(left.dtype), left


def geometry(read: Read) -> Tensor:
    """How much the sources of a read overlap: (batch, seq, len(GEOMETRY)).

    `entropy` of the routing weights (nats); `effective_sources`, its exponential; `effective_distinct_sources`,
    1 / sum_ij w_i w_j cos^2_ij, in which sources of one direction count as one (the similarity-sensitive diversity of
    order 2 of Leinster and Cobbold, Ecology 93, 2012); and the mean cosine between the sources of two families. All NaN
    of a read without sources.
    """
    weights = read.routing_weights
    if not read.sources:
        return weights.new_full((*weights.shape[:-1], len(GEOMETRY)), torch.nan)
    values = torch.stack(read.sources, -2).to(weights.dtype)  # (B, T, n, H)
    products = values @ values.mT  # (B, T, n, n)
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp_min(torch.finfo(values.dtype).tiny)
    cosines = products / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    entropy = torch.special.entr(weights).sum(-1)
    overlap = (weights.unsqueeze(-2) @ cosines.square() @ weights.unsqueeze(-1))[..., 0, 0]
    columns = [entropy, entropy.exp(), overlap.reciprocal()]
    names = read.site.families
    for a, b in FAMILY_PAIRS:
        rows, others = ([i for i, name in enumerate(names) if name == family] for family in (a, b))
        if rows and others:
            columns.append(cosines[..., rows, :][..., others].mean((-2, -1)))
        else:
            columns.append(torch.full_like(entropy, torch.nan))
    return torch.stack(columns, -1)


def _mean_over(values: Tensor, where: Tensor) -> np.ndarray:
    """Mean of `values` (B, T, k) over the positions `where` (B, T) of each sequence: (B, k) float64."""
    values, where = values.cpu().double(), where.cpu()
    return torch.where(where.unsqueeze(-1), values, 0.0).sum(1).div(where.sum(1, keepdim=True)).numpy()
