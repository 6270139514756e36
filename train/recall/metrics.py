"""Metrics of validation, counted over all devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from attnres import ReadSite


class PositionAccuracy(Metric):
    """Accuracy at each query position: `update` takes booleans (batch, positions), `compute` returns (positions,)."""

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.add_state("correct", torch.zeros(num_positions), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, correct: Tensor) -> None:
        self.correct += correct.sum(dim=0)
        self.total += correct.shape[0]

    def compute(self) -> Tensor:
        return self.correct / self.total


class RoutingEntropy(Metric):
    """Entropy of the routing weights over its maximum: 1 if all sources are read evenly, 0 if only one is read.

    The mean is over positions and over the reads of a sublayer that have more than one source. `update` takes a model's
    routing weights, (batch, seq, sources) for each of its `sites`; `compute` returns one number for each sublayer.
    """

    full_state_update = False
    summed: Tensor
    total: Tensor

    def __init__(self, sites: Sequence[ReadSite]) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.names = tuple(dict.fromkeys(site.sublayer for site in sites))
        self.add_state("summed", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(self.names)), dist_reduce_fx="sum")

    def update(self, routing_weights: Sequence[Tensor]) -> None:
        for site, weights in zip(self.sites, routing_weights, strict=True):
            if site.num_sources > 1:
                index = self.names.index(site.sublayer)
                share = torch.special.entr(weights).sum(-1) / math.log(site.num_sources)
                self.summed[index] += share.sum()
                self.total[index] += share.numel()

    def compute(self) -> dict[str, Tensor]:
        shares = zip(self.names, self.summed / self.total, self.total, strict=True)
        return {name: share for name, share, total in shares if total}  # leaves out sublayers without a choice
