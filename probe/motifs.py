"""Reading a table: where mass and effect part ways (dissociation), and localised roles (motifs).

Both rest on the primary intervention (`mask_renormalise` at all positions, no aliases) and on harm in NLL.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from attnres import REGIONS, SUBLAYERS
from probe.metrics import PRIMARY

MATTERS = 0.05
"""An effect matters from this fraction of ln K."""


def primary_rows(effects: pd.DataFrame, metric: str = PRIMARY) -> pd.DataFrame:
    """Rows of the primary intervention: mask and renormalise, all positions, families without their aliases."""
    primary = (effects["kind"] == "mask_renormalise") & (effects["positions"] == "all") & ~effects["with_aliases"]
    return effects[primary & (effects["metric"] == metric)]


def dissociation(effects: pd.DataFrame, num_pairs: int) -> dict[str, dict[str, Any]]:
    """Per sublayer, over the whole depth: the heaviest family, the most harmful one, and whether they differ.

    `dissociated` is None where no family's harm matters (5 % of ln K, with an interval that excludes zero): the
    ranking of effects that do not matter is noise.

    Args:
        effects: the table of one (run, step).
    """
    matters_from = MATTERS * math.log(num_pairs)
    rows = primary_rows(effects)
    found = {}
    for sublayer in SUBLAYERS:
        cells = rows[(rows["sublayer"] == sublayer) & (rows["scope"] == "all") & rows["applicable"]]
        if cells.empty:
            continue
        cells = cells.set_index("family")
        heaviest, most_harmful = str(cells["mass"].idxmax()), str(cells["effect"].idxmax())
        largest = cells.loc[most_harmful]
        matters = bool(largest["ci_low"] > 0 and largest["effect"] >= matters_from)
        found[sublayer] = {
            "heaviest": heaviest,
            "most_harmful": most_harmful,
            "dissociated": heaviest != most_harmful if matters else None,
            "matters_from": matters_from,
            "task_learned": bool(largest["task_learned"]),
            "mass": cells["mass"].to_dict(),
            "aliased_mass": cells["aliased_mass"].to_dict(),
            "harm": cells["effect"].to_dict(),
            "ci_low": cells["ci_low"].to_dict(),
            "ci_high": cells["ci_high"].to_dict(),
        }
    return found


def motifs(effects: pd.DataFrame, num_pairs: int) -> list[dict[str, Any]]:
    """Families whose harm is localised: candidates for motifs, by unadjusted intervals.

    A (family, sublayer, region) is listed when its interval excludes zero, its harm per read is at least 5 % of ln K,
    and that is more than in every other region where the family can be ablated. `only_region` marks a family that
    exists in one region alone, for which the last condition is empty.

    Args:
        effects: the table of one (run, step).
    """
    rows = primary_rows(effects)
    rows = rows[rows["scope"].isin(REGIONS) & rows["sublayer"].isin(SUBLAYERS) & rows["applicable"]]
    found = []
    for (sublayer, family), cells in rows.groupby(["sublayer", "family"], sort=False):
        per_read = (cells["effect"] / cells["n_reads"]).to_numpy()
        best = int(per_read.argmax())
        row = cells.iloc[best]
        if row["ci_low"] > 0 and per_read[best] >= MATTERS * math.log(num_pairs):
            found.append(
                {
                    **{"family": family, "sublayer": sublayer, "region": row["scope"]},
                    **{"harm": row["effect"], "ci_low": row["ci_low"], "ci_high": row["ci_high"]},
                    **{"harm_per_read": per_read[best], "mass": row["mass"]},
                    **{"n_reads": int(row["n_reads"]), "n_unaliased_reads": int(row["n_unaliased_reads"])},
                    **{"only_region": len(cells) == 1, "task_learned": bool(row["task_learned"]), "adjusted": False},
                }
            )
    return found
