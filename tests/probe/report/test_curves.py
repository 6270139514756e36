"""How curves are shown: panels, text, figure and page hold the table, and mark what was planted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from attnres.tasks import Pointer
from probe.analysis.curves import CURVE_COLUMNS
from probe.analysis.stats import wilson_low
from probe.cli import main
from probe.files.tables import write_curves
from probe.report.curves import curve_panels, describe_curves
from probe.report.figures.curves import plot_curves
from probe.report.figures.style import figure_image
from probe.report.page import curves, sites
from probe.report.page.build import build_page
from probe.report.page.data import load_page_runs
from probe.runner import probe_model
from probe.settings import ProbeSettings
from tests.support.paths import ROOT

POINTER = ROOT / "tests/fixtures/pointer"
STEPS = [0, 20, 40, 60, 80, 100, 120]
PLANTED = {
    ("accuracy", "accuracy", "", "all"): 60,
    ("accuracy", "accuracy", "", "hops_1"): 40,
    ("flip", "follows", "", "all"): 80,
    ("flip", "follows", "", "hops_1"): 40,
    ("flip", "moves", "", "all"): 40,
    ("flip", "moves_other", "", "all"): 60,
    ("trace", "stream_query", "layer 0", "all"): None,
    ("trace", "stream_query", "layer 1", "all"): 80,
    ("trace", "stream_query", "layer 2", "all"): 60,
    ("heads", "head", "layer 1, head 0", "all"): 60,
    ("heads", "head", "layer 1, head 1", "all"): None,
}
"""Curve -> the step from which it is high."""


def table(run: str = "run") -> pd.DataFrame:
    rows = []
    for (kind, quantity, place, group), since in PLANTED.items():
        for step in STEPS:
            value = 0.9 if since is not None and step >= since else 0.01 + step / 1e4
            ends = {"value": value, "low": wilson_low(value, 64), "high": 1 - wilson_low(1 - value, 64)}
            about = {"kind": kind, "quantity": quantity, "place": place, "group": group, "step": step}
            rows.append(about | ends)
    about = {"run": run, "condition": "vanilla", "seed": 0, "data_id": "x", "n_queries": 64, "n_sequences": 64}
    return pd.DataFrame(rows).assign(**about)[CURVE_COLUMNS]


def test_panels_hold_every_curve_once_and_accuracy_of_their_group():
    panels = curve_panels(table())
    assert {kind: [panel.title for panel in found] for kind, found in panels.items()} == {
        "flip": ["flip test", "flip test: hops_1"],
        "trace": ["stream at query, before layer …"],
        "heads": ["margin lost without …"],
    }
    whole, group = panels["flip"]
    assert [line.label for line in whole.lines] == ["follows, asked for", "moves, asked for", "moves, another"]
    assert [line.dashed for line in whole.lines] == [False, False, True]
    assert [line.onset["onset"] for line in whole.lines][:2] == [80, 40]
    assert group.accuracy["value"].iloc[2] == 0.9
    assert whole.accuracy["value"].iloc[2] < 0.1
    assert [line.label for line in panels["trace"][0].lines] == ["layer 0", "layer 1", "layer 2"]
    assert [line.label for line in panels["heads"][0].lines] == ["layer 1, head 0"]  # the other is worth nothing
    assert panels["heads"][0].threshold == 0.05


def test_places_that_are_the_same_by_construction_are_left_out():
    rows = table()
    of_final = rows[rows["place"] == "layer 2"].assign(place="final norm", value=1.0)
    assert "final norm" not in [line.label for line in curve_panels(pd.concat([rows, of_final]))["trace"][0].lines]


def test_accuracy_alone_has_a_panel():
    rows = table()
    assert list(curve_panels(rows[rows["kind"] == "accuracy"])) == ["accuracy"]


def test_text_says_since_when_by_group():
    lines = {line[:59].strip(): line[59:].split("  ") for line in describe_curves(table(), "run").splitlines()[4:]}
    cells = {name: [cell.strip() for cell in found if cell.strip()] for name, found in lines.items()}
    assert cells["since"] == ["all", "hops_1"]
    assert cells["accuracy"] == ["60 [40, 60]", "40 [20, 40]"]
    assert cells["output follows what is asked for"] == ["80 [60, 80]", "40 [20, 40]"]
    assert cells["stream at query, before layer 1"] == ["80 [60, 80]"]
    assert cells["margin lost without layer 1, head 0"] == ["60 [0, 60]"]  # at 2 of 64, five per cent are not refuted
    assert not [name for name in cells if "layer 0" in name or "another" in name]


def test_the_figure_draws_curves_and_onsets():
    figure = plot_curves(table(), "run")
    panels = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    lines = {line.get_label(): line for line in panels["flip test"].lines}
    expected = table().query("quantity == 'follows' and group == 'all'")
    assert np.asarray(lines["follows, asked for"].get_ydata()).tolist() == list(expected["value"])
    marks = [line for line in panels["flip test"].lines if line.get_marker() == "v"]
    assert sorted(float(np.asarray(line.get_xdata())[0]) for line in marks) == [40, 80]
    image = figure_image(figure, dpi=50)
    assert image.dtype == np.uint8
    assert image.shape[1:] == (337, 3)
    assert (image < 128).any()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was probed, with curves, a trace and heads."""
    folder = tmp_path_factory.mktemp("page") / "run"
    model: Any
    model, task = AutoModelForCausalLM.from_pretrained(POINTER).float().eval(), Pointer(2, 11)
    settings = ProbeSettings(num_sequences=12, num_resamples=20, scopes=("all",), positions=("all",))
    about = {"run": "run", "condition": "cumulative", "seed": 0}
    for step in (0, 60):
        probe_model(model, task, settings, folder / "probe", step=step, **about)
    for _, rows in table().groupby(["kind", "step"]):
        write_curves(folder / "probe", rows)
    quick = ["--num_sequences=12", "--num_resamples=20", "--device=cpu"]
    assert main(["trace", str(POINTER), f"--output={folder / 'trace'}", *quick]) == 0
    assert main(["heads", str(POINTER), f"--output={folder / 'heads'}", "--kinds=[mean]", *quick]) == 0
    return folder


def test_the_page_shows_curves_with_the_sliders_step_and_the_maps_of_sites(run):
    loaded = load_page_runs([run])
    view = loaded[0].view()
    panel = curves.curves(view, 0)
    assert sum(shape.get("name") == "cursor" for shape in panel.shapes) == len(panel.plots) == 4
    traces = {
        (trace["name"], trace["xaxis"]): trace for trace in panel.frames[0] if trace.get("mode") == "lines+markers"
    }
    expected = table().query("quantity == 'moves_other'")
    assert list(traces["moves, another", "x"]["y"]) == list(expected["value"])
    assert "accuracy 0.900" in panel.titles[80]
    restored, spoiled = sites.traces(view, 0)
    written = pd.read_parquet(run / "trace/trace.parquet")
    stream = written.query("site == 'stream' and direction == 'denoise'")
    drawn = restored.frames[next(iter(restored.frames))][0]
    assert np.sort(np.ravel(drawn["z"])) == pytest.approx(np.sort(stream["strength"]))
    assert {"value (cell)", "query - 1 (bit)", "query"} <= set(drawn["x"])
    assert spoiled.name == "trace-noise-0"
    (heads,) = sites.heads(view, 0)
    found = pd.read_parquet(run / "heads/heads.parquet").query("metric == 'logit_diff'")
    first, *_ = heads.frames[next(iter(heads.frames))]
    assert np.sort(np.ravel(first["z"])) == pytest.approx(np.sort(found["strength"]))
    page = build_page(loaded)
    ids = re.findall(r'<section class="panel" id="([\w-]+)"', page)
    assert {"curves-0", "trace-denoise-0", "trace-noise-0", "heads-0"} <= set(ids)


def test_report_draws_the_figure_and_a_torn_table_is_one_line(run, capsys):
    assert main(["report", str(run)]) == 0
    assert "figures/curves.png" in capsys.readouterr().out
    assert "output follows what is asked for" in (run / "report.txt").read_text()
    path = run / "trace/trace.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "trace.parquet is not what was written" in error
