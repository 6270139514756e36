"""The style of figures is part of the package; families can be told apart, whatever one's colour vision."""

from __future__ import annotations

import itertools
import tomllib

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from probe.report.figures import style
from probe.vocabulary import FAMILIES, FAMILY_COLORS, FAMILY_MARKERS
from tests.support.paths import ROOT

# Machado, Oliveira and Fernandes (IEEE TVCG 15, 2009), severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(color: str, blindness: str) -> np.ndarray:
    """CIELAB of a colour as it is seen."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_families_can_be_told_apart_by_colour_alone(blindness):
    seen = [lab(color, blindness) for color in FAMILY_COLORS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 30
    assert min(lab("white", blindness)[0] - color[0] for color in seen) > 35  # and from paper
    assert len(set(FAMILY_MARKERS.values())) == len(FAMILIES)


def test_the_style_file_is_part_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert any(style.STYLE_FILE.match(pattern) for pattern in project["package-data"]["probe.report.figures"])
    assert style.STYLE_FILE.is_file()
