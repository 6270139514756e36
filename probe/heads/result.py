"""What was found of heads: effects by head, pair and sequence, and the tables of harm and of interactions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from probe.analysis.inference import OF_EFFECT, OF_STRENGTH, Grid, Inference
from probe.analysis.stats import sum_by_cluster
from probe.heads.ablations import Head, HeadAblation
from probe.vocabulary import FLOOR, MARGINS

OF_GRID = (*OF_STRENGTH, "no_strength", "floor", "below_floor", "n_sequences", "n_clusters")
HEAD_COLUMNS = ["kind", "layer", "head", "metric", "margin", *OF_EFFECT, *OF_GRID, "attention_to_value"]
PAIR_COLUMNS = [
    *("kind", "layer_a", "head_a", "layer_b", "head_b", "metric", "margin"),
    *("strength_a", "strength_b", "strength_both", "interaction", *OF_EFFECT[1:], *OF_GRID),
]


@dataclass(frozen=True)
class HeadsResult:
    """Of K kinds, H heads, P pairs of all kinds together, and B sequences.

    Attributes:
        singles: [metric] -> (K, H, B) ablated - clean margin, summed over the answers of each sequence, in nats.
        pair_ablations, pairs: which pairs, and [metric] -> (P, B) as `singles`, NaN where they were not tested.
        tested: (B,) bool: the sequences on which pairs were tested; on the others they were chosen.
        clean: [metric] -> (B,) summed clean margin.
        counts: (B,) answers of each sequence.
        logit_sizes: (B,) summed largest absolute clean logit, to which rounding is relative.
        clusters: (B,) the cluster of each sequence.
        attention_to_value: (H, B) weight of the clean run from the position that asks to that of the answer's value in
            the context (`attention.attention_to_value`); NaN where its place is not unique.
        forward_passes: that it took, as `Plan` counts them.
    """

    kinds: tuple[str, ...]
    heads: tuple[Head, ...]
    singles: dict[str, np.ndarray]
    pair_ablations: tuple[HeadAblation, ...]
    pairs: dict[str, np.ndarray]
    tested: np.ndarray
    clean: dict[str, np.ndarray]
    counts: np.ndarray
    logit_sizes: np.ndarray
    clusters: np.ndarray
    attention_to_value: np.ndarray
    precision: torch.dtype
    forward_passes: float
    seconds: float

    @property
    def floor(self) -> float:
        """The effect in nats below which a difference of two runs in this precision is rounding."""
        return FLOOR * torch.finfo(self.precision).eps / 2 * float(self.logit_sizes.sum() / self.counts.sum())

    def table(self, how: Inference | None = None) -> pd.DataFrame:
        """The columns `HEAD_COLUMNS`, a row for each kind, head and metric.

        `effect` is ablated - clean margin in nats, mean over answers; `strength` the share of the clean margin by which
        it falls. The heads of one kind are one grid; statistics are those of `probe.analysis.inference`, clustered.
        `attention_to_value` is the mean over the sequences that have one.
        """
        known = ~np.isnan(self.attention_to_value)
        sums = np.where(known, self.attention_to_value, 0.0).sum(1)
        weights = np.divide(sums, known.sum(1), out=np.full(len(sums), np.nan), where=known.any(1))
        everywhere, parts = np.ones(len(self.counts), bool), []
        for metric in MARGINS:
            for number, kind in enumerate(self.kinds):
                about = pd.DataFrame(self.heads).assign(kind=kind, metric=metric, attention_to_value=weights)
                grid, columns = self._grid(self.singles[metric][number], everywhere, metric, self.floor, how)
                parts.append(about.assign(**columns, **_named(OF_EFFECT, grid.of_effect), **_strengths(grid)))
        return pd.concat(parts, ignore_index=True)[HEAD_COLUMNS]

    def pair_table(self, how: Inference | None = None) -> pd.DataFrame:
        """The columns `PAIR_COLUMNS`, a row for each kind, pair and metric, on the sequences where pairs were tested.

        `interaction` is harm of both - harm of a - harm of b, in nats of margin, with its interval and tests: a linear
        contrast of each sequence. Above zero the two cover for each other (an OR); below, they are worth less without
        each other (an AND, a chain, or one undoes the other). `strength` is the same as a share of the clean margin,
        `p_matters` of "it is no larger than tau, in its own direction". The pairs of one kind are one grid.
        """
        parts = []
        for metric in MARGINS:
            for kind in self.kinds:
                chosen = [i for i, each in enumerate(self.pair_ablations) if each.kind == kind]
                if chosen:
                    parts.append(self._pairs_of(kind, metric, chosen, how))
        return pd.concat(parts, ignore_index=True)[PAIR_COLUMNS] if parts else pd.DataFrame(columns=PAIR_COLUMNS)

    def _pairs_of(self, kind: str, metric: str, chosen: list[int], how: Inference | None) -> pd.DataFrame:
        """The rows of one kind and metric: of the pairs `chosen`."""
        of_kind, pairs = self.singles[metric][self.kinds.index(kind)], [self.pair_ablations[i].heads for i in chosen]
        about = [{"layer_a": a.layer, "head_a": a.head, "layer_b": b.layer, "head_b": b.head} for a, b in pairs]
        a, b = (of_kind[[self.heads.index(pair[side]) for pair in pairs]] for side in (0, 1))
        both = self.pairs[metric][chosen]
        grid, columns = self._grid(both - a - b, self.tested, metric, 2 * self.floor, how)  # of four runs, not of two
        turned = replace(grid, sums=-grid.sums)
        effect = _named(OF_EFFECT, turned.of_effect)
        found = _strengths(grid)
        found["p_matters"] = np.where(grid.sums.sum(0) <= 0, found["p_matters"], _strengths(turned)["p_matters"])
        margin = np.nan if grid.no_strength else self.clean[metric][self.tested].sum()
        for name, values in (("strength_a", a), ("strength_b", b), ("strength_both", both)):
            found[name] = -values[:, self.tested].sum(1) / margin
        columns |= {"kind": kind, "metric": metric, "interaction": effect.pop("effect")}
        return pd.DataFrame(about).assign(**columns, **effect, **found)

    def _grid(
        self, effects: np.ndarray, used: np.ndarray, metric: str, floor: float, how: Inference | None
    ) -> tuple[Grid, dict[str, Any]]:
        """The grid of `effects` (cells, B) on the sequences `used`, by cluster, and what all of its rows say."""
        _, clusters = np.unique(self.clusters[used], return_inverse=True)
        sums, counts, margins = (
            sum_by_cluster(values, clusters)
            for values in (np.ascontiguousarray(effects[:, used].T), self.counts[used], self.clean[metric][used])
        )
        grid = Grid(sums, counts, metric, margins, floor, how or Inference())
        about = {"margin": margins.sum() / counts.sum(), "floor": floor, "below_floor": grid.is_rounding}
        about |= {"no_strength": grid.no_strength, "n_sequences": int(used.sum()), "n_clusters": len(counts)}
        return grid, about


def _named(names: tuple[str, ...], values: Callable[[], tuple[np.ndarray, ...]]) -> dict[str, np.ndarray]:
    return dict(zip(names, values(), strict=True))


def _strengths(grid: Grid) -> dict[str, np.ndarray]:
    return _named(OF_STRENGTH, grid.of_strength)
