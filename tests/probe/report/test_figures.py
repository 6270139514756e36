"""Figures show what the tables hold, legibly and in one style; the same input gives the same bytes."""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from scipy import stats as scipy_stats

from attnres import FAMILIES, REGIONS, SUBLAYERS
from probe.analysis.emergence import Emergence
from probe.files.runs import ProbedRun
from probe.report.figures import style
from probe.report.figures.cells import DepthCells
from probe.report.figures.comparison import plot_comparison, seed_groups
from probe.report.figures.dissociation import plot_dissociation
from probe.report.figures.emergence import plot_emergence, plot_motifs
from probe.report.figures.heat_maps import plot_heat_maps
from probe.vocabulary import FAMILY_COLORS, MASK, READ_SUBLAYERS, equivalent_within, layer_scope, matters_from
from probe.vocabulary import MASK_FIRST_ORDER as LINEAR

K = 16
MATTERS, EQUIVALENT = matters_from(K), equivalent_within(K)
LAYERS = tuple(map(layer_scope, range(4)))
STEPS = (0, 10, 20, 40)
ENDS = {"effect": ("ci_low", "ci_high"), "mass": ("mass_low", "mass_high")}


def effects_table(scopes, kinds=(MASK,), sublayers=SUBLAYERS, steps=(40,), seed=0, size=0.2) -> pd.DataFrame:
    """Primary rows with random numbers; `older` is not applicable at layer 0 and in the early region."""
    rng = np.random.default_rng(seed)
    rows = []
    for step, kind, sublayer, scope, family in itertools.product(steps, kinds, sublayers, scopes, FAMILIES):
        applicable = not (family == "older" and scope in ("early", "layer:0"))
        effect = rng.normal(0, size) if applicable else math.nan
        half = abs(rng.normal(0, size / 4))
        rows.append(
            {"step": step, "sublayer": sublayer, "scope": scope, "family": family, "kind": kind}
            | {"applicable": applicable, "mass": rng.uniform(0, 0.5) if applicable else 0.0, "effect": effect}
            | {"ci_low": effect - half, "ci_high": effect + 2 * half, "p_adjusted": rng.choice([0.001, 0.5])}
            | {"n_unaliased_reads": int(rng.integers(0, 2))}
        )
    same = {"seed": seed, "positions": "all", "with_aliases": False, "metric": "nll", "aliased_mass": 0.0}
    return pd.DataFrame(rows).assign(**same)


def emergence_of(effects: pd.DataFrame, motifs: list[dict] | None = None, half: float = 20.0) -> Emergence:
    """Curves of the exact rows of a table, with mass intervals and the given rows of motifs."""
    exact = effects[effects["kind"] == MASK]
    curves = exact.assign(mass_low=exact["mass"] - 0.02, mass_high=exact["mass"] + 0.03, holds=False)
    steps = sorted(set(effects["step"]))
    accuracy = pd.DataFrame({"step": steps, "accuracy": np.linspace(0, 1, len(steps))})
    accuracy = accuracy.assign(low=accuracy["accuracy"] - 0.05, high=accuracy["accuracy"] + 0.02, pairs=math.nan)
    never = {"sublayer": "mlp", "family": "current", "scope": "early", "status": "never"}
    table = pd.DataFrame([*(motifs or []), never])
    halves = {"accuracy_half": half, "accuracy_half_low": half - 5, "accuracy_half_high": half + 5}
    return Emergence(table.assign(**halves), curves, accuracy)


MOTIFS = [
    {"sublayer": "self_attn", "scope": "late", "family": "older", "status": "emerged"}
    | {"onset": 20.0, "onset_low": 10.0, "onset_high": 40.0},
    {"sublayer": "self_attn", "scope": "late", "family": "current", "status": "transient"}
    | {"first_held": 10.0, "last_held": 20.0},
    {"sublayer": "mlp", "scope": "early", "family": "embedding", "status": "transient"}
    | {"first_held": 20.0, "last_held": 20.0},
]
TRAINING = pd.DataFrame({"accuracy": [0.1, math.nan, 0.9], "pairs": [1.0, 4.0, 16.0]}, index=[5, 15, 35])


def depth(seed=0, condition="cumulative", sublayers=SUBLAYERS, num_pairs=K, size=0.2, **numbers) -> DepthCells:
    """A model's families over its depth, with random numbers and the dissociation that follows from them."""
    cells = effects_table(["all"], sublayers=sublayers, seed=seed, size=size)
    cells = cells.assign(mass_low=cells["mass"] - 0.01, mass_high=cells["mass"] + 0.02).assign(**numbers)
    dissociation = {}
    for sublayer, rows in cells.groupby("sublayer"):
        rows = rows.set_index("family")
        heaviest, harmful = rows["mass"].idxmax(), rows["effect"].idxmax()
        dissociated = heaviest != harmful if rows["effect"].max() >= MATTERS else None
        dissociation[sublayer] = {"heaviest": heaviest, "most_harmful": harmful, "dissociated": dissociated}
    run = ProbedRun(Path("run"))
    run.summary = {"condition": condition, "seed": seed, "step": 40, "num_pairs": num_pairs, "model": {}}
    run.summary |= {"dissociation": dissociation, "clean": {"task_learned": True}}
    return DepthCells(run, cells)


def only(rows: pd.DataFrame, **values) -> pd.DataFrame:
    """Rows with these values, in the order of their steps."""
    for column, value in values.items():
        rows = rows[rows[column] == value]
    return rows.sort_values("step", kind="stable")


def emergence_figure() -> Figure:
    effects = effects_table(["all", *REGIONS], (MASK, LINEAR), steps=STEPS)
    return plot_emergence(emergence_of(effects), effects, TRAINING, K, "a run")


def motif_figure() -> Figure:
    effects = effects_table(["all", *REGIONS], steps=STEPS)
    return plot_motifs(emergence_of(effects, MOTIFS), effects, K, "a run")


DRAWN = {
    "emergence": emergence_figure,
    "motifs": motif_figure,
    "heat maps of layers": lambda: plot_heat_maps(effects_table(LAYERS), K, "a run"),
    "heat maps of regions": lambda: plot_heat_maps(effects_table(REGIONS, size=20), K, "a run"),
    "heat maps to first order": lambda: plot_heat_maps(effects_table(LAYERS, [LINEAR]), K, "a run"),
    "dissociation": lambda: plot_dissociation([depth(0), depth(1, "wrapped")]),
    "dissociation of one": lambda: plot_dissociation([depth(0, sublayers=READ_SUBLAYERS)]),
    "dissociation of twelve": lambda: plot_dissociation([depth(seed) for seed in range(12)]),
    "comparison": lambda: plot_comparison([depth(0), depth(1), depth(0, "wrapped")]),
    "comparison of three sublayers": lambda: plot_comparison(
        [depth(0, size=5), depth(2, "block_sum", READ_SUBLAYERS, num_pairs=64)]
    ),
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


def curves_of(axes) -> dict[str, np.ndarray]:
    """label -> (points, 2) of the lines that have one."""
    return {line.get_label(): line.get_xydata() for line in axes.get_lines() if not line.get_label().startswith("_")}


def lines_between(axes) -> list[list[list[float]]]:
    return [s.tolist() for c in axes.collections if isinstance(c, LineCollection) for s in c.get_segments()]


@pytest.mark.parametrize("name", ["emergence", "motifs"])
def test_curves_are_the_rows_with_their_bands(name):
    """First-order points are curves of their own, dashed and hollow."""
    effects = effects_table(["all", *REGIONS], (MASK, LINEAR), steps=STEPS)
    effects = effects[(effects["kind"] == MASK) | (effects["step"] != 10)]
    emergence = emergence_of(effects, MOTIFS)
    if name == "emergence":
        figure, scopes = plot_emergence(emergence, effects, None, K), ["all"]
        panels = np.array(figure.axes[2:6]).reshape(2, 2).T[:, None]
    else:
        figure, scopes = plot_motifs(emergence, effects, K), REGIONS
        panels = np.array(figure.axes[:12]).reshape(2, 2, 3).swapaxes(1, 2)
    for (s, sublayer), (r, scope) in itertools.product(enumerate(SUBLAYERS), enumerate(scopes)):
        rows = only(emergence.curves, sublayer=sublayer, scope=scope, applicable=True)
        families = [family for family in FAMILIES if (rows["family"] == family).any()]
        for axes, (value, ends) in zip(panels[s, r], ENDS.items(), strict=True):
            lines = {line.get_label(): line for line in axes.get_lines()}
            bands = [collection for collection in axes.collections if isinstance(collection, PolyCollection)]
            assert [family for family in lines if family in FAMILIES] == families
            for family, band in zip(families, bands, strict=True):
                of_family = only(rows, family=family)
                assert lines[family].get_xydata().tolist() == of_family[["step", value]].to_numpy().tolist()
                corners = {tuple(vertex) for vertex in band.get_paths()[0].vertices}
                for end in ends:
                    assert set(of_family[["step", end]].itertuples(index=False, name=None)) <= corners
                assert np.allclose(band.get_facecolor()[0][:3], to_rgb(FAMILY_COLORS[family]))
                if value == "effect":
                    line = lines[f"{family}, first order"]
                    points = only(effects, kind=LINEAR, sublayer=sublayer, scope=scope, family=family)
                    assert line.get_xydata().tolist() == points[["step", "effect"]].to_numpy().tolist()
                    assert (line.get_linestyle(), line.get_markerfacecolor()) == ("--", "w")
    assert "first order (linearised)" in said(figure)
    assert "first order (linearised)" not in said(motif_figure())


def test_emergence_draws_accuracy_of_both_splits_and_the_pairs():
    effects = effects_table(["all"], steps=STEPS)
    emergence = emergence_of(effects)
    figure = plot_emergence(emergence, effects, TRAINING, K)
    top, behind = figure.axes[0], figure.axes[-1]
    assert curves_of(top)["validation"].tolist() == [[5, 0.1], [35, 0.9]]
    probed = emergence.accuracy
    assert curves_of(top)["probe accuracy (95 %)"].tolist() == probed[["step", "accuracy"]].to_numpy().tolist()
    assert np.allclose(np.array(lines_between(top))[:, :, 1], probed[["low", "high"]])
    assert any(set(line.get_ydata()) == {1 / K} for line in top.get_lines())
    area = behind.collections[0].get_paths()[0].vertices
    assert {(15.0, 1.0), (15.0, 4.0), (35.0, 4.0), (35.0, 16.0)} <= {tuple(vertex) for vertex in area}  # steps


def test_motifs_are_marked_where_they_set_in_or_held():
    figure = motif_figure()
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_title(loc="left")}
    late = panels["attention reads, late"]
    onset = next(line for line in late.get_lines() if line.get_label() == "onset")
    assert list(onset.get_xdata()) == [20]
    assert onset.get_color() == FAMILY_COLORS["older"]
    assert [[start[0], end[0]] for start, end in lines_between(late)] == [[10, 40]]
    held = next(line for line in late.get_lines() if line.get_label() == "transient")
    assert (list(held.get_xdata()), held.get_color()) == ([10, 20], FAMILY_COLORS["current"])
    curves = only(effects_table(["all", *REGIONS], steps=STEPS), sublayer="self_attn", applicable=True)
    heights = [*onset.get_ydata(), *held.get_ydata()]
    assert curves.loc[curves["scope"] != "all", "ci_high"].max() < min(heights)  # above the curves
    assert max(heights) < late.get_ylim()[1]
    marked = {name for name, axes in panels.items() if {"onset", "transient"} & curves_of(axes).keys()}
    assert marked == {"attention reads, late", "MLP reads, early"}
    for axes in panels.values():
        assert any(set(line.get_xdata()) == {20.0} and line.get_linestyle() == "--" for line in axes.get_lines())


@pytest.mark.parametrize(("scopes", "unit"), [(LAYERS, "layer"), (REGIONS, "region")])
def test_heat_maps_hold_the_table(scopes, unit):
    effects = effects_table(scopes)
    figure = plot_heat_maps(effects, K, "a run")
    assert f"by {unit}; exact" in figure.get_suptitle()
    panels = figure.axes[:4]
    for axes, (sublayer, value) in zip(panels, itertools.product(SUBLAYERS, ("mass", "effect")), strict=True):
        image = np.ma.filled(axes.get_images()[0].get_array(), np.nan)
        hatched = {p.get_xy() for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()}
        corners = {tuple(p.get_xy()[1]) for p in axes.patches if isinstance(p, Polygon)}
        bold = {text.get_position() for text in axes.texts if text.get_fontweight() == "bold"}
        for row, column in np.ndindex(len(scopes), len(FAMILIES)):
            cell = only(effects, sublayer=sublayer, scope=scopes[row], family=FAMILIES[column]).iloc[0]
            assert ((column - 0.5, row - 0.5) in hatched) == (not cell["applicable"])
            assert ((column + 0.5, row + 0.5) in corners) == (cell["applicable"] and cell["n_unaliased_reads"] == 0)
            matters = value == "effect" and cell["effect"] >= MATTERS and cell["p_adjusted"] <= 0.05
            assert ((column, row) in bold) == matters
            if cell["applicable"]:
                assert image[row, column] == cell[value]
            else:
                assert np.isnan(image[row, column])
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [s.removeprefix("layer:") for s in scopes]


def test_heat_maps_prefer_exact_effects_to_finer_ones():
    """Probes in training: regions exactly, layers to first order."""
    both = pd.concat([effects_table(REGIONS), effects_table(LAYERS, [LINEAR])])
    assert "by region; exact" in plot_heat_maps(both, K).get_suptitle()
    linear = plot_heat_maps(both[both["kind"] == LINEAR], K)
    assert "by layer; first order (linearised)" in linear.get_suptitle()
    with pytest.raises(ValueError, match="no effects of mask_renormalise in layers or regions"):
        plot_heat_maps(effects_table(["all"]), K)


@pytest.mark.parametrize("size", [1e-6, 3.0])
def test_colours_of_effects_are_symmetric_and_do_not_magnify_noise(size):
    effects = effects_table(LAYERS, size=size)
    figure = plot_heat_maps(effects, K)
    low, high = figure.axes[1].get_images()[0].get_clim()
    assert (low, high) == figure.axes[3].get_images()[0].get_clim()
    assert high == -low == pytest.approx(max(MATTERS, effects["effect"].abs().max()))


def test_dissociation_draws_each_family_with_both_intervals():
    runs = [depth(0), depth(1, "wrapped", aliased_mass=1.0)]
    figure = plot_dissociation(runs)
    panels = np.array(figure.axes).reshape(2, 2)
    for (row, column), axes in np.ndenumerate(panels):
        cells = runs[column].of(SUBLAYERS[row])
        drawn = {line.get_label(): line for line in axes.get_lines()}
        for family in FAMILIES:
            cell = cells.loc[family]
            mass, effect = cell["mass"], cell["effect"]
            assert drawn[family].get_xydata().tolist() == [[mass, effect]]
            assert (drawn[family].get_markerfacecolor() == "w") == (column == 1)
            assert [[mass, cell["ci_low"]], [mass, cell["ci_high"]]] in lines_between(axes)
            assert [[cell["mass_low"], effect], [cell["mass_high"], effect]] in lines_between(axes)
        assert any(line.get_ydata()[0] == pytest.approx(MATTERS) for line in axes.get_lines())
        assert axes.get_yscale() == "symlog"
        assert (axes.get_xlim(), axes.get_ylim()) == (panels[0, 0].get_xlim(), panels[0, 0].get_ylim())
        low, high = axes.get_ylim()
        assert low < min(-EQUIVALENT, cells["ci_low"].min())
        assert high > max(MATTERS, cells["ci_high"].max())


def test_dissociation_names_the_heaviest_and_the_most_harmful():
    run = next(run for run in map(depth, range(9)) if run.run.summary["dissociation"]["self_attn"]["dissociated"])
    names = {text.get_text(): text for text in plot_dissociation([run]).axes[0].texts}
    found = run.run.summary["dissociation"]["self_attn"]
    assert names["most mass"].get_color() == FAMILY_COLORS[found["heaviest"]]
    assert names["most harm"].get_color() == FAMILY_COLORS[found["most_harmful"]]
    assert names["most harm"].xy == tuple(run.of("self_attn").loc[found["most_harmful"], ["mass", "effect"]])
    harmless = depth(0, effect=0.001, ci_low=0.0, ci_high=0.002)
    names = [text.get_text() for text in plot_dissociation([harmless]).axes[0].texts]
    assert "attention reads: no harm that matters" in names
    assert "most harm" not in names


def test_comparison_of_seeds_draws_points_and_the_interval_over_seeds():
    runs = [depth(seed) for seed in range(3)] + [depth(0, "wrapped")]
    figure = plot_comparison(runs)
    for axes, (sublayer, value) in zip(figure.axes, itertools.product(SUBLAYERS, ("mass", "effect")), strict=True):
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


def test_comparison_keeps_a_seed_that_is_there_twice_apart():
    labels = list(seed_groups([depth(0), depth(0), depth(1, "frozen")]))
    assert labels == ["cumulative (seed 0, step 40) #1", "cumulative (seed 0, step 40) #2", "frozen"]


def test_comparison_says_where_a_family_is_not_applicable():
    runs = [depth(0), depth(0, "block_sum", READ_SUBLAYERS)]
    marks = [text.get_text() for text in plot_comparison(runs).axes[4].texts]  # mass of the final read
    assert marks == ["n/a"] * len(FAMILIES)  # of the model that has none


@pytest.mark.parametrize("end", [math.nan, math.inf])
def test_intervals_without_ends_are_no_error_and_do_not_stretch_the_axes(end):
    plain = plot_dissociation([depth(0)]).axes[0].get_ylim()
    bent = plot_dissociation([depth(0, ci_high=end)]).axes[0]
    assert np.isfinite(bent.get_ylim()).all()
    assert bent.get_ylim()[1] <= plain[1]
    assert any(max(s[0][1], s[1][1]) > plain[1] for s in lines_between(bent)) == (end == math.inf)
    effects = effects_table(["all", *REGIONS], steps=STEPS).assign(ci_low=end)
    for figure in (
        plot_comparison([depth(0, ci_low=end, mass_low=math.nan), depth(0, "wrapped")]),
        plot_emergence(emergence_of(effects, half=math.nan), effects, TRAINING, K),
        plot_motifs(emergence_of(effects, MOTIFS), effects, K),
    ):
        draw(figure)
        assert all(np.isfinite(axes.get_ylim()).all() for axes in figure.axes)
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
