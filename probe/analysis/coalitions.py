"""Games over the families: what every subset of them is worth at a scope, exact Shapley values, pairwise interactions.

Masking one family at a time misses redundancy: where two carry the same content, each alone is dispensable. The value
v(S) of a set S is the effect of masking all of S at once (`Coalition`: where nothing is left, the read is zero). With
four families all 16 values are measured, so nothing is sampled:

    Shapley_f       = sum over S without f of |S|! (3 - |S|)! / 4! * (v(S + f) - v(S))        (Shapley 1953)
    interaction_fg  = sum over S without f, g of |S|! (2 - |S|)! / 3! * (v(S + f + g) - v(S + f) - v(S + g) + v(S))
                                                                                        (Grabisch and Roubens 1999)

The values are effects. On the margin an effect is a fall, so a negative interaction means that the two stand in for
each other (redundancy, self-repair). The Shapley values sum to the effect of masking everything. A family that is
nowhere in the scope is worth nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np
import pandas as pd

from attnres.sites import FAMILIES, ReadSite
from probe.ablation.engine import ProbeResult
from probe.ablation.grid import Cell, Kind, build_grid
from probe.ablation.interventions import Coalition
from probe.analysis.effects import RunInfo
from probe.analysis.inference import Inference, grid_statistics
from probe.vocabulary import COALITIONS, MARGINS, label

Terms = dict[str, dict[tuple[str, ...], float]]
"""Name of a term -> the coefficient of the value of each set of families."""


def terms() -> Terms:
    """Values of all sets, Shapley values and interactions, as linear combinations of the values of sets."""
    found: Terms = {f"value:{label(members)}": {members: 1.0} for members in COALITIONS}
    found |= {f"shapley:{family}": _derivative((family,)) for family in FAMILIES}
    found |= {f"interaction:{a}+{b}": _derivative((a, b)) for a, b in combinations(FAMILIES, 2)}
    return found


def _derivative(players: tuple[str, ...]) -> dict[tuple[str, ...], float]:
    """Coefficients of the mean discrete derivative of the value with respect to `players` (one or two)."""
    others = [family for family in FAMILIES if family not in players]
    coefficients: dict[tuple[str, ...], float] = {}
    for size in range(len(others) + 1):
        share = math.factorial(size) * math.factorial(len(others) - size) / math.factorial(len(others) + 1)
        for rest in combinations(others, size):
            for taken in range(len(players) + 1):
                for added in combinations(players, taken):
                    members = tuple(family for family in FAMILIES if family in (*rest, *added))
                    sign = (-1) ** (len(players) - taken)
                    coefficients[members] = coefficients.get(members, 0.0) + sign * share
    coefficients.pop((), None)  # masking nothing changes nothing
    return coefficients


def coalition_table(result: ProbeResult, info: RunInfo, how: Inference) -> pd.DataFrame:
    """A row per sublayer, scope, positions, metric and term; no rows where no coalition was run.

    Multiplicity is controlled over the Shapley values and interactions of all scopes, for each positions and metric.
    """
    games: dict[tuple[str, str], dict[tuple[str, ...], int]] = {}
    for index, cell in enumerate(result.cells):
        if cell.intervention.is_game:
            games.setdefault((cell.route.sublayer, cell.route.scope), {})[cell.families] = index
    if not games:
        return pd.DataFrame()
    nothing = dict.fromkeys(result.clean, np.zeros(len(result.counts)))  # none of the families is there: worth nothing
    rows, sums = [], []
    for positions, metric, ((sublayer, scope), indices) in product(result.routing.mass, result.clean, games.items()):
        values = {members: result.effects.get((i, positions), nothing)[metric] for members, i in indices.items()}
        where = {"sublayer": sublayer, "scope": scope, "positions": positions, "metric": metric}
        for term, coefficients in terms().items():
            rows.append(info.columns() | where | {"term": term})
            sums.append(sum(coefficient * values[members] for members, coefficient in coefficients.items()))
    table = pd.DataFrame(rows)
    margins = {metric: result.clean[metric] for metric in MARGINS}
    grids = ["metric", "positions", table["term"].str.startswith("value:")]
    found = grid_statistics(table, grids, np.array(sums).T, result.counts, margins, info.floor, how)
    return pd.concat([table, found], axis=1)


def coalition_cells(sites: Sequence[ReadSite], sublayers: Sequence[str], scopes: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of the games of these sublayers and scopes: every set of families."""
    return build_grid(sites, Kind(Coalition), [label(members) for members in COALITIONS], sublayers, scopes)
