"""What a trace found: logits by site, position and sequence, and the table of how much of the answer each carries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from probe.analysis.inference import OF_EFFECT, OF_STRENGTH, Grid, Inference
from probe.analysis.stats import sum_by_cluster
from probe.trace.sites import DENOISE, NOISE, Site
from probe.vocabulary import FINAL, FLOOR, MARGIN, layer_scope

GAP_NOT_POSITIVE = "the gap between the clean and the corrupted margin is not clear of zero"
"""Why there are no shares of it."""
TRACE_COLUMNS = [
    *("direction", "site", "read", "layer", "sublayer", "scope", "source", "family", "aliased", "with_aliases"),
    *("position", "metric", "clean", "corrupted", *OF_EFFECT),
    *("normalised_margin", *OF_STRENGTH, "no_strength", "floor", "below_floor", "n_sequences", "n_clusters"),
]


@dataclass(frozen=True)
class TraceResult:
    """Of D directions, S sites, P positions (each one or several that are patched together) and B sequences.

    The margin is the answer's logit less the flipped answer's, where the answer is asked for, in nats.

    Attributes:
        logits: (D, S, P, B, 2) of the answer and the flipped answer, float32.
        clean_logits, corrupted_logits: (B, 2) of the two runs.
        clusters: (B,) the cluster of each sequence.
        logit_sizes: (B,) the largest absolute logit of both runs, to which rounding is relative.
        forward_passes: of the whole model that the trace took, as `Plan` counts them.
    """

    sites: tuple[Site, ...]
    directions: tuple[str, ...]
    positions: tuple[str | int, ...]
    with_aliases: bool
    logits: np.ndarray
    clean_logits: np.ndarray
    corrupted_logits: np.ndarray
    clusters: np.ndarray
    logit_sizes: np.ndarray
    precision: torch.dtype
    forward_passes: float
    seconds: float

    @property
    def margins(self) -> np.ndarray:
        """(D, S, P, B) margins of the patched runs, float64."""
        return _margin(self.logits)

    @property
    def clean(self) -> np.ndarray:
        """(B,) margins of the clean run."""
        return _margin(self.clean_logits)

    @property
    def corrupted(self) -> np.ndarray:
        """(B,) margins of the corrupted run."""
        return _margin(self.corrupted_logits)

    @property
    def normalised(self) -> np.ndarray:
        """(D, S, P, B) margins on the scale where 0 is the corrupted run of the sequence and 1 its clean one.

        Where a sequence's two runs hardly differ it says nothing: means are to be taken of margins (`table`).
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.margins - self.corrupted) / (self.clean - self.corrupted)

    @property
    def floor(self) -> float:
        """The effect in nats below which a difference of two runs in this precision is rounding."""
        return FLOOR * torch.finfo(self.precision).eps / 2 * float(self.logit_sizes.mean())

    def table(self, how: Inference | None = None) -> pd.DataFrame:
        """The columns `TRACE_COLUMNS`, a row for each direction, site and position.

        `effect` is patched - unpatched margin in nats, mean over sequences. `strength` is the share of the gap between
        clean and corrupted margin that the patch moves (sum over sum): recovered by denoising, lost by noising, for
        which `normalised_margin` (0 corrupted, 1 clean) is one less it. Intervals and tests are of linear contrasts,
        clustered (`probe.analysis.inference`); the sites of one kind in one direction are one grid. Where the gap's
        interval is not clear of zero there is no strength, and `no_strength` says so.
        """
        how = how or Inference()
        rows, margins = [], self.margins
        for number, direction in enumerate(self.directions):
            base = self.corrupted if direction == DENOISE else self.clean
            for kind in dict.fromkeys(site.kind for site in self.sites):
                chosen = [i for i, site in enumerate(self.sites) if site.kind == kind]
                moved = (margins[number, chosen] - base).reshape(-1, len(base)).T  # (B, sites x positions)
                about = [self._about(direction, self.sites[i], position) for i in chosen for position in self.positions]
                rows.append(pd.concat([pd.DataFrame(about), self._statistics(direction, moved, how)], axis=1))
        table = pd.concat(rows, ignore_index=True)
        lost = table["direction"] == NOISE
        return table.assign(
            **{"metric": MARGIN, "with_aliases": self.with_aliases, "floor": self.floor},
            **{"clean": self.clean.mean(), "corrupted": self.corrupted.mean()},
            **{"n_sequences": len(self.clusters), "n_clusters": len(np.unique(self.clusters))},
            normalised_margin=table["strength"].where(~lost, 1 - table["strength"]),
        )[TRACE_COLUMNS]

    def _statistics(self, direction: str, moved: np.ndarray, how: Inference) -> pd.DataFrame:
        """`Grid.statistics` of `moved` (B, cells), with the gap in the place of the clean margin."""
        counts = np.bincount(self.clusters).astype(np.float64)
        moved, gap = (sum_by_cluster(values, self.clusters) for values in (moved, self.clean - self.corrupted))
        grid = Grid(moved, counts, MARGIN, gap, self.floor, how)
        found = dict(zip(OF_EFFECT, grid.of_effect(), strict=True))
        # A strength is of harm, a fall of the margin: what denoising recovers is the fall that is undone.
        fallen = grid if direction == NOISE else replace(grid, sums=-moved)
        found |= dict(zip(OF_STRENGTH, fallen.of_strength(), strict=True))
        reason = GAP_NOT_POSITIVE if grid.no_strength else ""
        return pd.DataFrame(found).assign(no_strength=reason, below_floor=grid.is_rounding)

    def _about(self, direction: str, site: Site, position: str | int) -> dict[str, Any]:
        scope = FINAL if site.layer is None else layer_scope(site.layer)
        about = {"direction": direction, "site": site.kind, "read": site.read, "layer": site.layer}
        about |= {"sublayer": site.sublayer, "scope": scope, "source": site.source, "family": site.family}
        return about | {"aliased": site.aliased, "position": position}


def _margin(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits[..., 0] - logits[..., 1]
