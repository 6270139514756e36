"""Heat maps for loggers: colours where harm is, drawn in little time."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probe.report.heat_image import CELL_HEIGHT, CELL_WIDTH, HEAD, MARGIN, heat_image


def effects(scopes: list[str], kind: str = "mask_renormalise") -> pd.DataFrame:
    """Attention reads: only `current` at the first scope does harm, only `older` cannot be masked."""
    families = ("embedding", "current", "prev_completed", "older")
    rows = [(scope, family) for scope in scopes for family in families]
    table = pd.DataFrame(rows, columns=["scope", "family"])
    harm = (table["family"] == "current") & (table["scope"] == scopes[0])
    table = table.assign(sublayer="self_attn", kind=kind, positions="all", with_aliases=False, metric="nll")
    return table.assign(mass=0.25, effect=harm * 2.0, applicable=table["family"] != "older", n_unaliased_reads=1)


def cell(image: np.ndarray, panel: int, line: int, column: int) -> np.ndarray:
    """The colour of a cell, by its corner: numbers are in the middle."""
    x = MARGIN + panel * (4 * CELL_WIDTH + 12) + column * CELL_WIDTH + CELL_WIDTH - 4
    return image[HEAD + line * CELL_HEIGHT + CELL_HEIGHT - 4, x].astype(int)


@pytest.mark.parametrize(
    ("scopes", "kind"),
    [
        ([f"layer:{i}" for i in range(12)], "mask_renormalise"),
        (["early", "middle", "late"], "mask_renormalise"),
        (["layer:0", "layer:1", "early"], "mask_renormalise_first_order"),
    ],
)
def test_heat_images_show_where_harm_is(scopes, kind):
    image = heat_image(effects(scopes, kind), num_pairs=16)
    assert image is not None
    shown = [scope for scope in scopes if scope.startswith("layer:")] or scopes
    red, green, blue = cell(image, panel=1, line=len(shown) - 1, column=1)  # the first scope is at the bottom
    assert red > green + 50
    assert red > blue + 50
    assert np.ptp(cell(image, panel=1, line=0, column=0)) < 5  # no effect: white
    assert list(cell(image, panel=1, line=0, column=3)) == [238, 238, 238]
    assert np.array_equal(cell(image, panel=0, line=0, column=0), cell(image, panel=0, line=1, column=1))
    assert heat_image(effects(scopes, "zero"), num_pairs=16) is None
