"""The words that everything agrees on: routes, their titles and colours, thresholds, and kinds of rows of a table.

A *route* is a triple (sublayer, scope, family), in this order everywhere: reads of a sublayer, in a part of the depth,
from a family of sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any

import pandas as pd

from attnres.sites import FAMILIES, REGIONS, SUBLAYERS

# --- Sublayers, scopes, families -------------------------------------------------------------------------------------

ALL, FINAL, BOTH = "all", "final", "both"
"""The scope of all layers; the scope and the sublayer of the final read; both sublayers of a layer at once."""
READ_SUBLAYERS: tuple[str, ...] = (*SUBLAYERS, FINAL)
"""Sublayers that have reads of their own."""
ABLATED_SUBLAYERS: tuple[str, ...] = (*SUBLAYERS, BOTH)
"""What `sublayers` of the settings may name; the final read comes with its scope."""
WIDE_SCOPES: tuple[str, ...] = (*REGIONS, ALL, FINAL)
"""Scopes that are not single layers."""
WHOLE_DEPTH = (ALL, FINAL)
LAYER = "layer:"

SUBLAYER_TITLES = {"self_attn": "attention", "mlp": "MLP", BOTH: "both", FINAL: "final read"}
SCOPE_TITLES = {**{region: region for region in REGIONS}, ALL: "all layers", FINAL: "final read"}
FAMILY_TITLES: dict[str, str] = {**{family: family for family in FAMILIES}, "prev_completed": "prev. completed"}
FAMILY_SHORT: dict[str, str] = dict(zip(FAMILIES, ("emb.", "current", "prev.", "older"), strict=True))
FAMILY_COLORS: dict[str, str] = dict(zip(FAMILIES, ("#0072B2", "#D55E00", "#009E73", "#5C1A4F"), strict=True))
"""Readers of every colour vision tell them apart: see the test. The first three are Okabe and Ito's."""
FAMILY_MARKERS: dict[str, str] = dict(zip(FAMILIES, "osD^", strict=True))
"""Matplotlib's names."""


def layer_scope(layer_idx: int) -> str:
    return f"{LAYER}{layer_idx}"


def is_layer(scope: str) -> bool:
    """Whether a scope is a single layer. Layers are one grid, and wide scopes another."""
    return scope.startswith(LAYER)


def layer_of(scope: str) -> int:
    """The index of the layer that a scope is."""
    return int(scope.removeprefix(LAYER))


def scope_title(scope: str) -> str:
    return f"layer {layer_of(scope)}" if is_layer(scope) else SCOPE_TITLES[scope]


def sort_scopes(scopes: Iterable[str]) -> list[str]:
    """Wide scopes in their order, then layers from the shallowest; each once."""
    found = set(scopes)
    return [s for s in WIDE_SCOPES if s in found] + sorted(filter(is_layer, found), key=layer_of)


def present(names: Iterable[str], order: Iterable[str]) -> list[str]:
    """Those of `order` that are among `names`."""
    found = set(names)
    return [name for name in order if name in found]


COALITIONS = tuple(c for size in range(1, len(FAMILIES) + 1) for c in combinations(FAMILIES, size))
"""Every set of families but the empty one."""


def label(families: Sequence[str]) -> str:
    """What tables call a set of families: its name, several names joined by "+", or "all"."""
    return ALL if len(families) == len(FAMILIES) else "+".join(families)


LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType({label(families): families for families in COALITIONS})
"""The families that a label stands for."""


# --- Routes ----------------------------------------------------------------------------------------------------------

ROUTE = ["sublayer", "scope", "family"]
"""The columns of a table that hold a route."""


@dataclass(frozen=True, order=True)
class Route:
    """Reads of `sublayer` in `scope`, from the sources of `family` (a family, or a label of several)."""

    sublayer: str
    scope: str
    family: str

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> Route:
        """The route of a table's row."""
        return cls(row["sublayer"], row["scope"], row["family"])

    @property
    def key(self) -> tuple[str, str, str]:
        return self.sublayer, self.scope, self.family

    def __str__(self) -> str:
        """As in "older -> late attention"."""
        scope = "" if self.scope == FINAL else f"{self.scope} "
        return f"{self.family} -> {scope}{SUBLAYER_TITLES[self.sublayer]}"


STUDY_MOTIFS = (
    Route("self_attn", "early", "current"),
    Route("mlp", "early", "embedding"),
    Route("mlp", "early", "current"),
    Route("self_attn", "late", "older"),
)
"""The motifs that the study reports (arXiv:2606.13168); `current` has one in each sublayer."""


def routes_of(rows: pd.DataFrame) -> list[Route]:
    """The route of each row, in order."""
    return [Route(*key) for key in rows[ROUTE].itertuples(index=False, name=None)]


# --- Kinds, metrics, positions ---------------------------------------------------------------------------------------

MARGIN, MARGIN_TO_MEAN = "logit_diff", "logit_diff_mean"
MARGINS = (MARGIN, MARGIN_TO_MEAN)
"""Logit of the answer less that of the clean run's strongest distractor in the context, and less their mean logit: in
nats, and not bounded where a model is sure. Effects on them have a strength."""
METRICS = (*MARGINS, "nll", "kl", "accuracy")
PRIMARY_METRIC = MARGIN
METRIC_TITLES = {
    MARGIN: "margin",
    MARGIN_TO_MEAN: "margin to the mean distractor",
    "nll": "NLL",
    "kl": "KL",
    "accuracy": "accuracy",
}


def harm_sign(metric: str) -> int:
    """What an effect is multiplied by so that positive is worse for the model."""
    return 1 if metric in ("nll", "kl") else -1


POSITIONS = ("all", "query")
MASK = "mask_renormalise"
"""The primary kind of intervention."""


def integrated_name(kind: str) -> str:
    """What tables call the estimates of a kind of intervention."""
    return f"{kind}_integrated"


MASK_INTEGRATED = integrated_name(MASK)

# --- Thresholds ------------------------------------------------------------------------------------------------------

MATTERS = 0.05
"""tau: a cell matters from this strength, a share of the clean margin."""
EQUIVALENT = 0.01
"""epsilon: a cell is equivalent to zero within this strength."""
LEVEL = 0.05
"""Of every test."""
APPRECIABLE_MASS = 0.05
ENOUGH_SEQUENCES = 32
"""The fewest for which coverage was simulated (benchmarks/results/probe_statistics.json)."""
FLOOR = 8.0
"""Times the unit roundoff of the model's precision and the size of its logits: smaller effects are rounding."""
SATURATED = 0.99
"""From this accuracy, NLL, KL and accuracy hardly move until an ablation costs the whole margin."""


def learned_from(num_values: int) -> float:
    """The accuracy from which a model has learned to tell `num_values` values apart: half-way from chance to one."""
    return (1 + 1 / num_values) / 2


# --- Which rows of a table are which ---------------------------------------------------------------------------------


def primary_rows(table: pd.DataFrame, metric: str = PRIMARY_METRIC, kind: str = MASK) -> pd.DataFrame:
    """Rows (of effects or clusters) of the primary intervention at all positions, on families without aliases."""
    primary = (table["kind"] == kind) & (table["positions"] == "all") & ~table["with_aliases"]
    return table[primary & (table["metric"] == metric)]


def whole_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows over all layers of one sublayer, and those of the final read."""
    return rows[rows["scope"].isin(WHOLE_DEPTH) & rows["sublayer"].isin(READ_SUBLAYERS)]


def by_region(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of early, middle and late layers, of one sublayer."""
    return rows[rows["scope"].isin(REGIONS) & rows["sublayer"].isin(SUBLAYERS)]


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose scope is no single layer."""
    return rows[rows["scope"].isin(WIDE_SCOPES)]


def by_layer(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of single layers."""
    return rows[rows["scope"].str.startswith(LAYER)]


def check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names the first of `names` that is not `known`."""
    known = tuple(known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what} '{name}' does not exist; choose from {', '.join(known)}")
