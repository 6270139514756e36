"""The grid of a probe: its cells, each one ablation at the reads of a route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnres import FAMILIES, REGIONS, SUBLAYERS, ReadSite
from probe.ablation.interventions import Ablation, Context
from probe.vocabulary import (
    ABLATED_SUBLAYERS,
    ALL,
    BOTH,
    FINAL,
    LABELS,
    WIDE_SCOPES,
    Route,
    check_names,
    integrated_name,
    is_layer,
    layer_scope,
)

NOTHING_MORE = Context()


@dataclass(frozen=True)
class Kind:
    """What is done at a cell: an intervention, run exactly or estimated by integrated gradients."""

    intervention: type[Ablation]
    integrated: bool = False

    def __post_init__(self) -> None:
        if self.integrated and not self.intervention.can_be_estimated:
            raise ValueError(
                f"kind '{self.intervention.kind}' has no estimate, as it moves reads far from where they "
                "were: choose mode exact or both, or leave it out of kinds"
            )

    @property
    def name(self) -> str:
        """As the tables' column `kind` has it."""
        exact = self.intervention.kind
        return integrated_name(exact) if self.integrated else exact


@dataclass(frozen=True)
class Cell:
    """One ablation of the grid, at every read of a route.

    Attributes:
        route: its family is a label: one family, or several.
        reads: indices into the model's read sites of those that the route has: masses, doses and shares of applicable
            positions are of these.
        acts_on: of those at which the ablation may act: for kinds that act on `all_depths` also others.
    """

    kind: Kind
    route: Route
    with_aliases: bool
    reads: tuple[int, ...]
    acts_on: tuple[int, ...]

    @property
    def intervention(self) -> type[Ablation]:
        return self.kind.intervention

    @property
    def families(self) -> tuple[str, ...]:
        return LABELS[self.route.family]

    @property
    def grid(self) -> tuple[str, bool]:
        """Which grid it belongs to, for multiplicity control: layers and wide scopes of one kind are two."""
        return self.kind.name, is_layer(self.route.scope)

    def ablation(self, context: Context = NOTHING_MORE) -> Ablation:
        """The intervention, at all reads of the cell."""
        acts_on, reads = frozenset(self.acts_on), frozenset(self.reads)
        return self.intervention(self.families, acts_on, self.with_aliases, context, reads)

    def reads_without(self, sites: Sequence[ReadSite]) -> tuple[int, ...]:
        """Those of its reads that have none of the families: there the route is not what the cell's effect is of."""
        ablation = self.ablation()
        return tuple(i for i in self.reads if not any(ablation.chosen(sites[i])))


def all_scopes(sites: Sequence[ReadSite]) -> tuple[str, ...]:
    """Every scope of a model: its thirds, all, each layer, and the final read if it has one."""
    final = (FINAL,) if sites[-1].sublayer == FINAL else ()
    return (*REGIONS, ALL, *map(layer_scope, range(sites[0].num_layers)), *final)


def wide_scopes(sites: Sequence[ReadSite]) -> tuple[str, ...]:
    """Those of `WIDE_SCOPES` that a model has: not all have a final read."""
    return tuple(scope for scope in all_scopes(sites) if scope in WIDE_SCOPES)


def reads_of(sites: Sequence[ReadSite], sublayer: str, scope: str) -> tuple[int, ...]:
    """Indices of the reads of a sublayer (or of both) in a scope; without those that have no sources."""
    wanted = SUBLAYERS if sublayer == BOTH else (sublayer,)
    return tuple(site.index for site in sites if site.num_sources and site.sublayer in wanted and _is_in(site, scope))


def _is_in(site: ReadSite, scope: str) -> bool:
    if site.layer_idx is None:
        return scope == FINAL
    return scope in (ALL, site.region, layer_scope(site.layer_idx))


def build_grid(
    sites: Sequence[ReadSite],
    kind: Kind,
    families: Sequence[str] = FAMILIES,
    sublayers: Sequence[str] = ABLATED_SUBLAYERS,
    scopes: Sequence[str] | None = None,
    with_aliases: Sequence[bool] = (False,),
) -> tuple[Cell, ...]:
    """The cells of one kind of intervention, in the order of scopes, sublayers, families.

    `both` (the two sublayers ablated together) is for wide scopes; the final read is a sublayer of its own and comes
    with the scope `final`. Scopes without a read (a third of a model of one layer) give no cells.

    Args:
        families: families, or labels of several ("embedding+older", "all").

    Raises:
        ValueError: a family, sublayer or scope that does not exist.
    """
    known_scopes = all_scopes(sites)
    scopes = known_scopes if scopes is None else scopes
    check_names("family", families, LABELS)
    check_names("sublayer", sublayers, ABLATED_SUBLAYERS)
    check_names("scope", scopes, known_scopes)
    cells = []
    for scope in scopes:
        for sublayer in (FINAL,) if scope == FINAL else sublayers:
            if sublayer == BOTH and is_layer(scope):
                continue
            if reads := reads_of(sites, sublayer, scope):
                depth = FINAL if scope == FINAL else ALL
                acts_on = reads_of(sites, sublayer, depth) if kind.intervention.all_depths else reads
                cells += [
                    Cell(kind, Route(sublayer, scope, family), aliases, reads, acts_on)
                    for aliases in with_aliases
                    for family in families
                ]
    return tuple(cells)


def baselines(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells that those of kinds with a `baseline` are read against, and that are not among `cells` yet.

    One for each sublayer (of the final read, too): the whole of it, over all layers.
    """
    wanted = {
        Cell(
            Kind(cell.intervention.baseline),
            Route(cell.route.sublayer, FINAL if cell.route.scope == FINAL else ALL, ALL),
            False,
            cell.acts_on,
            cell.acts_on,
        ): None
        for cell in cells
        if cell.intervention.baseline is not None
    }
    return tuple(cell for cell in wanted if cell not in cells)
