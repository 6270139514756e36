"""The page of `attnres-probe report`: what it shows in a real browser is what the tables hold."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attnres.tasks import MQAR
from probe.cli import main
from probe.report.page.build import build_page, write_page
from probe.report.page.curves import accuracy_table
from probe.report.page.data import IN_TRAINING, PageRun, load_page_runs
from probe.report.page.style import DARK_COLORS
from probe.runner import probe_model
from probe.settings import ProbeSettings
from probe.vocabulary import FAMILY_COLORS, MASK, MASK_FIRST_ORDER, READ_SUBLAYERS, by_layer, primary_rows, wide
from tests.probe.test_cli import QUICK, export

STEPS = (0, 2, 5)
READY = "main[aria-busy=false]"


@pytest.fixture(scope="module")
def runs(trained_model, make_model, tmp_path_factory) -> list[Path]:
    """A model probed at three steps of a training of sorts and once more at its end, and another probed once."""
    folder = tmp_path_factory.mktemp("runs")
    last, trained, other = copy.deepcopy(trained_model()), folder / "trained", folder / "other"
    settings = ProbeSettings(num_sequences=12, num_resamples=40, mode="both")
    start = make_model(seed=3, vocab_size=24, hidden_size=32, intermediate_size=48, head_dim=16).state_dict()
    end = {name: tensor.clone() for name, tensor in last.state_dict().items()}
    about: dict[str, Any] = {"condition": "cumulative", "seed": 0}
    for step in STEPS:
        share = step / STEPS[-1]
        last.load_state_dict({name: mixed(start[name], end[name], share) for name in end})
        probe_model(last, trained_model.task, settings, trained / "probe", run="trained", step=step, **about)
    more = ProbeSettings(num_sequences=20, num_resamples=40)
    probe_model(last, trained_model.task, more, trained / "probe" / "final", run="trained", step=5, **about)
    about = {"condition": "wrapped", "seed": 0}
    probe_model(last, trained_model.task, more, other / "probe", run="other", step=5, **about)
    (trained / "metrics.csv").write_text("step,val/accuracy,train/pairs\n0,,1\n1,0.1,\n3,,3\n4,0.6,\n")
    return [trained, other]


def mixed(start, end, share: float):
    return start + share * (end - start) if start.is_floating_point() else end


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
        page.on("request", lambda request: self._request(request.url))
        page.goto(file.as_uri())
        self.ready()

    def _request(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.problems.append(f"request of {url}")

    def ready(self) -> None:
        self.page.wait_for_selector(READY)

    def press(self, key: str) -> None:
        self.page.locator("#step").press(key)
        self.ready()

    def all(self, selector: str, each: str) -> list[Any]:
        return self.page.eval_on_selector_all(selector, f"all => all.map({each})")

    def panels(self) -> list[str]:
        return self.all("section.panel", "panel => panel.id")

    def traces(self, panel: str) -> list[dict[str, Any]]:
        return self.page.evaluate("name => document.getElementById(`${name}-plot`).data", panel)

    def title(self, panel: str) -> str:
        return self.page.inner_text(f"#{panel}-title")


@contextmanager
def visiting(browser, file: Path, width: int) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
    visited = Visit(context.new_page(), file)
    yield visited
    context.close()
    assert visited.problems == []


@pytest.fixture
def visit(browser, page_file) -> Iterator[Visit]:
    with visiting(browser, page_file, 1280) as visited:
        yield visited


def cells(folder: Path, step: int) -> pd.DataFrame:
    """The primary rows of a step, read from the table, indexed by sublayer, scope and family."""
    rows = primary_rows(pd.read_parquet(folder / "effects.parquet"))
    return rows[rows["step"] == step].set_index(["sublayer", "scope", "family"]).sort_index()


def wide_cells(expected: pd.DataFrame) -> pd.DataFrame:
    rows = wide(expected.reset_index())
    return rows[rows["applicable"] & rows["sublayer"].isin(READ_SUBLAYERS)]


def test_the_slider_moves_every_panel_by_keyboard(visit, runs):
    seen = []
    for key, step in (("Home", 0), ("ArrowRight", 2), ("End", 5)):
        visit.press(key)
        assert visit.page.inner_text("#step-label") == str(step)
        assert visit.page.get_attribute("#step", "aria-valuetext") == f"step {step}"
        of_one_probe = {f"{name}-1" for name in ("maps", "scatter")}  # the run that was probed once
        for panel in visit.panels():
            assert f"step {5 if panel in of_one_probe else step}" in visit.title(panel)
        seen.append({panel: json.dumps(visit.traces(panel)) for panel in visit.panels()})
        folder = runs[0] / "probe" if step < 5 else runs[0] / "probe" / "final"
        check_heat_maps(visit.traces("maps-0"), cells(folder, step))
        check_scatter(visit.traces("scatter-0"), cells(folder, step))
        check_cursor(visit.traces("effect-0"), cells(runs[0] / "probe", step), step)
    assert set(seen[0]) == {
        *("accuracy", "comparison", "effect-0", "mass-0", "maps-0", "scatter-0", "maps-1", "scatter-1")
    }
    for before, after in pairwise(seen):
        assert {panel for panel in before if before[panel] == after[panel]} == of_one_probe


def check_heat_maps(traces: list[dict[str, Any]], expected: pd.DataFrame) -> None:
    """Maps in the order regions and layers, of attention and MLP reads, of mass and effect."""
    maps = [trace for trace in traces if trace["type"] == "heatmap"]
    scopes = [["early", "middle", "late", "all"], [f"layer:{i}" for i in range(4)]]
    families = ("embedding", "current", "prev_completed", "older")
    places = [(block, s, v) for block in scopes for s in ("self_attn", "mlp") for v in ("mass", "effect")]
    assert len(maps) == len(places)
    for trace, (block, sublayer, value) in zip(maps, places, strict=True):
        for line, scope in zip(trace["z"], block, strict=True):
            for number, family in zip(line, families, strict=True):
                row = expected.loc[sublayer, scope, family]
                assert (number is None) == (not row["applicable"])
                if number is not None:
                    assert number == pytest.approx(row[value], rel=1e-5, abs=1e-12)


def check_scatter(traces: list[dict[str, Any]], expected: pd.DataFrame) -> None:
    found = [
        [x, y, y - down, y + up]
        for trace in traces
        for x, y, down, up in zip(
            trace["x"], trace["y"], trace["error_y"]["arrayminus"], trace["error_y"]["array"], strict=True
        )
    ]
    wanted = wide_cells(expected)[["mass", "effect", "ci_low", "ci_high"]].to_numpy()
    np.testing.assert_allclose(np.sort(found, axis=0), np.sort(wanted, axis=0), rtol=1e-4, atol=1e-7)


def check_cursor(traces: list[dict[str, Any]], expected: pd.DataFrame, step: int) -> None:
    """The marks at the shown step are that step's effects of wide scopes."""
    marks = [y for trace in traces if trace["name"] == "shown" for y in trace["y"]]
    assert {x for trace in traces if trace["name"].startswith("shown") for x in trace["x"]} == {step}
    assert sorted(marks) == pytest.approx(sorted(wide_cells(expected)["effect"]), rel=1e-5, abs=1e-12)


def test_hover_shows_the_number_of_the_table(visit, runs):
    visit.press("Home")
    visit.press("ArrowRight")
    visit.page.locator("#maps-0-plot").scroll_into_view_if_needed()
    # The map of effects in attention reads by layer is the sixth: layer 2, current, is its second column, third row.
    box = visit.page.evaluate(
        """() => { const plot = document.getElementById('maps-0-plot');
        const f = plot._fullLayout, b = plot.getBoundingClientRect();
        return [b.x + f.xaxis6._offset + f.xaxis6.d2p('current'), b.y + f.yaxis6._offset + f.yaxis6.d2p('layer 2')]; }"""
    )
    visit.page.mouse.move(*box)
    visit.page.wait_for_selector("#maps-0-plot .hoverlayer text")
    text = visit.page.text_content("#maps-0-plot .hoverlayer")
    row = cells(runs[0] / "probe", 2).loc["self_attn", "layer:2", "current"]
    assert row["applicable"]
    assert f"{row['effect']:+.4f}".replace("-", "−") in text
    assert f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]".replace("-", "−") in text
    assert f"mass {row['mass']:.4f}" in text


def test_downloads_hold_the_numbers_of_the_tables(visit, runs, tmp_path):
    for button in visit.page.locator("button[data-file]").all():
        with visit.page.expect_download() as download:
            button.click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {*visit.panels(), "motifs"}
    keys = ["step", "sublayer", "scope", "family", "kind"]
    table = pd.read_parquet(runs[0] / "probe" / "effects.parquet")
    effects = pd.concat([primary_rows(table, kind=kind) for kind in (MASK, MASK_FIRST_ORDER)]).set_index(keys)
    curves = pd.read_csv(tmp_path / "effect-0.csv")
    assert set(curves["kind"]) == {MASK}
    assert set(curves["step"]) == set(STEPS)
    assert set(curves["scope"]) == {"early", "middle", "late", "all"}
    for name in ("mass", "effect", "ci_low", "ci_high", "p_adjusted"):
        wanted = effects.loc[pd.MultiIndex.from_frame(curves[keys]), name]
        np.testing.assert_allclose(curves[name], wanted, rtol=1e-5, atol=1e-12)
    accuracy = pd.read_csv(tmp_path / "accuracy.csv")
    clean = table[table["metric"] == "accuracy"].groupby("step")["clean"].first()
    probed = accuracy[accuracy["stage"] == IN_TRAINING].set_index("step")["accuracy"]
    assert probed.to_dict() == pytest.approx(clean.to_dict(), rel=1e-5)
    motifs = pd.read_csv(tmp_path / "motifs.csv")
    assert set(motifs["run"]) == {"trained (cumulative, seed 0)"}
    assert set(motifs["n_probes"]) == {len(STEPS)}


def test_numbers_at_the_shown_step_are_a_table(visit, runs):
    visit.page.locator("#scatter-0 summary").press("Enter")
    visit.press("Home")
    rows = visit.all("#scatter-0 tbody tr", "row => [...row.cells].map(cell => cell.textContent)")
    head = visit.all("#scatter-0 thead th", "th => th.textContent")
    shown = pd.DataFrame(rows, columns=head)
    assert set(shown["step"]) == {"0"}
    expected = cells(runs[0] / "probe", 0)
    for row in shown[shown["applicable"] == "true"].to_dict("records"):
        number = expected.loc[row["sublayer"], row["scope"], row["family"]]["effect"]
        assert float(row["effect"]) == pytest.approx(number, rel=1e-5)


def test_text_follows_the_slider_and_says_what_is_not_learned(visit, loaded):
    run = loaded[0]
    learned = [bool(shown.rows["task_learned"].iloc[0]) for shown in run.shown]
    assert not learned[0]
    for key, shown, is_learned in zip(("Home", "ArrowRight", "ArrowRight"), run.shown, learned, strict=True):
        visit.press(key)
        line = visit.page.inner_text("table tbody tr >> nth=0")
        assert ("NOT LEARNED" in line) == ("NOT LEARNED" in visit.title("maps-0")) == (not is_learned)
        assert f"{run.accuracy(shown)['accuracy']:.4f}" in line


def test_play_goes_through_the_steps_and_stops_at_the_last(visit):
    visit.page.click("#play")
    assert visit.page.inner_text("#step-label") == "0"
    visit.page.wait_for_selector("#step-label:text-is('5')")
    visit.page.wait_for_selector("#play:text-is('Play')")
    visit.ready()


def test_the_page_can_be_read_by_keyboard_and_screen_reader(visit):
    evaluate = visit.page.evaluate
    visit.page.locator("#maps-0 summary").press("Enter")
    assert evaluate("[...document.querySelectorAll('input')].every(i => i.labels.length === 1)")
    assert evaluate("[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent)")
    assert evaluate("[...document.querySelectorAll('button')].every(b => b.ariaLabel || b.textContent)")
    assert evaluate("[...document.querySelectorAll('.plot')].every(p => p.role === 'img' && p.ariaLabel)")
    assert evaluate("document.querySelectorAll('main').length === 1 && document.documentElement.lang === 'en'")
    ids = evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    visit.page.locator("#step").focus()
    assert evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_a_phone_has_no_horizontal_scroll(browser, page_file):
    with visiting(browser, page_file, 375) as visit:
        visit.page.locator("#maps-0 summary").press("Enter")  # a wide table scrolls in its own box
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 375
        assert max(visit.all(".plot svg.main-svg", "svg => svg.getBoundingClientRect().width")) <= 375


def test_dark_light_and_print_have_colours_of_their_own(visit):
    def colours() -> tuple[str, str]:
        visit.page.wait_for_timeout(100)  # until the page is told of the change
        visit.ready()
        return tuple(
            visit.page.evaluate(
                "[getComputedStyle(document.body).backgroundColor, "
                "document.getElementById('accuracy-plot')._fullLayout.font.color]"
            )
        )

    def drawn() -> str:
        plots = "[...document.querySelectorAll('.js-plotly-plot')]"
        return visit.page.evaluate(f"{plots}.map(plot => JSON.stringify(plot.data)).join()")

    visit.page.emulate_media(color_scheme="light")
    light, of_light = colours(), drawn()
    visit.page.emulate_media(color_scheme="dark")
    dark, of_dark = colours(), drawn()
    plum, pink = FAMILY_COLORS["older"], DARK_COLORS["older"]
    assert (plum in of_light, pink in of_light) == (True, False)
    assert (plum in of_dark, pink in of_dark) == (False, True)
    assert light[0] == "rgb(255, 255, 255)"
    assert all(of_dark != of_light for of_dark, of_light in zip(dark, light, strict=True))
    visit.page.emulate_media(color_scheme="dark", media="print")
    assert colours() == light
    assert not visit.page.is_visible("#step")
    assert "step 5" in visit.title("accuracy")  # which step it is, is still said


def test_exact_and_first_order_are_never_in_one_curve(loaded):
    """A probe whose layers are estimates: regions stay exact, layers are labelled, and curves are of one kind."""
    run = loaded[0]
    is_exact = run.cells["kind"] == MASK
    estimated = replace(run, cells=run.cells.drop(by_layer(run.cells[is_exact]).index))
    first = estimated.shown[0]
    assert set(first.wide["kind"]) == set(estimated.through_training["kind"]) == {MASK}
    assert set(first.layers["kind"]) == {MASK_FIRST_ORDER}
    assert "layers to first order, not ablated" in build_page([estimated])
    at_the_end = (run.cells["stage"] != IN_TRAINING) | (run.cells["step"] == STEPS[-1])
    for kept in (~is_exact | at_the_end, ~is_exact):  # mode first_order; no exact effects at all
        of_estimates = replace(run, cells=run.cells[kept]).through_training
        assert set(of_estimates["kind"]) == {MASK_FIRST_ORDER}
        assert of_estimates["step"].nunique() == len(STEPS)


def test_names_of_directories_cannot_break_the_page(runs, tmp_path):
    page = build_page(load_page_runs([Path(shutil.copytree(runs[1], tmp_path / "a&b <i>"))]))
    assert "a&b <i>" not in page
    assert "a&amp;b &lt;i&gt;" in page


def test_the_page_is_of_a_bounded_size_and_fetches_nothing(page_file):
    text = page_file.read_text(encoding="utf-8")
    assert len(text.encode()) < 8e6
    assert "<link" not in text
    assert " src=" not in text.split("<script>")[0]
    assert not page_file.with_name("report.html.part").exists()


def test_report_writes_the_page(runs, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(runs[1], mine)
    main(["report", str(mine)])
    assert f"  {mine / 'report.html'}\n" in capsys.readouterr().out
    first = (mine / "report.html").read_text(encoding="utf-8")
    main(["report", str(mine), "--page", str(tmp_path / "new" / "page.html")])
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == first


def test_report_on_the_folder_of_results(runs, tmp_path, capsys):
    """The folder says all that its run does; elsewhere, pairs in training are not known."""
    run = Path(shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("final")))
    copy = Path(shutil.copytree(run / "probe", tmp_path / "copy"))
    main(["report", str(run / "probe")])
    assert "When motifs emerge: cumulative (seed 0), 3 exact probes at steps 0 to 5" in capsys.readouterr().out
    assert {path.stem for path in (run / "probe/figures").iterdir()} >= {"emergence", "motifs", "heat_maps_peak"}
    assert (run / "probe/report.html").stat().st_size > 1e6
    of_run, of_folder, of_copy = (accuracy_table(load_page_runs([folder])) for folder in (run, run / "probe", copy))
    columns = ["step", "accuracy", "low", "high", "pairs"]
    pd.testing.assert_frame_equal(of_run[columns], of_folder[columns])
    assert of_run.query("split == 'probe'").set_index("step")["pairs"].to_dict() == {0: 1, 2: 1, 5: 3}
    assert of_copy["pairs"].isna().all()


def test_one_seed_twice_is_said(runs, tmp_path, capsys):
    main(["report", *(str(shutil.copytree(runs[1], tmp_path / name)) for name in ("a", "b"))])
    line = "wrapped: seed 0 is given 2 times, so that its runs are not put together as seeds"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "a/report.html").read_text(encoding="utf-8")


def test_a_run_killed_in_training_that_was_probed_without_regions_has_a_report(make_model, tmp_path):
    model, task = make_model(), MQAR(num_pairs=4, vocab_size=32)
    settings = ProbeSettings(num_sequences=8, num_resamples=20, scopes=("layer:0", "all"))
    for step in (0, 3):
        probe_model(model, task, settings, tmp_path / "probe", run="run", step=step, condition="cumulative", seed=0)
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.html").exists()
    assert not (tmp_path / "figures/motifs.png").exists()


@pytest.mark.parametrize("options", [["--scopes", "all"], ["--first-order-only"], ["--scopes", "layer:1"]])
def test_a_probe_of_few_cells_has_a_page(make_model, tmp_path, options):
    run = export(make_model(attnres_source="block_sum"), tmp_path / "run", "block_sum")
    main(["run", str(run), "--output", str(run / "probe"), *QUICK, *options])
    main(["report", str(run)])
    assert "Few sequences" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_without_the_primary_intervention_is_named_and_left_out(make_model, runs, tmp_path, capsys):
    run = export(make_model(), tmp_path / "zeroed", "cumulative")
    main(["run", str(run), "--output", str(run / "probe"), *QUICK, "--kinds", "zero", "--scopes", "all"])
    main(["report", str(run)])
    assert "no page: no run holds effects of mask_renormalise" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert "zeroed (cumulative, seed 3) is not shown" in build_page(load_page_runs([run, runs[1]]))


def broken_directories(runs: list[Path], vanilla: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Name -> directory, and what its error says."""
    cases = {
        "missing": (tmp_path / "nowhere", "is not a directory: expected a run directory"),
        "empty": (tmp_path / "empty", "holds no probe results: it is empty"),
        "unfinished": (tmp_path / "unfinished", "the attnres-probe command that began it, given again, goes on"),
        "unprobed": (tmp_path / "unprobed", f"was never probed; attnres-probe run {tmp_path / 'unprobed'} --output"),
        "vanilla": (vanilla, f"a vanilla model, which has no routing; attnres-probe baseline {vanilla} --output"),
    }
    (tmp_path / "empty").mkdir()
    for file, text in (
        ("unfinished/parts/sweep.json", "{}"),
        ("unprobed/hf/config.json", '{"model_type": "qwen3_attnres"}'),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    foreign = tmp_path / "foreign.parquet"
    pd.DataFrame({"a": [1]}).to_parquet(foreign)
    for name, file, content, message in (
        ("torn effects", "effects.parquet", lambda old: old[:1000], "is torn or not a parquet file"),
        ("torn clusters", "clusters.parquet", lambda old: old[:-50], "is torn or not a parquet file"),
        (
            "foreign table",
            "effects.parquet",
            lambda _: foreign.read_bytes(),
            "is not a table of this version: it lacks run",
        ),
        ("torn summary", "summary.json", lambda _: b'{"run": "x", ', "is not a readable JSON file"),
        ("foreign summary", "summary.json", lambda _: b'{"run": "x"}', "is not a summary of this version: it lacks"),
        ("no clusters", "clusters.parquet", None, "is incomplete: it has effects.parquet but no clusters.parquet"),
        ("no summary", "summary.json", None, "is incomplete: it has effects.parquet but no summary.json"),
        ("no effects", "effects.parquet", None, "has other files of a probe, but no effects.parquet"),
    ):
        path = Path(shutil.copytree(runs[1], tmp_path / name)) / "probe" / file
        path.unlink() if content is None else path.write_bytes(content(path.read_bytes()))
        cases[name] = path.parent.parent, message
    return cases


def test_report_on_a_broken_directory_is_one_line_and_writes_nothing(runs, make_vanilla, tmp_path, capsys):
    vanilla = export(make_vanilla(), tmp_path / "vanilla", "vanilla")
    cases = broken_directories(runs, vanilla, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    commands = [([str(folder)], message) for folder, message in cases.values()]
    for arguments, message in [*commands, ([str(runs[1]), "--page", str(tmp_path)], "is a folder: name a file")]:
        with pytest.raises(SystemExit) as stop:
            main(["report", *arguments])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("colors", "paper"), [(FAMILY_COLORS, "#ffffff"), (DARK_COLORS, "#1b1c1f")])
def test_families_can_be_seen_on_their_paper(colors, paper):
    """WCAG 2.2, 1.4.11: graphics have a contrast of at least 3."""
    for color in colors.values():
        low, high = sorted((luminance(color), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3
