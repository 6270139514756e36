"""Figures show what the tables hold, legibly and in one style; the same input gives the same bytes."""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy import stats as scipy_stats

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.files.runs import ProbedRun
from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.report.figures.comparison import plot_comparison, seed_groups
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import plot_emergence
from probe.report.figures.heat_maps import plot_heat_maps
from probe.report.view import Scale, View, view_cells
from probe.vocabulary import (
    EQUIVALENT,
    FAMILY_COLORS,
    MASK,
    MATTERS,
    READ_SUBLAYERS,
    layer_scope,
    primary_rows,
)
from probe.vocabulary import MASK_INTEGRATED as ESTIMATED
from tests.support.effects_table import effects_table

K = 16
LAYERS = tuple(map(layer_scope, range(4)))
STEPS = (0, 10, 20, 40)
ENDS = {"value": ("low", "high"), "mass": ("mass_low", "mass_high")}
MOTIFS = [
    {"sublayer": "self_attn", "scope": "late", "family": "older", "status": "emerged"}
    | {"onset": 20.0, "onset_low": 10.0, "onset_high": 40.0},
    {"sublayer": "self_attn", "scope": "late", "family": "current", "status": "transient"}
    | {"first_held": 10.0, "last_held": 20.0},
    {"sublayer": "mlp", "scope": "early", "family": "embedding", "status": "transient"}
    | {"first_held": 20.0, "last_held": 20.0},
    {"sublayer": "mlp", "family": "current", "scope": "early", "status": "never"},
]
TRAINING = pd.DataFrame({"accuracy": [0.1, math.nan, 0.9], "size": [1.0, 4.0, 16.0]}, index=[5, 15, 35])
NO_MARGIN = "the clean margin is not clear of zero"


def probed_run(effects: pd.DataFrame, condition: str = "cumulative", seed: int = 0, **summary: Any) -> ProbedRun:
    """A run with these tables, and no files."""
    run = ProbedRun(Path("run"))
    run.summary = {"condition": condition, "seed": seed, "step": 40, "num_pairs": K, "model": {}}
    run.summary |= {"clean": {"task_learned": True, "saturated": True}, "dissociation": {}}
    run.summary |= {"probe": {"matters": MATTERS, "equivalent": EQUIVALENT}} | summary
    run.effects, run.training, run.results = effects, run.directory, run.directory
    run._read = lambda *_: effects  # type: ignore[assignment]
    run.emergence, run.curves = None, None
    return run


def course(kinds=(MASK,), sublayers=SUBLAYERS, half: float = 20.0, **columns: Any) -> View:
    """A run probed at four steps, at the first of which there is no strength; with accuracy, pairs and motifs."""
    effects = effects_table(["all", *REGIONS], kinds, sublayers, STEPS).assign(**columns)
    start = (effects["step"] == 0) & effects["applicable"]
    effects.loc[start, ["strength", "strength_low", "strength_high"]] = math.nan
    effects.loc[start, "no_strength"] = NO_MARGIN
    right = effects[effects["step"].isin(STEPS)].groupby("step").head(1).assign(metric="accuracy")
    accuracy = pd.DataFrame({"step": STEPS, "accuracy": np.linspace(0, 1, len(STEPS))})
    effects = pd.concat([effects, right.assign(clean=accuracy["accuracy"].tolist())], ignore_index=True)
    accuracy = accuracy.assign(low=accuracy["accuracy"] - 0.05, high=accuracy["accuracy"] + 0.02)
    halves = {"accuracy_half": half, "accuracy_half_low": half - 5, "accuracy_half_high": half + 5}
    run = probed_run(effects)
    run.emergence = SimpleNamespace(table=pd.DataFrame(MOTIFS).assign(**halves), accuracy=accuracy)  # type: ignore[assignment]
    run.curves = TRAINING
    return View(run, "a run")


def depth(seed=0, condition="cumulative", sublayers=SUBLAYERS, size=0.2, **numbers: Any) -> DepthCells:
    """A model's families over its depth, with random numbers and the dissociation that follows from them."""
    effects = effects_table(["all"], sublayers=sublayers, seed=seed, size=size)
    cells = view_cells(effects).assign(**numbers)
    cells = cells.assign(mass_low=cells["mass"] - 0.01, mass_high=cells["mass"] + 0.02).assign(**numbers)
    dissociation = {}
    for sublayer, rows in cells.groupby("sublayer"):
        rows = rows.set_index("family")
        heaviest, harmful = rows["mass"].idxmax(), rows["harm"].idxmax()
        dissociated = heaviest != harmful if rows["value"].max() >= MATTERS else None
        dissociation[sublayer] = {"heaviest": heaviest, "most_harmful": harmful, "dissociated": dissociated}
    return DepthCells(View(probed_run(effects, condition, seed, dissociation=dissociation)), cells)


def maps(effects: pd.DataFrame) -> Figure:
    return plot_heat_maps(view_cells(effects), Scale(), "a run")


BOTH = pd.concat([effects_table(["all", *REGIONS], sublayers=READ_SUBLAYERS), effects_table(LAYERS)])
DRAWN = {
    "emergence": lambda: plot_emergence(course(), "a run"),
    "emergence of block_sum": lambda: plot_emergence(course(sublayers=READ_SUBLAYERS), "a run"),
    "estimated emergence": lambda: plot_emergence(course([ESTIMATED]), "a run"),
    "heat maps": lambda: maps(BOTH),
    "heat maps of layers": lambda: maps(effects_table([layer_scope(i) for i in range(20)])),
    "heat maps without strengths": lambda: maps(BOTH.assign(no_strength=NO_MARGIN, strength=math.nan)),
    "dissociation": lambda: plot_dissociation([depth(0), depth(1, "wrapped")]),
    "dissociation of one": lambda: plot_dissociation([depth(0, sublayers=READ_SUBLAYERS)]),
    "dissociation of twelve": lambda: plot_dissociation([depth(seed) for seed in range(12)]),
    "comparison": lambda: plot_comparison([depth(0), depth(1), depth(0, "wrapped")]),
    "comparison of three sublayers": lambda: plot_comparison([depth(0), depth(2, "block_sum", READ_SUBLAYERS, 5)]),
}


def draw(figure: Figure) -> list[Text]:
    """Draw, and say which texts were really drawn."""
    texts: list[Text] = []
    original = Text.draw

    def noted(text: Text, renderer) -> None:
        if text.get_visible() and text.get_text().strip():
            texts.append(text)
        original(text, renderer)

    with style.paper_style(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        FigureCanvasAgg(figure).draw()
    return texts


def said(figure: Figure) -> list[str]:
    return [text.get_text() for text in draw(figure)]


@pytest.mark.parametrize("name", DRAWN)
def test_figures_fit_a_paper_and_can_be_read(name):
    """A column or a page wide, no text below 7 pt, none cut off, none on another."""
    figure = DRAWN[name]()
    texts = draw(figure)
    assert len(texts) > 10
    assert figure.get_figwidth() in (3.25, 6.75)
    assert figure.get_figheight() < 9
    assert min(text.get_fontsize() for text in texts) >= 7
    inside = figure.bbox.padded(0.5)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for what, box in boxes:
        assert inside.contains(*box.min), what
        assert inside.contains(*box.max), what
    for (a, first), (b, second) in itertools.combinations(boxes, 2):
        shared = Bbox.intersection(first, second)
        assert shared is None or min(shared.size) <= 1, f"{a!r} is on {b!r}"


def titled(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}


def curves_of(axes: Axes) -> dict[str, np.ndarray]:
    """label -> (points, 2) of the lines that have one."""
    lines = {str(line.get_label()): line.get_xydata() for line in axes.get_lines()}
    return {label: points for label, points in lines.items() if not label.startswith("_")}


def lines_between(axes: Axes) -> list[list[list[float]]]:
    return [s.tolist() for c in axes.collections if isinstance(c, LineCollection) for s in c.get_segments()]


def test_emergence_draws_every_route_with_its_band_and_what_stands_in_for_a_missing_strength():
    view = course(sublayers=READ_SUBLAYERS)
    panels = titled(plot_emergence(view))
    table, final = view.run.effects, 5.0
    for (sublayer, name), scope in itertools.product((("self_attn", "attention"), ("mlp", "MLP")), REGIONS):
        axes = panels[f"{name} reads, {scope}"]
        drawn = curves_of(axes)
        bands = [band.get_facecolor()[0][:3].tolist() for band in axes.collections if isinstance(band, PolyCollection)]
        for family in FAMILIES:
            rows = primary_rows(table)
            rows = rows[(rows["sublayer"] == sublayer) & (rows["scope"] == scope) & (rows["family"] == family)]
            if not rows["applicable"].all():
                assert family not in drawn
                continue
            np.testing.assert_array_equal(drawn[family], rows[["step", "strength"]].to_numpy(float))
            light = drawn[f"{family}, of the final margin"]
            assert light[0].tolist() == [0, pytest.approx(-rows["effect"].iloc[0] / final)]
            assert light[1].tolist() == drawn[family][1].tolist()  # where the lines meet
            assert np.isnan(light[2:, 1]).all()
            assert list(to_rgb(FAMILY_COLORS[family])) in bands
        assert any(set(np.ravel(line.get_ydata())) == {MATTERS} for line in axes.get_lines())
        assert axes.get_yscale() == "asinh"
        assert len({axes.get_ylim() for name, axes in panels.items() if "reads" in name}) == 1
    assert "no strength yet: harm / final margin" in said(plot_emergence(view))


def test_emergence_draws_accuracy_of_both_splits_and_the_size():
    view = course()
    figure = plot_emergence(view)
    top = figure.axes[0]
    (behind,) = (axes for axes in figure.axes if axes.get_ylabel() == "size of training examples")
    assert curves_of(top)["validation"].tolist() == [[5, 0.1], [35, 0.9]]
    probed = view.run.emergence.accuracy  # type: ignore[union-attr]
    assert curves_of(top)["probe accuracy"].tolist() == probed[["step", "accuracy"]].to_numpy().tolist()
    assert np.allclose(np.array(lines_between(top))[:, :, 1], probed[["low", "high"]])
    assert any(set(np.ravel(line.get_ydata())) == {1 / K} for line in top.get_lines())
    area = behind.collections[0].get_paths()[0].vertices
    assert {(15.0, 1.0), (15.0, 4.0), (35.0, 4.0), (35.0, 16.0)} <= {tuple(vertex) for vertex in area}  # steps


def test_motifs_are_marked_where_they_set_in_or_held():
    panels = titled(plot_emergence(course()))
    late = panels["attention reads, late"]
    onset = next(line for line in late.get_lines() if line.get_label() == "onset")
    assert (list(onset.get_xdata()), onset.get_color()) == ([20], FAMILY_COLORS["older"])
    held = next(line for line in late.get_lines() if line.get_label() == "transient")
    assert (list(held.get_xdata()), held.get_color()) == ([10, 20], FAMILY_COLORS["current"])
    ends = [list(line.get_xdata()) for line in late.get_lines() if line.get_color() == FAMILY_COLORS["older"]]
    assert [10, 40] in ends  # its interval
    marked = {name for name, axes in panels.items() if {"onset", "transient"} & curves_of(axes).keys()}
    assert marked == {"attention reads, late", "MLP reads, early"}
    for axes in panels.values():
        dashed = [set(np.ravel(line.get_xdata())) for line in axes.get_lines() if line.get_linestyle() == "--"]
        assert {20.0} in dashed  # accuracy has risen by half


def test_other_metrics_have_figures_that_say_where_they_are_saturated():
    view = course(metric="nll", no_strength="the metric has none")
    figure = plot_emergence(View(view.run, "a run", "nll"), "a run")
    assert "saturated" in figure.get_suptitle()
    assert "onset" not in curves_of(titled(figure)["attention reads, late"])
    assert any("rise of NLL" in text for text in said(figure))
    assert "saturated" not in plot_emergence(course(), "a run").get_suptitle()


def test_heat_maps_hold_the_table():
    effects = BOTH.assign(below_floor=False)
    figure = maps(effects)
    rows = effects.set_index(["sublayer", "scope", "family"]).sort_index()
    panels = [axes for axes in figure.axes if len(axes.get_images()) == 1]
    names = {"attention": "self_attn", "MLP": "mlp"}
    for axes, value in zip(panels[:4], ("mass", "strength") * 2, strict=True):
        scopes = [label.get_text() for label in panels[panels.index(axes) // 2 * 2].get_yticklabels()]
        image = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
        hatched = {p.get_xy() for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()}
        corners = {tuple(np.round(p.get_xy()[1], 6)) for p in axes.patches if isinstance(p, Polygon)}
        bold = {text.get_position() for text in axes.texts if text.get_fontweight() == "bold"}
        for row, column in np.ndindex(len(scopes), len(FAMILIES)):
            sublayer, _, scope = scopes[row].partition(" ")
            place = ("final", "final") if sublayer == "final" else (names[sublayer], scope)
            place = (place[0], layer_scope(int(scope))) if scope.isdigit() else place
            if place not in rows.index.droplevel(2):
                continue
            cell = rows.loc[(*place, FAMILIES[column])]
            assert ((column - 0.5, row - 0.5) in hatched) == (not cell["applicable"])
            assert ((column + 0.5, row - 0.5) in corners) == (cell["applicable"] and cell["n_unaliased_reads"] == 0)
            matters = value == "strength" and cell["strength"] > 0 and cell["p_matters"] <= 0.05
            assert ((column, row) in bold) == bool(matters and cell["applicable"])
            if cell["applicable"]:
                assert image[row, column] == pytest.approx(np.clip(cell[value], -1, 1))
            else:
                assert np.isnan(image[row, column])
    assert len(panels) == 4
    assert panels[1].get_images()[0].get_clim() == panels[3].get_images()[0].get_clim() == (-1, 1)


def test_heat_maps_say_what_is_an_estimate_and_why_a_cell_is_empty():
    both = pd.concat([effects_table(REGIONS), effects_table(LAYERS, [ESTIMATED])])
    assert "regions exact, layers estimated" in maps(both).get_suptitle()
    assert "estimates (integrated gradients)" in maps(both[both["kind"] == ESTIMATED]).get_suptitle()
    with pytest.raises(ValueError, match="no effects of mask_renormalise in layers or regions"):
        maps(effects_table(REGIONS, ["zero"]))
    assert {"not applicable", f"no strength: {NO_MARGIN}"} <= set(said(DRAWN["heat maps without strengths"]()))


def test_dissociation_draws_each_family_with_both_intervals():
    runs = [depth(0), depth(1, "wrapped", aliased_mass=1.0)]
    figure = plot_dissociation(runs)
    panels = np.array(figure.axes).reshape(2, 2)
    for (row, column), axes in np.ndenumerate(panels):
        cells = runs[column].of(SUBLAYERS[row])
        drawn = {line.get_label(): line for line in axes.get_lines()}
        for family in FAMILIES:
            cell = cells.loc[family]
            mass, value = cell["mass"], cell["value"]
            assert drawn[family].get_xydata().tolist() == [[mass, value]]
            assert (drawn[family].get_markerfacecolor() == "w") == (column == 1)
            assert [[mass, cell["low"]], [mass, cell["high"]]] in lines_between(axes)
            assert [[cell["mass_low"], value], [cell["mass_high"], value]] in lines_between(axes)
        assert any(line.get_ydata()[0] == pytest.approx(MATTERS) for line in axes.get_lines())
        assert (axes.get_xlim(), axes.get_ylim()) == (panels[0, 0].get_xlim(), panels[0, 0].get_ylim())
        low, high = axes.get_ylim()
        assert low < min(-EQUIVALENT, cells["low"].min())
        assert high > max(MATTERS, cells["high"].max())


def test_dissociation_names_the_heaviest_and_the_most_harmful_or_why_there_is_none():
    run = next(run for run in map(depth, range(9)) if run.run.summary["dissociation"]["self_attn"]["dissociated"])
    names = {text.get_text(): text for text in plot_dissociation([run]).axes[0].texts}
    found = run.run.summary["dissociation"]["self_attn"]
    assert names["most mass"].get_color() == FAMILY_COLORS[found["heaviest"]]
    assert names["most harm"].get_color() == FAMILY_COLORS[found["most_harmful"]]
    assert names["most harm"].xy == tuple(run.of("self_attn").loc[found["most_harmful"], ["mass", "value"]])
    names = [text.get_text() for text in plot_dissociation([depth(0, value=0.001, low=0.0, high=0.002)]).axes[0].texts]
    assert "attention reads: none matters" in names
    assert "most harm" not in names
    status = {"value": math.nan, "status": f"no strength: {NO_MARGIN}"}
    assert f"no strength:\n{NO_MARGIN}" in [t.get_text() for t in plot_dissociation([depth(0, **status)]).axes[0].texts]


def test_comparison_of_seeds_draws_points_and_the_interval_over_seeds():
    runs = [depth(seed) for seed in range(3)] + [depth(0, "wrapped")]
    figure = plot_comparison(runs)
    for axes, (sublayer, value) in zip(figure.axes, itertools.product(SUBLAYERS, ("mass", "value")), strict=True):
        heights = {tick.get_text(): [] for tick in figure.axes[0].get_yticklabels()}
        for at, tick in zip(figure.axes[0].get_yticks(), figure.axes[0].get_yticklabels(), strict=True):
            heights[tick.get_text()].append(at)
        for at_seeds, at_one, family in zip(heights["cumulative, 3 seeds"], heights["wrapped"], FAMILIES, strict=True):
            values = [run.of(sublayer).loc[family, value] for run in runs[:3]]
            points = {tuple(point) for line in axes.get_lines() for point in line.get_xydata()}
            assert {(v, at_seeds) for v in values} <= points
            assert any(at == at_seeds and x == pytest.approx(np.mean(values)) for x, at in points)
            ends = scipy_stats.t.interval(0.95, 2, np.mean(values), scipy_stats.sem(values))
            drawn = {s[0][1]: (s[0][0], s[1][0]) for s in lines_between(axes)}
            assert drawn[at_seeds] == pytest.approx(ends)
            one, (low, high) = runs[3].of(sublayer).loc[family], ENDS[value]
            assert (one[value], at_one) in points
            assert drawn[at_one] == pytest.approx((one[low], one[high]))


def test_comparison_says_why_a_line_is_empty_and_keeps_a_seed_that_is_there_twice_apart():
    labels = list(seed_groups([depth(0), depth(0), depth(1, "frozen")]))
    assert labels == ["cumulative (seed 0, step 40) #1", "cumulative (seed 0, step 40) #2", "frozen"]
    weak = depth(0, "wrapped", value=math.nan, status=f"no strength: {NO_MARGIN}")
    panels = plot_comparison([weak, depth(0, "block_sum", READ_SUBLAYERS)]).axes
    assert [text.get_text() for text in panels[4].texts] == ["n/a"] * len(FAMILIES)  # a final read that is not there
    assert [text.get_text() for text in panels[1].texts] == ["no strength"] * len(FAMILIES)


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_intervals_without_ends_are_no_error_and_do_not_stretch_the_axes(end):
    plain = plot_dissociation([depth(0)]).axes[0].get_ylim()
    bent = plot_dissociation([depth(0, high=end)]).axes[0]
    assert np.isfinite(bent.get_ylim()).all()
    assert bent.get_ylim()[1] <= plain[1]
    assert any(max(s[0][1], s[1][1]) > plain[1] for s in lines_between(bent)) == (end == math.inf)
    for figure in (
        plot_comparison([depth(0, low=end, mass_low=math.nan), depth(0, "wrapped")]),
        plot_emergence(course(half=math.nan, strength_low=-end)),
    ):
        draw(figure)
        assert max(abs(end) for axes in figure.axes for end in axes.get_ylim()) < 100


@pytest.mark.parametrize("name", ["emergence", "heat maps of layers"])
def test_the_same_input_gives_the_same_bytes_whatever_the_users_style(tmp_path, name):
    first = style.save(DRAWN[name](), tmp_path / "a")
    with mpl.rc_context({"font.size": 20, "savefig.dpi": 40, "pdf.fonttype": 3, "axes.facecolor": "red"}):
        second = style.save(DRAWN[name](), tmp_path / "b")
    assert [path.name for path in first] == ["a.png", "a.pdf"]
    for path, again in zip(first, second, strict=True):
        assert path.read_bytes() == again.read_bytes()
    assert struct.unpack(">I", first[0].read_bytes()[16:20]) == (6.75 * 300,)
    pdf = first[1].read_bytes()
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"CreationDate" not in pdf
    assert b"/MediaBox [ 0 0 486 " in pdf  # 6.75 inches, in points
