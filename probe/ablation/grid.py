"""What is ablated where: source families, scopes, and the cells of a probe's grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from attnres import FAMILIES, REGIONS, SUBLAYERS, ReadSite

ALL_SUBLAYERS = (*SUBLAYERS, "both")
POSITIONS = ("all", "query")
FIRST_ORDER = "_first_order"
"""Ends the `kind` of effects that are linearised (`probe.ablation.first_order`)."""
ALL_FAMILIES = "all"
"""The label of the four families together."""
COALITIONS = tuple(c for size in range(1, len(FAMILIES) + 1) for c in combinations(FAMILIES, size))
"""Every set of families but the empty one."""


def label(families: Sequence[str]) -> str:
    """How tables call a set of families: its name, names joined by "+", or "all"."""
    return ALL_FAMILIES if len(families) == len(FAMILIES) else "+".join(families)


LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType({label(families): families for families in COALITIONS})
"""The families that a label stands for."""


@dataclass(frozen=True)
class Cell:
    """One ablation of the grid: an intervention on families, at every read of `reads`.

    `reads` are indices into the model's read sites: those of `sublayer` that lie in `scope`. `family` is a label.
    """

    kind: str
    sublayer: str
    scope: str
    family: str
    with_aliases: bool
    reads: tuple[int, ...]

    @property
    def base_kind(self) -> str:
        return self.kind.removesuffix(FIRST_ORDER)

    @property
    def is_first_order(self) -> bool:
        return self.kind.endswith(FIRST_ORDER)

    @property
    def families(self) -> tuple[str, ...]:
        return LABELS[self.family]

    @property
    def is_layer(self) -> bool:
        """Whether the scope is one layer; layers and regions are two grids."""
        return self.scope.startswith("layer:")


def check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ValueError that names the first of `names` that is not `known`."""
    for name in names:
        if name not in known:
            raise ValueError(f"{what} '{name}' does not exist; choose from {', '.join(known)}")


def source_mask(site: ReadSite, families: Sequence[str], with_aliases: bool = False) -> tuple[bool, ...]:
    """Which of the read's sources belong to `families` (with_aliases: or are the same tensor as one that does)."""
    mask = [name in families for name in site.families]
    if with_aliases and any(mask[i] for i in site.aliased_sources):
        for i in site.aliased_sources:
            mask[i] = True
    return tuple(mask)


def is_aliased(site: ReadSite, families: Sequence[str]) -> bool:
    """Whether content of the families stays reachable at this read through an alias in another family."""
    return len({site.families[i] in families for i in site.aliased_sources}) == 2


WIDE_SCOPES = (*REGIONS, "all", "final")
"""Scopes that are not single layers."""


def all_scopes(sites: Sequence[ReadSite]) -> tuple[str, ...]:
    """Every scope of a model: its thirds, all, each layer, and the final read if it has one."""
    layers = tuple(f"layer:{i}" for i in range(sites[0].num_layers))
    final = ("final",) if sites[-1].sublayer == "final" else ()
    return (*REGIONS, "all", *layers, *final)


def region_scopes(sites: Sequence[ReadSite]) -> tuple[str, ...]:
    """`WIDE_SCOPES` that a model has: not all have a final read."""
    return tuple(scope for scope in all_scopes(sites) if scope in WIDE_SCOPES)


def reads_of(sites: Sequence[ReadSite], sublayer: str, scope: str) -> tuple[int, ...]:
    """Indices of the reads of a sublayer (or "both") in a scope."""
    wanted = SUBLAYERS if sublayer == "both" else (sublayer,)
    return tuple(s.index for s in sites if s.sublayer in wanted and _in_scope(s, scope))


def _in_scope(site: ReadSite, scope: str) -> bool:
    if site.layer_idx is None:
        return scope == "final"
    return scope in ("all", site.region, f"layer:{site.layer_idx}")


def build_grid(
    sites: Sequence[ReadSite],
    kind: str = "mask_renormalise",
    families: Sequence[str] = FAMILIES,
    sublayers: Sequence[str] = ALL_SUBLAYERS,
    scopes: Sequence[str] | None = None,
    with_aliases: Sequence[bool] = (False,),
) -> tuple[Cell, ...]:
    """The cells of one kind of intervention, in the order of scopes, sublayers, families.

    `both` (the two sublayers ablated together) is for regions and `all`; the final read is a sublayer of its own and
    comes with the scope `final`. Scopes without a read (a third of a model of one layer) give no cells.

    Args:
        families: families, or labels of several ("embedding+older", "all").

    Raises:
        ValueError: a family, sublayer or scope that does not exist.
    """
    known_scopes = all_scopes(sites)
    scopes = known_scopes if scopes is None else scopes
    check_names("family", families, tuple(LABELS))
    check_names("sublayer", sublayers, ALL_SUBLAYERS)
    check_names("scope", scopes, known_scopes)
    cells = []
    for scope in scopes:
        for sublayer in ("final",) if scope == "final" else sublayers:
            if sublayer == "both" and scope.startswith("layer:"):
                continue
            reads = reads_of(sites, sublayer, scope)
            if reads:
                cells += [Cell(kind, sublayer, scope, f, aliases, reads) for aliases in with_aliases for f in families]
    return tuple(cells)
