"""Which figures a run has, from real probes, and the numbers that they are drawn from."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from scipy import stats as scipy_stats

from attnres.tasks import MQAR
from probe.files import tables as storage
from probe.files.runs import load_run
from probe.report.figures import write
from probe.report.figures.cells import depth_cells
from probe.report.view import View
from probe.runner import probe_model
from probe.settings import ProbeSettings
from probe.vocabulary import READ_SUBLAYERS, REGIONS, by_layer


def probed(model, directory: Path, condition: str, seed: int, steps=(40,), **settings) -> Path:
    """A folder with the results of real probes at `steps`."""
    settings = ProbeSettings(num_sequences=8, num_resamples=40, positions=["all"], batch_size=8, **settings)
    for step in steps:
        task = MQAR(num_pairs=4, vocab_size=40, seed=3)
        about = {"run": directory.name, "condition": condition, "seed": seed}
        probe_model(model, task, settings, directory / "probe", step=step, **about)
    return directory


@pytest.fixture(scope="module")
def directories(make_model, tmp_path_factory) -> dict[str, Path]:
    """Real probes: through training, of block_sum with its final read, of the whole depth alone, and others."""
    root = tmp_path_factory.mktemp("probed")
    model, block_sum = make_model(), make_model(attnres_source="block_sum")
    trained = probed(model, root / "trained", "cumulative", 0, (0, 40), scopes=["all", *REGIONS], mode="both")
    return {
        "trained": trained,
        "block_sum": probed(block_sum, root / "block_sum", "block_sum", 0),
        "depth": probed(make_model(seed=1), root / "depth", "cumulative", 1, scopes=["all"]),
        "linear": probed(model, root / "linear", "cumulative", 2, mode="integrated"),
        "other": probed(model, root / "other", "cumulative", 3, kinds=["zero"], scopes=["all"]),
    }


def test_every_run_has_the_figures_of_what_was_probed(directories, monkeypatch):
    loaded = {name: load_run(directory) for name, directory in directories.items()}
    paths = write.write_figures([loaded[name] for name in ("trained", "block_sum", "depth")])
    names: dict[str, set[str]] = {}
    for path in paths:
        assert path.stat().st_size > 5_000
        assert {path.with_suffix(".png"), path.with_suffix(".pdf")} <= set(paths)
        assert path.parent.name == "figures"
        names.setdefault(path.parent.parent.name, set()).add(path.stem)
    through_training = {"emergence", "heat_maps_peak"}
    assert names.pop("trained") == {"heat_maps", "dissociation", "comparison", *through_training}
    assert names == {"block_sum": {"heat_maps"}, "depth": {"heat_maps"}}
    monkeypatch.setattr(write, "save", lambda figure, path: [path])
    for name, figures in (("depth", ["heat_maps", "dissociation"]), ("linear", ["heat_maps"]), ("other", [])):
        assert write.write_figures([loaded[name]]) == [directories[name] / "figures" / figure for figure in figures]


def test_estimated_layers_in_training_are_named_so(make_model, tmp_path, monkeypatch):
    run = probed(make_model(), tmp_path / "run", "cumulative", 0, (0, 40), scopes=["all", *REGIONS])
    layers = storage.read_effects(probed(make_model(), tmp_path / "layers", "cumulative", 0, mode="integrated"))
    effects = storage.read_effects(run / "probe")
    mixed = pd.concat([effects, *(by_layer(layers).assign(step=step, run="run") for step in (0, 40))])
    storage.write_tables(run / "probe", {"effects": mixed})
    titles: dict[str, str] = {}
    monkeypatch.setattr(write, "save", lambda figure, path: titles.update({path.name: figure.get_suptitle()}) or [])
    write.write_figures([load_run(run)])
    assert "regions exact, layers estimated" in titles["heat_maps_peak"]


def test_mass_intervals_are_those_of_the_sequences(directories):
    run = load_run(directories["block_sum"])
    found = depth_cells(View(run))
    assert found is not None
    assert set(found.cells["sublayer"]) == set(READ_SUBLAYERS)
    keys = ["sublayer", "scope", "family", "kind", "metric"]
    masses = run.clusters.set_index(keys)["mass"].sort_index()
    for row in found.cells.to_dict("records"):
        of_cell = masses.loc[tuple(row[key] for key in keys)].to_numpy()
        assert len(of_cell) == 8
        assert row["mass"] == pytest.approx(of_cell.mean(), abs=1e-6)
        assert row["mass_low"] <= row["mass"] <= row["mass_high"]
        error = scipy_stats.sem(of_cell)
        assert error < 1e-7 or 2 * error < row["mass_high"] - row["mass_low"]
    assert "not learned" in found.label
