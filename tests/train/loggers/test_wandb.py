"""W&B: numbers, images, tables, summary, artifacts, panels as its server has them; and no training that waits."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from PIL import Image

from tests.support.paths import ROOT
from tests.support.probe_rows import expected_rows
from tests.support.wandb_server import SUMMARY, Run, synced_run
from tests.train.cli.test_fit import fit
from tests.train.loggers.test_loggers import PROBED, STEP, history, of, wandb_rows
from train.cli import main
from train.loggers.wandb_panels import LAYOUT, build_workspace, layout_table

SHOWN = {name for panels in LAYOUT.values() for names in panels.values() for name in names}


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> tuple[Path, Run]:
    """A run with exact and estimated probes, and what W&B's server has of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        options = [*PROBED, "--probe.every_n_steps=2", "--probe.mode=both", "--wandb_artifacts=true"]
        run_dir = fit(tmp_path_factory.mktemp("runs") / "my run", *options, "--trainer.max_steps=4")
        return run_dir, synced_run(run_dir)


def test_images_and_the_table_of_effects_are_uploaded(probed):
    run_dir, run = probed
    images = {key: value["path"] for key, value in wandb_rows(run).items() if key[1] == "probe/heat_maps"}
    assert {step for step, _ in images} == {0, 2, 4}
    pixels = [np.asarray(Image.open(io.BytesIO(run.uploads[path]))) for path in images.values()]
    assert all(image.shape == pixels[0].shape and image.shape[1] > 300 for image in pixels)

    (path,) = (row["probe_table/effects"]["path"] for row in history(run) if "probe_table/effects" in row)
    table = json.loads(run.uploads[path])
    shown = pd.DataFrame(table["data"], columns=table["columns"])
    effects = pd.read_parquet(run_dir / "probe/effects.parquet")
    assert set(shown["step"]) == {0, 2, 4}
    assert {"effect", "ci_low", "ci_high", "p_adjusted", "mass"} <= set(shown)
    pd.testing.assert_frame_equal(
        shown, effects[shown.columns], check_dtype=False, check_exact=False, check_column_type=False
    )


def test_summary_and_configuration(probed):
    run_dir, run = probed
    summary = json.loads(run.files[SUMMARY][-1])
    about = json.loads((run_dir / "probe/summary.json").read_text())
    assert summary["final/accuracy"] == pytest.approx(about["clean"]["accuracy"])
    assert summary["final/task_learned"] is False
    assert summary["dissociation/mlp/heaviest"] == about["dissociation"]["mlp"]["heaviest"]
    seconds = [about["probe"][name] for name in ("in_training_seconds", "trail_seconds", "training_seconds")]
    assert summary["probe/fraction_of_training"] == pytest.approx((seconds[0] + seconds[1]) / seconds[2])
    accuracies = [row["val/accuracy"] for row in history(run) if "val/accuracy" in row]
    assert summary["val/accuracy"] == pytest.approx({"last": accuracies[-1], "max": max(accuracies)})

    told = {name: item["value"] for name, item in json.loads(run.config).items() if name != "_wandb"}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert told["data"]["task"] == config["data"]["task"]
    assert config["data"]["task"]["init_args"]["num_pairs"] == 4
    assert told["probe"]["mode"] == "both"
    assert not {"run_dir", "ckpt_path"} & set(told)
    (segment,) = told["provenance"]["segments"]
    assert set(segment["code"]) >= {"sources_sha256"}
    assert "torch" in segment["versions"]


def test_artifacts_hold_the_files_of_the_run(probed):
    run_dir, run = probed
    found = {artifact.kind: artifact for artifact in run.artifacts.values() if artifact.kind != "run_table"}
    assert all(artifact.committed for artifact in found.values())
    folders = {"model": [*(run_dir / "hf").iterdir()], "dataset": [*(run_dir / "probe").iterdir()]}
    for kind, files in folders.items():
        uploaded = {name: content for name, content in found[kind].files.items() if name != "wandb_manifest.json"}
        assert uploaded == {file.name: file.read_bytes() for file in files}
    assert {"model.safetensors", "config.json"} <= set(found["model"].files)
    assert "effects.parquet" in found["dataset"].files


def test_artifacts_need_wandb(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", "--wandb_artifacts=true")
    assert "wandb_artifacts needs W&B" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_panels_show_what_runs_log(probed, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = [*PROBED, "--probe.every_n_steps=0", "--model.attnres_source=block_sum"]
    steps = ["--trainer.max_steps=24", "--trainer.val_check_interval=24", "--trail.every_n_steps=24"]
    block_sum = fit(tmp_path / "run", *options, *steps, "--model.num_hidden_layers=4")
    logged = set().union(*history(probed[1]), *history(synced_run(block_sum)))
    absent = SHOWN - logged - {"probe_table/motifs"}  # which comes with a probe that has them
    # Two layers have no early and no older source everywhere: the mass is there, and no effect.
    assert all(name.startswith(("probe_strength", "probe_harm", "probe_integrated")) for name in absent)
    assert {f"probe_mass/{name.partition('/')[2]}" for name in absent} <= logged


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, of pydantic
def test_a_workspace_has_the_layout():
    """With W&B's package for workspaces, which is an extra."""
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("somebody", "attnres")
    assert [section.name for section in workspace.sections] == list(LAYOUT)
    assert [section.is_open for section in workspace.sections] == [True] * 5 + [False] * 4
    for section in workspace.sections:
        lines = {panel.title: tuple(panel.y) for panel in section.panels if hasattr(panel, "y")}
        others = set(LAYOUT[section.name].values()) - set(lines.values())
        assert others <= {
            (name,) for name in ("probe/heat_maps", "probe/curves", "probe_table/effects", "probe_table/motifs")
        }
        assert lines.items() <= LAYOUT[section.name].items()
        assert all(panel.x == STEP for panel in section.panels if hasattr(panel, "y"))
    view = workspace._to_model().model_dump_json()  # what is sent
    assert all(name in view for name in SHOWN)


@pytest.mark.parametrize(
    ("project", "installed", "line"),
    [
        ("somebody", True, "ENTITY/PROJECT"),
        ("somebody/attnres", False, "pip install 'attnres[wandb]'"),
        ("somebody/attnres", True, "wandb login"),
    ],
)
def test_panels_that_cannot_be_made(project, installed, line, monkeypatch, capsys):
    monkeypatch.setattr("train.cli.panels.find_spec", lambda _: installed or None)
    monkeypatch.setattr("wandb.api", type("Api", (), {"api_key": None}))
    with pytest.raises(SystemExit) as stopped:
        main(["panels", project])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1
    assert line in shown[0]


def test_the_layout_is_printed_without_an_account_and_documented(capsys):
    assert main(["panels", "--dry_run"]) == 0
    assert capsys.readouterr().out.strip() == layout_table()
    assert layout_table() in (ROOT / "docs/loggers.md").read_text()


def test_a_server_that_never_answers_does_not_keep_training_from_ending(tmp_path, monkeypatch, capsys):
    """The run is offline instead, and `wandb sync` uploads all of it."""
    wandb.teardown()
    with socket.socket() as server, monkeypatch.context() as patch:
        server.bind(("127.0.0.1", 0))
        server.listen(50)  # the system takes the connections, and nobody reads from them
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name, value in {"MODE": "online", "BASE_URL": address, "API_KEY": "0" * 40}.items():
            patch.setenv(f"WANDB_{name}", value)
        patch.setattr("train.loggers.wandb.INIT_SECONDS", 1)
        run_dir = fit(tmp_path / "run", *PROBED, "--trainer.max_steps=2", "--probe.every_n_steps=0")
        wandb.teardown()
    assert "W&B cannot be reached" in capsys.readouterr().err
    assert (run_dir / "hf/attnres_run.json").exists()
    assert of(wandb_rows(synced_run(run_dir)), "probe") == pytest.approx(expected_rows(run_dir))
