"""Does a large weight mean that information flows there? Weights of the clean run beside what a patch shows to flow.

A *cell* is one weight of one softmax, with what flows along it:

- of a head of a layer at the position that asks: the attention to each position. What flows is the strength of the
  `edge`: keys and values there, as this head sees them.
- of a read at a position: the routing mass of each source. What flows is the strength of the `source`, as this read
  sees it.

What flows is what of the flipped value comes back by denoising (sufficiency), a share of the gap; an edge that pushes
the other way carries as well, so its size counts. Cells that can carry nothing by construction take no part: positions
where both runs are the same, reads of a single source. Other information than the flipped value is not seen: a head
that looks at the address carries it, and has no flow here.

Weights are means over sequences, strengths ratios of sums, both taken again in every bootstrap resample of clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from probe.analysis import stats
from probe.analysis.inference import Inference
from probe.analysis.stats import sum_by_cluster
from probe.trace.result import TraceResult
from probe.trace.sites import DENOISE, EDGE, SOURCE, Site

FLOW_KINDS = (EDGE, SOURCE)
QUERY = "query"
"""The name of the position that asks, from which nothing has to be read."""
FEWEST_CELLS = 8
"""Fewer have no rank agreement of their own."""
HEAVY = 0.5
"""A weight from here on is large: no other of its softmax is larger."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """NaN is none, for JSON."""
        return {name: None if np.isnan(x) else float(x) for name, x in vars(self).items()}


@dataclass(frozen=True)
class Flow:
    """C cells of one kind, and whether their weights tell what flows.

    Attributes:
        cells: (site, position) of each.
        softmax: of each cell, the softmax that its weight belongs to.
        weight, strength: (C,)
        matters: the strength, either way, from which a cell carries.
        agreement: Spearman's rank correlation of weight and the size of strength, over all cells.
        by_layer: the same within each layer that has `FEWEST_CELLS`; NaN where nothing varies.
        heavy: of the cells whose weight is `HEAVY` or more, the share that carries; NaN if there are none.
        found: of the cells that carry, the share that is among as many of the largest weight; NaN if none does.
        told: of the softmaxes with a cell that carries, the share whose largest weight is where most flows.
        told_by_chance: what `told` would be if any of a softmax's cells were as likely to have the largest weight.
    """

    kind: str
    cells: tuple[tuple[Site, str | int], ...]
    softmax: tuple[Hashable, ...]
    weight: np.ndarray
    strength: np.ndarray
    matters: float
    agreement: Estimate
    by_layer: dict[int | None, Estimate]
    heavy: Estimate
    found: Estimate
    told: Estimate
    told_by_chance: float

    @property
    def carries(self) -> np.ndarray:
        """(C,) bool."""
        return np.abs(self.strength) >= self.matters

    @property
    def heavy_cells(self) -> int:
        return int((self.weight >= HEAVY).sum())

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """The cells' rows, in their order, of the table of the same trace."""
        own = "head" if self.kind == EDGE else "source"
        rows = table[(table["direction"] == DENOISE) & (table["site"] == self.kind) & table[own].notna()]
        keys = [(site.read, getattr(site, own), position) for site, position in self.cells]
        return rows.set_index(["read", own, "position"], drop=False).loc[keys].reset_index(drop=True)

    @property
    def carrying_softmaxes(self) -> int:
        return len({each for each, carries in zip(self.softmax, self.carries, strict=True) if carries})

    def to_dict(self) -> dict[str, Any]:
        """What `trace.json` holds."""
        layers = {"final" if layer is None else str(layer): each.to_dict() for layer, each in self.by_layer.items()}
        numbers = {name: getattr(self, name).to_dict() for name in ("agreement", "heavy", "found", "told")}
        counts = {"cells": len(self.cells), "heavy_cells": self.heavy_cells, "carrying": int(self.carries.sum())}
        chance = None if np.isnan(self.told_by_chance) else self.told_by_chance
        counts |= {"carrying_softmaxes": self.carrying_softmaxes, "told_by_chance": chance}
        return numbers | counts | {"matters": self.matters, "agreement_by_layer": layers}


def flow(result: TraceResult, kind: str, how: Inference | None = None) -> Flow | None:
    """Weights of a kind of cell beside what flows. None if the trace has no such cells, or no shares of its gap.

    Args:
        result: of a trace that denoises, with sites of this kind.
        kind: of `FLOW_KINDS`.

    Raises:
        ValueError: another kind, or a trace without denoising.
    """
    how = how or Inference()
    if kind not in FLOW_KINDS:
        raise ValueError(f"a {kind} has no weight: weights are of {' and '.join(FLOW_KINDS)} sites")
    if DENOISE not in result.directions:
        raise ValueError("flow is what denoising brings back: trace with the direction denoise")
    chosen = _cells(result, kind)
    if not chosen or result.no_strength(how):
        return None
    cells = tuple((result.sites[i], result.positions[p]) for i, p in chosen)
    softmax = tuple((site.read, site.head if kind == EDGE else position) for site, position in cells)
    sample = _Sample.of(result, chosen, how)
    weight, strength = sample.once()
    carrying = _carrying(softmax, np.abs(strength) >= how.matters)
    layer_of = np.array([-1 if site.layer is None else site.layer for site, _ in cells])
    layers = {None if layer < 0 else int(layer): layer_of == layer for layer in dict.fromkeys(layer_of.tolist())}

    def within(rows: np.ndarray) -> Callable:
        return lambda weight, strength: spearman(weight[:, rows], strength[:, rows])

    return Flow(
        kind=kind,
        cells=cells,
        softmax=softmax,
        weight=weight,
        strength=strength,
        matters=how.matters,
        agreement=sample.estimate(spearman),
        by_layer={layer: sample.estimate(within(rows)) for layer, rows in layers.items() if rows.sum() >= FEWEST_CELLS},
        heavy=sample.estimate(lambda weight, strength: _heavy(weight, strength, how.matters)),
        found=sample.estimate(lambda weight, strength: _found(weight, strength, how.matters)),
        told=sample.estimate(lambda weight, strength: _told(weight, strength, carrying)),
        told_by_chance=float(np.mean([1 / len(rows) for rows in carrying])) if carrying else np.nan,
    )


def _cells(result: TraceResult, kind: str) -> list[tuple[int, int]]:
    """(site, position) indices of what can carry and has a choice."""
    sites = [i for i, site in enumerate(result.sites) if site.kind == kind]
    if kind == EDGE:
        sites = [i for i in sites if result.sites[i].head is not None]
    else:
        reads = [result.sites[i].read for i in sites]
        sites = [i for i in sites if reads.count(result.sites[i].read) > 1]
    return [(i, p) for i in sites for p in range(len(result.positions)) if result.live[i, p].any()]


@dataclass(frozen=True)
class _Sample:
    """Sums by cluster of the cells' weights and of what they move, (n, C), of the gap and of 1, (n,)."""

    weights: np.ndarray
    moved: np.ndarray
    gap: np.ndarray
    counts: np.ndarray
    floor: float
    how: Inference

    @classmethod
    def of(cls, result: TraceResult, chosen: list[tuple[int, int]], how: Inference) -> _Sample:
        site, position = np.array(chosen).T
        moved = result.margins[result.directions.index(DENOISE), site, position] - result.corrupted
        parts = (result.weights[site, position].T, moved.T, result.clean - result.corrupted)
        weights, sums, gap = (sum_by_cluster(part, result.clusters) for part in parts)
        return cls(weights, sums, gap, np.bincount(result.clusters).astype(float), result.floor, how)

    def once(self) -> tuple[np.ndarray, np.ndarray]:
        """(C,) weight and strength of the sample itself."""
        weight, strength = self._of(np.ones((1, len(self.counts))))
        return weight[0], strength[0]

    def _of(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(R, C) weights and strengths where each cluster is there so many `times` (R, n). Rounding is no flow."""
        count, gap = (times @ self.counts)[:, None], (times @ self.gap)[:, None]
        moved = times @ self.moved
        return times @ self.weights / count, np.where(np.abs(moved) <= self.floor * count, 0.0, moved) / gap

    def estimate(self, number: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        """A number of weights and strengths, both (R, C), with the percentiles of its resamples."""
        value = float(number(*(x[None] for x in self.once()))[0])
        if len(self.counts) < 2 or np.isnan(value):
            return Estimate(value, np.nan, np.nan)
        times = stats.resample_weights(len(self.counts), *self.how.resampling)
        ends = np.nanpercentile(number(*self._of(times)), [50 * (1 - stats.CONFIDENCE), 50 * (1 + stats.CONFIDENCE)])
        return Estimate(value, *map(float, ends))


def spearman(weight: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """(R,) rank correlations of weight and the size of strength, both (R, C); ties share their mean rank. NaN where
    either is constant."""
    ranks = [rankdata(values, axis=1) for values in (weight, np.abs(strength))]
    one, other = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    size = np.sqrt(np.square(one).sum(1) * np.square(other).sum(1))
    with np.errstate(invalid="ignore"):
        return (one * other).sum(1) / np.where(size > 0, size, np.nan)


def _heavy(weight: np.ndarray, strength: np.ndarray, matters: float) -> np.ndarray:
    """(R,) of the cells of large weight, the share that carries."""
    heavy = weight >= HEAVY
    count = heavy.sum(1)
    return (heavy & (np.abs(strength) >= matters)).sum(1) / np.where(count, count, np.nan)


def _found(weight: np.ndarray, strength: np.ndarray, matters: float) -> np.ndarray:
    """(R,) of the K cells that carry, the share that is among the K of the largest weight."""
    carries = np.abs(strength) >= matters
    count = carries.sum(1)
    place = np.argsort(np.argsort(-weight, axis=1, kind="stable"), axis=1)
    return (carries & (place < count[:, None])).sum(1) / np.where(count, count, np.nan)


def _told(weight: np.ndarray, strength: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """(R,) of the groups of cells, the share whose largest weight is where most flows."""
    if not groups:
        return np.full(len(weight), np.nan)
    same = [weight[:, rows].argmax(1) == np.abs(strength[:, rows]).argmax(1) for rows in groups]
    return np.mean(same, axis=0)


def _carrying(softmax: tuple[Hashable, ...], carries: np.ndarray) -> list[np.ndarray]:
    """The cells of every softmax that has one that carries."""
    chosen = dict.fromkeys(each for each, does in zip(softmax, carries, strict=True) if does)
    return [np.array([i for i, other in enumerate(softmax) if other == each]) for each in chosen]


@dataclass(frozen=True)
class Reading:
    """Where attention reads what was flipped: the layer and place whose edge, of all heads together, carries most.

    Attributes:
        strength: what flows there.
        mean_head: attention to the place, mean over the heads.
        head: the one that looks there most.
        largest_head: its attention to the place.
    """

    layer: int
    position: str | int
    strength: float
    mean_head: Estimate
    head: int
    largest_head: Estimate

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name).to_dict() for name in ("mean_head", "largest_head")}
        about = {name: getattr(self, name) for name in ("layer", "position", "strength", "head")}
        return about | numbers


def reading(result: TraceResult, how: Inference | None = None) -> Reading | None:
    """Of a trace with edges and named positions. The position named `QUERY` is left out: nothing is read from there.

    Returns None if the trace has no edges, or no shares of its gap.
    """
    how = how or Inference()
    sites = [i for i, site in enumerate(result.sites) if site.kind == EDGE and site.head is None]
    places = [p for p, name in enumerate(result.positions) if name != QUERY]
    if not sites or not places or result.no_strength(how):
        return None
    chosen = [(i, p) for i in sites for p in places]
    strength = _Sample.of(result, chosen, how).once()[1]
    best = int(np.abs(strength).argmax())
    (index, place), site = chosen[best], result.sites[chosen[best][0]]
    heads = [i for i, each in enumerate(result.sites) if each.read == site.read and each.head is not None]
    head = max(heads, key=lambda i: result.weights[i, place].mean())
    mean_head, largest_head = (weight_of(result, i, place, how) for i in (index, head))
    number = result.sites[head].head
    assert site.layer is not None
    assert number is not None
    return Reading(site.layer, result.positions[place], float(strength[best]), mean_head, number, largest_head)


def weight_of(result: TraceResult, site: int, place: int, how: Inference) -> Estimate:
    """The mean weight of a site at a place, by index, with a bootstrap-t interval over clusters."""
    sums = sum_by_cluster(result.weights[site, place][:, None], result.clusters)
    found = stats.bootstrap_t(sums, np.bincount(result.clusters).astype(float), *how.resampling)
    low, high = found.interval()
    return Estimate(float(found.mean[0]), float(low[0]), float(high[0]))
