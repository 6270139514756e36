"""Heat maps for loggers: colours where harm is, drawn in little time."""

from __future__ import annotations

import numpy as np
import pytest

from probe.report.heat_image import CELL_HEIGHT, CELL_WIDTH, GAP, GREY, HEAD, MARGIN, heat_image
from probe.vocabulary import MASK, MASK_INTEGRATED
from tests.support.effects_table import effects_table


def cell(image: np.ndarray, panel: int, line: int, column: int) -> np.ndarray:
    """The colour of a cell, by its corner: numbers are in the middle."""
    x = MARGIN + panel * (4 * CELL_WIDTH + GAP) + column * CELL_WIDTH + CELL_WIDTH - 4
    return image[HEAD + line * CELL_HEIGHT + CELL_HEIGHT - 4, x].astype(int)


@pytest.mark.parametrize("kind", [MASK, MASK_INTEGRATED])
@pytest.mark.parametrize("scopes", [[f"layer:{i}" for i in range(12)], ["early", "middle", "late"]])
def test_heat_images_show_where_harm_is(scopes, kind):
    """Attention reads come first. `older` at the first scope cannot be masked; `current` there does harm."""
    effects = effects_table(scopes, [kind], size=0.0)
    first = (effects["sublayer"] == "self_attn") & (effects["scope"] == scopes[0])
    effects.loc[first & (effects["family"] == "current"), "strength"] = 0.2
    image = heat_image(effects)
    assert image is not None
    red, green, blue = cell(image, panel=1, line=0, column=1)
    assert red > green + 50
    assert red > blue + 50
    assert np.ptp(cell(image, panel=1, line=0, column=0)) < 5  # no harm: white
    assert tuple(cell(image, panel=1, line=0, column=3)) == GREY
    assert tuple(cell(image, panel=1, line=1, column=3)) != GREY
    unlearned = heat_image(effects.assign(strength=np.nan, no_strength="the clean margin is not clear of zero"))
    assert unlearned is not None
    assert tuple(cell(unlearned, panel=1, line=0, column=1)) == GREY
    assert np.array_equal(cell(unlearned, panel=0, line=0, column=1), cell(image, panel=0, line=0, column=1))
    assert heat_image(effects.assign(kind="zero")) is None
