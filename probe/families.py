"""What is ablated where: source families, scopes, and the cells of a probe's grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnres import FAMILIES, REGIONS, SUBLAYERS, ReadSite

ALL_SUBLAYERS = (*SUBLAYERS, "both")
POSITIONS = ("all", "query")


@dataclass(frozen=True)
class Cell:
    """One ablation of the grid: a family, taken out at every read of `reads`.

    `reads` are indices into the model's read sites: those of `sublayer` that lie in `scope`.
    """

    sublayer: str
    scope: str
    family: str
    with_aliases: bool
    reads: tuple[int, ...]


def check_names(what: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise a ValueError that names the first of `names` that is not `known`."""
    for name in names:
        if name not in known:
            raise ValueError(f"{what} '{name}' does not exist; choose from {', '.join(known)}")


def source_mask(site: ReadSite, family: str, with_aliases: bool = False) -> tuple[bool, ...]:
    """Which of the read's sources belong to `family` (with_aliases: or are the same tensor as one that does)."""
    mask = [name == family for name in site.families]
    if with_aliases and any(mask[i] for i in site.aliased_sources):
        for i in site.aliased_sources:
            mask[i] = True
    return tuple(mask)


def is_maskable(site: ReadSite, family: str, with_aliases: bool = False) -> bool:
    """Whether the family is at this read, and something would be left without it."""
    mask = source_mask(site, family, with_aliases)
    return any(mask) and not all(mask)


def is_aliased(site: ReadSite, family: str) -> bool:
    """Whether the family's content stays reachable at this read through an alias in another family."""
    return any(site.families[i] == family for i in site.aliased_sources)


def all_scopes(sites: Sequence[ReadSite]) -> tuple[str, ...]:
    """Every scope of a model: its thirds, all, each layer, and the final read if it has one."""
    layers = tuple(f"layer:{i}" for i in range(sites[0].num_layers))
    final = ("final",) if sites[-1].sublayer == "final" else ()
    return (*REGIONS, "all", *layers, *final)


def _in_scope(site: ReadSite, scope: str) -> bool:
    if site.layer_idx is None:
        return scope == "final"
    return scope in ("all", site.region, f"layer:{site.layer_idx}")


def build_grid(
    sites: Sequence[ReadSite],
    families: Sequence[str] = FAMILIES,
    sublayers: Sequence[str] = ALL_SUBLAYERS,
    scopes: Sequence[str] | None = None,
    with_aliases: Sequence[bool] = (False,),
) -> tuple[Cell, ...]:
    """The cells of a probe, in the order of scopes, sublayers, families.

    `both` (the two sublayers ablated together) is for regions and `all`; the final read is a sublayer of its own and
    comes with the scope `final`. Scopes without a read (a third of a model of one layer) give no cells.

    Raises:
        ValueError: a family, sublayer or scope that does not exist.
    """
    known_scopes = all_scopes(sites)
    scopes = known_scopes if scopes is None else scopes
    check_names("family", families, FAMILIES)
    check_names("sublayer", sublayers, ALL_SUBLAYERS)
    check_names("scope", scopes, known_scopes)
    cells = []
    for scope in scopes:
        for sublayer in ("final",) if scope == "final" else sublayers:
            if sublayer == "both" and scope.startswith("layer:"):
                continue
            wanted = SUBLAYERS if sublayer == "both" else (sublayer,)
            reads = tuple(s.index for s in sites if s.sublayer in wanted and _in_scope(s, scope))
            if reads:
                cells += [Cell(sublayer, scope, f, aliases, reads) for aliases in with_aliases for f in families]
    return tuple(cells)
