"""The page of `attnres-probe report`: what it shows in a real browser is what the tables hold."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from attnres import FAMILIES
from attnres.files import MANIFEST
from attnres.tasks import MQAR
from probe.cli import main
from probe.files.layout import TEXT
from probe.report.page.build import build_page, write_page
from probe.report.page.data import PageRun, load_page_runs
from probe.report.page.panels import maps
from probe.report.page.style import DARK_COLORS
from probe.report.view import IN_TRAINING, View
from probe.runner import probe_model
from probe.settings import ProbeSettings
from probe.vocabulary import (
    FAMILY_COLORS,
    MASK,
    MASK_INTEGRATED,
    METRICS,
    PRIMARY_METRIC,
    READ_SUBLAYERS,
    REGIONS,
    ROUTE,
    primary_rows,
    wide,
)
from tests.probe.test_cli import QUICK, export

STEPS = (0, 2, 5)
LOCAL = re.compile("file:|data:|blob:")


@pytest.fixture(scope="module")
def runs(trained_model, make_model, tmp_path_factory) -> list[Path]:
    """A model probed at three steps of a training of sorts and once more at its end, and another probed once."""
    folder = tmp_path_factory.mktemp("runs")
    last, trained, other = copy.deepcopy(trained_model()), folder / "trained", folder / "other"
    settings = ProbeSettings(num_sequences=12, num_resamples=40, mode="both")
    start = make_model(seed=3, vocab_size=24, hidden_size=32, intermediate_size=48, head_dim=16).state_dict()
    end = {name: tensor.clone() for name, tensor in last.state_dict().items()}
    about: dict[str, Any] = {"run": "trained", "condition": "cumulative", "seed": 0}
    for step in STEPS:
        last.load_state_dict({name: torch.lerp(start[name], end[name], step / STEPS[-1]) for name in end})
        probe_model(last, trained_model.task, settings, trained / "probe", step=step, **about)
    more = ProbeSettings(num_sequences=20, num_resamples=40)
    probe_model(last, trained_model.task, more, trained / "probe" / "final", step=5, **about)
    deep = make_model(vocab_size=24, attnres_num_blocks=4)  # which has older blocks
    probe_model(deep, trained_model.task, more, other / "probe", step=5, **about | {"condition": "wrapped"})
    (trained / "metrics.csv").write_text("step,val/accuracy,train/size\n0,,1\n1,0.1,\n3,,3\n4,0.6,\n")
    return [trained, other]


@pytest.fixture(scope="module")
def loaded(runs) -> list[PageRun]:
    return load_page_runs(runs)


@pytest.fixture(scope="module")
def page_file(loaded, tmp_path_factory) -> Path:
    return write_page(loaded, tmp_path_factory.mktemp("page") / "report.html")


class Visit:
    """The page in a tab, and whatever went wrong in it or left it."""

    def __init__(self, page, file: Path) -> None:
        self.page, self.problems = page, []
        page.on("console", lambda line: self.problems.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda sent: LOCAL.match(sent.url) or self.problems.append(f"request of {sent.url}"))
        page.goto(file.as_uri())
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("main[aria-busy=false]")

    def press(self, key: str) -> None:
        self.page.locator("#step").press(key)
        self.ready()

    def choose(self, metric: str) -> None:
        self.page.select_option("#metric", metric)
        self.ready()

    def all(self, selector: str, each: str) -> list[Any]:
        return self.page.eval_on_selector_all(selector, f"all => all.map({each})")

    def panels(self) -> list[str]:
        return self.all(".panel", "panel => panel.id")

    def traces(self, panel: str) -> list[dict[str, Any]]:
        return self.page.evaluate("name => document.getElementById(`${name}-plot`).data", panel)

    def cursors(self, panel: str) -> set[float]:
        shapes = self.page.evaluate("name => document.getElementById(`${name}-plot`).layout.shapes", panel)
        return {shape["x0"] for shape in shapes if shape.get("name") == "cursor"}

    def title(self, panel: str) -> str:
        return self.page.inner_text(f"#{panel}-title")


@pytest.fixture
def visit(browser, page_file) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(120_000)  # on a busy machine
    visited = Visit(context.new_page(), page_file)
    yield visited
    context.close()
    assert visited.problems == []


def cells(folder: Path, step: int, metric: str = PRIMARY_METRIC) -> pd.DataFrame:
    """The primary rows of a step, read from the table, indexed by sublayer, scope and family."""
    rows = primary_rows(pd.read_parquet(folder / "effects.parquet"), metric)
    return rows[rows["step"] == step].set_index(ROUTE).sort_index()


def values(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """What is drawn of rows: strengths, or harm in the metric's own unit; with ends, lower first."""
    if metric.startswith("logit_diff"):
        return rows[["strength", "strength_low", "strength_high"]].set_axis(["value", "low", "high"], axis=1)
    sign = 1 if metric in ("nll", "kl") else -1
    found = sign * rows[["effect", "ci_low", "ci_high"]].set_axis(["value", "low", "high"], axis=1)
    return found if sign > 0 else found.rename(columns={"low": "high", "high": "low"})


def drawn_at(numbers: Any, metric: str) -> np.ndarray:
    """The position of a value on its scale, from its definition: inverse hyperbolic sine, one at the limit."""
    limit = 10.0 if metric in ("nll", "kl") else 1.0
    return np.arcsinh(np.array(numbers, dtype=float) / 0.01) / np.arcsinh(limit / 0.01)


@pytest.mark.parametrize("metric", [PRIMARY_METRIC, "nll", "accuracy"])
def test_slider_and_metric_move_every_panel(visit, runs, metric):
    visit.choose(metric)
    seen = []
    for key, step in zip(("Home", "ArrowRight", "End"), STEPS, strict=True):
        visit.press(key)
        assert visit.page.inner_text("#step-label") == str(step)
        assert visit.page.get_attribute("#step", "aria-valuetext") == f"step {step}"
        for panel in visit.panels():  # the last run was probed once
            assert f"step {5 if panel == 'maps-1' else step}" in visit.title(panel)
        assert ("NOT LEARNED" in visit.title("maps-0")) == (step < 5)
        seen.append({panel: json.dumps([visit.traces(panel), [*visit.cursors(panel)]]) for panel in visit.panels()})
        folder = runs[0] / "probe" if step < 5 else runs[0] / "probe" / "final"
        check_heat_maps(visit.traces("maps-0"), cells(folder, step, metric), metric)
        check_scatter(
            visit.traces("scatter"), [cells(folder, step, metric), cells(runs[1] / "probe", 5, metric)], metric
        )
        assert visit.cursors("emergence-0") == visit.cursors("mass-0") == {step}
    check_curves(
        visit.traces("emergence-0"), pd.concat([cells(runs[0] / "probe", step, metric) for step in STEPS]), metric
    )
    assert set(seen[0]) == {"emergence-0", "mass-0", "maps-0", "maps-1", "scatter"}
    for before, after in pairwise(seen):
        same = {panel for panel in before if before[panel] == after[panel]}
        assert same - {"scatter"} == {"maps-1"}  # without strengths at both, the scatter says so twice


def check_heat_maps(traces: list[dict[str, Any]], expected: pd.DataFrame, metric: str) -> None:
    """Maps in the order regions and layers, of mass and value."""
    maps = [trace for trace in traces if trace["type"] == "heatmap"]
    blocks = ["early", "middle", "late", "all"], [f"layer:{i}" for i in range(4)]
    for heat_map, (block, value) in zip(maps, itertools.product(blocks, ("mass", "value")), strict=True):
        wanted = [(s, scope, family) for s in ("self_attn", "mlp") for scope in block for family in FAMILIES]
        rows = expected.reindex(wanted)
        numbers = rows["mass"] if value == "mass" else drawn_at(values(rows, metric)["value"], metric)
        numbers = np.where(rows["applicable"], numbers, np.nan).reshape(8, 4)
        np.testing.assert_allclose(np.array(heat_map["z"], dtype=float), numbers, rtol=1e-4, atol=1e-5)


def check_scatter(traces: list[dict[str, Any]], probes: list[pd.DataFrame], metric: str) -> None:
    marks = [trace for trace in traces if "error_y" in trace]
    parts = [
        np.concatenate([np.ravel(get(trace)) for trace in marks] or [np.array([])])
        for get in (
            lambda t: t["x"],
            lambda t: t["y"],
            lambda t: np.subtract(t["y"], t["error_y"]["arrayminus"]),
            lambda t: np.add(t["y"], t["error_y"]["array"]),
        )
    ]
    rows = pd.concat([wide(probe.reset_index()) for probe in probes])
    rows = rows[rows["sublayer"].isin(READ_SUBLAYERS) & rows["applicable"]]
    wanted = values(rows, metric)
    wanted = wanted.apply(lambda column: drawn_at(column.clip(-1e9, 1e9), metric)).assign(mass=rows["mass"])
    wanted = wanted[wanted["value"].notna()][["mass", "value", "low", "high"]].to_numpy()
    np.testing.assert_allclose(np.sort(np.stack(parts, 1), axis=0), np.sort(wanted, axis=0), rtol=1e-3, atol=1e-4)


def check_curves(traces: list[dict[str, Any]], expected: pd.DataFrame, metric: str) -> None:
    """The families' lines hold every value; where there is none, a lighter one holds harm / final margin."""
    lines = [trace for trace in traces if trace["name"] in FAMILIES and trace["mode"] == "lines+markers"]
    found = sorted(y for line in lines for y in line["y"] if y is not None)
    rows = expected.reset_index()
    rows = rows[rows["scope"].isin(REGIONS) & rows["sublayer"].isin(READ_SUBLAYERS) & rows["applicable"]]
    numbers = values(rows, metric)["value"]
    assert found == pytest.approx(sorted(drawn_at(numbers.dropna(), metric)), rel=1e-4, abs=1e-5)
    dim = [trace for trace in traces if trace.get("opacity") == 0.5]
    if not metric.startswith("logit_diff"):
        assert not dim
        return
    lacks = rows[numbers.isna()]
    assert len(lacks)
    final = rows.loc[rows["step"] == STEPS[-1], "margin"].iloc[0]
    shares = drawn_at(-lacks["effect"] / final, metric)
    assert {round(x, 3) for x in shares} <= {round(y, 3) for trace in dim for y in trace["y"] if y is not None}


def test_saturated_metrics_are_said_to_be(visit):
    assert not visit.page.is_visible("#saturated")
    visit.choose("nll")
    is_saturated = "saturated" in visit.page.inner_text("#saturated")
    assert is_saturated == visit.page.is_visible("#saturated")


def test_hover_shows_the_numbers_of_the_table(visit, runs):
    visit.press("Home")
    visit.press("ArrowRight")
    visit.page.locator("#maps-0-plot").scroll_into_view_if_needed()
    # The map of strengths by layer is the fourth: layer 2 of attention, current, is its third row, second column.
    box = visit.page.evaluate(
        """() => { const plot = document.getElementById('maps-0-plot'), b = plot.getBoundingClientRect();
        const { xaxis4: x, yaxis4: y } = plot._fullLayout;
        return [b.x + x._offset + x.d2p('current'), b.y + y._offset + y.d2p('attention 2')]; }"""
    )
    visit.page.mouse.move(*box)
    visit.page.wait_for_selector("#maps-0-plot .hoverlayer text")
    text = visit.page.text_content("#maps-0-plot .hoverlayer").replace("−", "-")
    row = cells(runs[0] / "probe", 2).loc["self_attn", "layer:2", "current"]
    assert row["applicable"]
    assert f"harm {-row['effect']:+.4f} nats [{-row['ci_high']:+.4f}, {-row['ci_low']:+.4f}]" in text
    assert f"mass {row['mass']:.4f}" in text
    if row["no_strength"]:
        assert f"no strength: {row['no_strength']}" in text


def test_downloads_hold_the_numbers_of_the_tables(visit, runs, tmp_path):
    for button in visit.page.locator("button[data-table]").all():
        with visit.page.expect_download() as download:
            button.click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
    assert {path.stem for path in tmp_path.iterdir()} == {"numbers-0", "numbers-1", "motifs"}
    keys = ["step", *ROUTE, "kind", "metric"]
    table = pd.read_parquet(runs[0] / "probe" / "effects.parquet")
    parts = [primary_rows(table, metric, kind) for metric in METRICS for kind in (MASK, MASK_INTEGRATED)]
    effects = pd.concat(parts).set_index(keys)
    numbers, motifs = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("numbers-0", "motifs"))
    probed = numbers[numbers["stage"] == IN_TRAINING]
    assert len(probed) == len(effects)
    assert set(probed["metric"]) == set(METRICS)
    wanted = effects.loc[pd.MultiIndex.from_frame(probed[keys])]
    for name in ("mass", "p_adjusted", "detectable"):
        np.testing.assert_allclose(probed[name], wanted[name], rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(probed["harm"].abs(), wanted["effect"].abs(), rtol=1e-4, atol=1e-9)
    assert (probed["status"].fillna("").str.startswith("not app") == ~wanted["applicable"].to_numpy()).all()
    assert set(motifs["run"]) == {"trained (cumulative, seed 0)"}
    assert set(motifs["n_probes"]) == {len(STEPS)}


def test_the_page_opens_on_the_claims(visit, loaded):
    assert visit.all("main > section", "section => section.querySelector('h2').textContent")[0] == "Claims"
    text = visit.page.text_content(".claims").replace("\N{NO-BREAK SPACE}", " ")
    for run in loaded:
        for claim in run.probed.claims:
            assert all(statement in text for statement in claim.statements + claim.details)
            assert claim.verdict in text


def test_the_page_can_be_read_by_keyboard_and_screen_reader(visit):
    for selector, is_said in {
        "input": "e => e.labels.length === 1",
        "table": "e => !!e.caption?.textContent",
        "button": "e => !!e.textContent",
        "select": "e => e.labels.length === 1",
        ".plot": "e => e.role === 'img' && !!document.getElementById(e.getAttribute('aria-labelledby'))?.textContent",
        "html": "e => e.lang === 'en' && e.querySelectorAll('main').length === 1",
    }.items():
        assert set(visit.all(selector, is_said)) == {True}
    ids, levels = visit.all("[id]", "e => e.id"), visit.all("h1, h2, h3", "e => Number(e.tagName[1])")
    assert len(ids) == len(set(ids))
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    visit.page.locator("#step").focus()
    assert visit.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_a_phone_has_no_horizontal_scroll(visit):
    visit.page.set_viewport_size({"width": 375, "height": 700})
    visit.page.reload()
    visit.ready()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375
    assert max(visit.all(".plot svg.main-svg", "svg => svg.getBoundingClientRect().width")) <= 375


def test_dark_light_and_print_have_colours_of_their_own(visit):
    def drawn() -> tuple[str, str, str]:
        visit.page.wait_for_timeout(100)  # until the page is told of the change
        visit.ready()
        paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = visit.page.evaluate("document.getElementById('emergence-0-plot')._fullLayout.font.color")
        return paper, ink, "".join(visit.all(".js-plotly-plot", "plot => JSON.stringify(plot.data)"))

    visit.choose("nll")
    visit.page.emulate_media(color_scheme="light")
    light = drawn()
    visit.page.emulate_media(color_scheme="dark")
    dark = drawn()
    assert light[0] == "rgb(255, 255, 255)"
    assert all(one != other for one, other in zip(dark, light, strict=True))
    for (*_, traces), used, unused in ((light, FAMILY_COLORS, DARK_COLORS), (dark, DARK_COLORS, FAMILY_COLORS)):
        assert (used["older"] in traces, unused["older"] in traces) == (True, False)
    visit.page.emulate_media(color_scheme="dark", media="print")
    assert drawn() == light
    assert not visit.page.is_visible("#step")
    assert "step 5" in visit.title("scatter")  # which step it is, is still said


def test_exact_and_integrated_are_never_in_one_curve(loaded):
    """Curves are exact where two probes are, else estimates alone; and probes that have only estimates say so."""
    view = loaded[0].view()
    assert set(view.curves["kind"]) == {MASK}
    cells = view.cells
    is_exact, last = cells["kind"] == MASK, cells["step"] == STEPS[-1]
    for kept in (~is_exact | last, ~is_exact):  # mode integrated, whose last probe is exact; no exact effects at all
        of_estimates = View(view.run, view.name)
        of_estimates.__dict__["cells"] = cells[kept]
        assert set(of_estimates.curves["kind"]) == {MASK_INTEGRATED}
        assert of_estimates.curves["step"].nunique() == len(STEPS)
        assert "estimated" in maps(of_estimates, 0).titles[0]


def test_report_writes_the_page(runs, tmp_path, capsys):
    """Where it is told to, of a bounded size; it fetches nothing, names cannot break it, one seed twice is said."""
    twice = [Path(shutil.copytree(runs[1], tmp_path / name)) for name in ("a&b <i>", "c")]
    main(["report", *map(str, twice)])
    printed, page = capsys.readouterr().out, (twice[0] / "report.html").read_text(encoding="utf-8")
    assert f"  {twice[0] / 'report.html'}\n" in printed
    assert len(page.encode()) < 8e6
    assert " src=" not in page.split("<script>")[0]
    assert [text in page for text in ("a&amp;b &lt;i&gt;", "a&b <i>", "<link")] == [True, False, False]
    line = "wrapped: seed 0 is given 2 times, so that its runs are not put together as seeds"
    assert (line in printed, line in page) == (True, True)
    main(["report", *map(str, twice), "--page", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.slow
def test_report_on_the_folder_of_results(runs, tmp_path):
    """The folder says all that its run does; elsewhere, the size of training examples is not known."""
    run = Path(shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("final")))
    copy = Path(shutil.copytree(run / "probe", tmp_path / "copy"))
    main(["report", str(run / "probe")])
    told = (run / "probe" / TEXT).read_text(encoding="utf-8")
    assert "When motifs emerge: cumulative (seed 0), 3 exact probes at steps 0 to 5" in told
    assert {path.stem for path in (run / "probe/figures").iterdir()} >= {"emergence", "heat_maps_peak"}
    of_run, of_folder, of_copy = (load_page_runs([folder])[0].view() for folder in (run, run / "probe", copy))
    pd.testing.assert_frame_equal(of_run.cells, of_folder.cells)
    pd.testing.assert_series_equal(of_run.logged("size"), of_folder.logged("size"))
    assert of_copy.logged("size").empty


def test_a_run_killed_in_training_that_was_probed_without_regions_has_a_report(make_model, tmp_path):
    settings = ProbeSettings(num_sequences=8, num_resamples=20, scopes=("layer:0", "all"))
    about = {"run": "run", "condition": "cumulative", "seed": 0}
    for step in (0, 3):
        probe_model(make_model(), MQAR(num_pairs=4, vocab_size=32), settings, tmp_path / "probe", step=step, **about)
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "figures/emergence.png").exists()  # of all layers


@pytest.mark.parametrize("settings", [{"scopes": ("all",)}, {"mode": "integrated"}, {"scopes": ("layer:1",)}])
def test_a_probe_of_few_cells_has_a_page(make_model, tmp_path, settings):
    model, task = make_model(attnres_source="block_sum"), MQAR(num_pairs=4, vocab_size=32)
    settings = ProbeSettings(num_sequences=8, num_resamples=50, **settings)
    probe_model(model, task, settings, tmp_path, run="run", step=3, condition="block_sum", seed=0)
    assert "FEW SEQUENCES" in build_page(load_page_runs([tmp_path]))


def test_a_run_without_the_primary_intervention_is_named_and_left_out(make_model, runs, tmp_path, capsys):
    run = export(make_model(), tmp_path / "zeroed", "cumulative")
    main(["run", str(run), "--output", str(run / "probe"), *QUICK, "--kinds", "[zero]", "--scopes", "[all]"])
    main(["report", str(run)])
    assert "no page: no run holds effects of mask_renormalise" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert "zeroed (cumulative, seed 3) is not shown" in build_page(load_page_runs([run, runs[1]]))


def test_report_on_a_broken_directory_is_one_line_and_writes_nothing(runs, make_vanilla, tmp_path, capsys):
    vanilla = export(make_vanilla(), tmp_path / "vanilla", "vanilla")
    cases = [
        (tmp_path / "nowhere", "is not a directory: expected a run directory"),
        (tmp_path / "empty", "holds no probe results: it is empty"),
        (tmp_path / "unfinished", "the attnres-probe command that began it, given again, goes on"),
        (tmp_path / "unprobed", f"was never probed; attnres-probe run {tmp_path / 'unprobed'} --output"),
        (vanilla, f"a vanilla model, which has no routing; attnres-probe baseline {vanilla} --output"),
    ]
    (tmp_path / "empty").mkdir()
    of_attnres = '{"model_type": "qwen3_attnres"}'
    for file, text in (("unfinished/parts/sweep.json", "{}"), ("unprobed/hf/config.json", of_attnres)):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "foreign.parquet")
    foreign = (tmp_path / "foreign.parquet").read_bytes()
    for name, file, content, message in (
        ("torn effects", "effects.parquet", lambda old: old[:1000], "is torn or not a parquet file"),
        ("torn clusters", "clusters.parquet", lambda old: old[:-50], "is torn or not a parquet file"),
        ("foreign table", "effects.parquet", lambda _: foreign, "is not a table of this version: it lacks run"),
        ("torn summary", "summary.json", lambda _: b'{"run": "x", ', "is not a readable JSON file"),
        ("foreign summary", "summary.json", lambda _: b'{"run": "x"}', "is not a summary of this version: it lacks"),
        ("no clusters", "clusters.parquet", None, "is incomplete: it has effects.parquet but no clusters.parquet"),
        ("no summary", "summary.json", None, "is incomplete: it has effects.parquet but no summary.json"),
        ("no effects", "effects.parquet", None, "has other files of a probe, but no effects.parquet"),
    ):
        path = Path(shutil.copytree(runs[1], tmp_path / name)) / "probe" / file
        (path.parent / MANIFEST).unlink()  # a run of before there were digests
        path.unlink() if content is None else path.write_bytes(content(path.read_bytes()))
        cases.append((path.parent.parent, message))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    commands = [([str(folder)], message) for folder, message in cases]
    for arguments, message in [*commands, ([str(runs[1]), "--page", str(tmp_path)], "is a folder: name a file")]:
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize(("colors", "paper"), [(FAMILY_COLORS, "#ffffff"), (DARK_COLORS, "#1b1c1f")])
def test_families_can_be_seen_on_their_paper(colors, paper):
    """WCAG 2.2, 1.4.11: graphics have a contrast of at least 3."""
    for color in colors.values():
        low, high = sorted((luminance(color), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3
