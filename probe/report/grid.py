"""What heat maps show of a table: one value of every scope and family, of the finest grid that was probed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probe import vocabulary as words


@dataclass(frozen=True)
class Grid:
    """The rows that a heat map shows: by single `layer` or by `region`, exact or to first order."""

    rows: pd.DataFrame
    unit: str
    first_order: bool

    @property
    def scopes(self) -> list[str]:
        """From the shallowest."""
        return words.sort_scopes(self.rows["scope"])

    def table(self, sublayer: str, value: str) -> np.ndarray:
        """(scopes, families) of a column of numbers; NaN where the family cannot be ablated, or was not."""
        rows = self.rows[(self.rows["sublayer"] == sublayer) & self.rows["applicable"]]
        table = rows.pivot(index="scope", columns="family", values=value)
        return table.reindex(index=self.scopes, columns=list(words.FAMILIES)).to_numpy(dtype=float)

    def limit(self, num_pairs: int) -> float:
        """Where colours of effects end: at least at what matters, so that noise does not look like a finding."""
        effects = self.rows.loc[self.rows["applicable"], "effect"].abs().dropna()
        return max([words.matters_from(num_pairs), *effects])


def find_grid(effects: pd.DataFrame, sublayers: Iterable[str] = words.SUBLAYERS) -> Grid | None:
    """The finest exact grid that the table has (layers, else regions), else the finest to first order, else None."""
    for kind in (words.MASK, words.MASK_FIRST_ORDER):
        rows = words.primary_rows(effects, kind=kind)
        rows = rows[rows["sublayer"].isin(sublayers)]
        regions = rows[rows["scope"].isin(words.REGIONS)]
        for unit, found in (("layer", words.by_layer(rows)), ("region", regions)):
            if len(found):
                return Grid(found, unit, kind == words.MASK_FIRST_ORDER)
    return None
