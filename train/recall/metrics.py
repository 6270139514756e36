"""Metrics of validation, counted over all devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from attnres import ReadSite


class GroupAccuracy(Metric):
    """Accuracy of all queries, and of each group of them: a task's positions, or hops.

    `update` takes booleans and the groups' numbers, both (batch, positions); `compute` returns numbers by name,
    `accuracy` and `accuracy_<group>`.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.add_state("correct", torch.zeros(len(groups)), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(groups)), dist_reduce_fx="sum")

    def update(self, correct: Tensor, groups: Tensor) -> None:
        for counts, values in ((self.correct, correct), (self.total, torch.ones_like(correct))):
            counts.index_add_(0, groups.flatten(), values.flatten().to(counts))

    def compute(self) -> dict[str, Tensor]:
        found = {"accuracy": self.correct.sum() / self.total.sum()}
        shares = zip(self.groups, self.correct / self.total, strict=True)
        return found | {f"accuracy_{name}": share for name, share in shares}


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
