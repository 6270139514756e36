"""The figure of weight against flow shows the cells, and names the two that say most."""

from __future__ import annotations

import numpy as np
import pytest

from probe.analysis.inference import Inference
from probe.report.figures.trace_flow import plot_flow
from probe.trace import trace
from probe.trace.flow import FLOW_KINDS, flow
from tests.probe.trace.test_planted import CHANGED, COPIED, copies, tokens
from tests.support.planted import blank

HOW = Inference(num_resamples=50)


@pytest.fixture(scope="module")
def result():
    """Block sums in which what layer 0 copies is read by layer 2."""
    model = blank("block_sum", num_blocks=3, num_layers=3)
    copies(model, 0, 2)
    return trace(model, tokens(16), FLOW_KINDS, positions={"value": CHANGED, "copy": COPIED, "query": 5})


@pytest.mark.parametrize("kinds", [FLOW_KINDS, FLOW_KINDS[:1]], ids=["both", "attention alone"])
def test_every_cell_is_a_point_at_its_weight_and_strength(result, kinds):
    flows = [found for kind in kinds if (found := flow(result, kind, HOW)) is not None]
    figure = plot_flow(flows, result.table(HOW), "planted")
    panels = figure.axes
    assert len(panels) == len(kinds)
    for axes, found in zip(panels, flows, strict=True):
        lines = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
        points = np.concatenate([np.asarray(line.get_xydata()) for line in lines])
        expected = np.stack((found.weight, found.strength), 1)
        np.testing.assert_allclose(np.sort(points, 0), np.sort(expected, 0), atol=1e-6)
        assert f"rank agreement {found.agreement.value:.2f}" in axes.get_title(loc="left")
        low, high = axes.get_ylim()
        assert ((points[:, 1] >= low) & (points[:, 1] <= high)).all()
    assert "A most flow: layer 2 attn, head 0, from copy" in panels[0].get_title(loc="left")


def test_the_strongest_source_has_the_colour_of_its_family_and_its_letter(result):
    found = flow(result, "source", HOW)
    assert found is not None
    axes = plot_flow([found], result.table(HOW)).axes[0]
    letters = {text.get_text(): text.xy for text in axes.texts}
    most, heaviest = np.abs(found.strength).argmax(), found.weight.argmax()
    assert letters["A"] == pytest.approx((found.weight[most], found.strength[most]))
    assert letters["B"] == pytest.approx((found.weight[heaviest], found.strength[heaviest]))
