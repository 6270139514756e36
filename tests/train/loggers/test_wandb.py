"""W&B: every number of every probe once, images, tables, summary, artifacts, panels; and no training that waits."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wandb
import yaml
from PIL import Image

from tests.support.paths import ROOT
from tests.support.probe_rows import expected_rows
from tests.support.wandb_server import HISTORY, SUMMARY, Run, synced_run
from tests.train.cli.test_fit import fit
from train.cli import main
from train.loggers import wandb_files
from train.loggers.wandb_panels import LAYOUT, build_workspace, layout_table

STEP = "trainer/global_step"
PROBED = ["--probe.enabled=true", "--probe.log_spaced=false", "--probe.accuracy_jump=0", "--probe.num_resamples=20"]
PROBED += ["--probe.max_probe_fraction=null"]
FAST = ["--model.warmup_steps=9", "--data.curriculum.kind=off"]


def history(run: Run) -> list[dict]:
    return [json.loads(line) for line in run.files[HISTORY]]


def probe_rows(rows: list[dict]) -> dict[tuple[int, str], float]:
    """(step, name) -> value of all numbers of probes, each of them once."""
    found: dict[tuple[int, str], float] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith("probe") and isinstance(value, int | float):
                assert (row[STEP], name) not in found, (row[STEP], name)
                found[row[STEP], name] = value
    return found


def uploaded_table(run: Run, name: str) -> pd.DataFrame:
    """The last of that name: a training that is killed after its end and resumed logs its tables anew."""
    *_, row = (row for row in history(run) if name in row)
    table = json.loads(run.uploads[row[name]["path"]])
    return pd.DataFrame(table["data"], columns=table["columns"])


@pytest.fixture(scope="module")
def probed(tmp_path_factory) -> tuple[Path, Run]:
    """A run with exact probes and to first order, and what W&B's server has of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        options = [*PROBED, *FAST, "--probe.every_n_steps=2", "--probe.mode=both", "--wandb_artifacts=true"]
        run_dir = fit(tmp_path_factory.mktemp("runs") / "my run", *options, "--trainer.max_steps=4")
        return run_dir, synced_run(run_dir)


def test_every_row_of_every_probe_is_there_at_its_step_once(probed):
    run_dir, run = probed
    found, expected = probe_rows(history(run)), expected_rows(run_dir)
    assert {step for step, _ in expected} == {0, 2, 4}
    assert len(expected) > 300
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_after_a_kill_too(kept, tmp_path, monkeypatch):
    """W&B is killed with the training, before it has written all; a resumed run logs what is missing, and no more."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = [*PROBED, *FAST, "--probe.every_n_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        run_dir = fit(tmp_path / "run", *options, "--trainer.max_steps=3")
    wandb.teardown()
    (file,) = (path for path in run_dir.glob(wandb_files.FILES) if not path.parent.is_symlink())
    os.truncate(file, int(kept * file.stat().st_size))
    main(["fit", f"--config={run_dir / 'config.yaml'}", "--ckpt_path=last", "--trainer.max_steps=5"])
    run = synced_run(run_dir)
    rows, expected = history(run), expected_rows(run_dir)
    assert {step for step, _ in expected} == set(range(6))
    assert probe_rows(rows) == pytest.approx(expected)
    images = [row[STEP] for row in rows if "probe/heat_maps" in row]
    assert sorted(images) == [*range(6)]
    table = uploaded_table(run, "probe_table/effects")
    assert len(table) == len(pd.read_parquet(run_dir / "probe/effects.parquet"))
    assert set(table["step"]) == set(range(6))


def test_images_and_the_table_of_effects_are_uploaded(probed):
    run_dir, run = probed
    rows = history(run)
    images = {row[STEP]: row["probe/heat_maps"]["path"] for row in rows if "probe/heat_maps" in row}
    assert set(images) == {0, 2, 4}
    pixels = [np.asarray(Image.open(io.BytesIO(run.uploads[path]))) for path in images.values()]
    assert all(image.shape == pixels[0].shape and image.shape[1] > 300 for image in pixels)

    shown = uploaded_table(run, "probe_table/effects")
    effects = pd.read_parquet(run_dir / "probe/effects.parquet")
    assert set(shown["step"]) == {0, 2, 4}
    pd.testing.assert_frame_equal(
        shown, effects[shown.columns], check_dtype=False, check_exact=False, check_column_type=False
    )
    assert {"effect", "ci_low", "ci_high", "p_adjusted", "mass"} <= set(shown)


def test_summary_and_configuration(probed):
    run_dir, run = probed
    summary = json.loads(run.files[SUMMARY][-1])
    about = json.loads((run_dir / "probe/summary.json").read_text())
    assert summary["final/accuracy"] == pytest.approx(about["clean"]["accuracy"])
    assert summary["final/task_learned"] is False
    assert summary["dissociation/mlp/heaviest"] == about["dissociation"]["mlp"]["heaviest"]
    seconds = [about["probe"][name] for name in ("in_training_seconds", "training_seconds")]
    assert summary["probe/fraction_of_training"] == pytest.approx(seconds[0] / seconds[1])
    accuracies = [row["val/accuracy"] for row in history(run) if "val/accuracy" in row]
    assert summary["val/accuracy"] == pytest.approx({"last": accuracies[-1], "max": max(accuracies)})

    told = {name: item["value"] for name, item in json.loads(run.config).items() if name != "_wandb"}
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert told["data"]["num_pairs"] == config["data"]["num_pairs"] == 4
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
    options = [*PROBED, *FAST, "--probe.every_n_steps=0", "--model.attnres_source=block_sum"]
    steps = ["--trainer.max_steps=24", "--trainer.val_check_interval=24"]
    block_sum = fit(tmp_path / "run", *options, *steps, "--model.num_hidden_layers=4")
    logged = set().union(*history(probed[1]), *history(synced_run(block_sum)))
    shown = {name for section in LAYOUT for panel in section.panels for name in panel.metrics}
    absent = shown - logged
    # Two layers have no early and no older source everywhere; the table of motifs comes with a probe that has them.
    assert {name for name in absent if not name.startswith(("probe_effect/", "probe_first_order/"))} <= {
        "probe_table/motifs"
    }
    cells = {name.partition("/")[2] for name in absent if name.count("/") == 3}
    masses = {name.partition("/")[2] for name in logged if name.startswith("probe_mass/")}
    assert cells <= masses  # there, and not applicable in so small a model


def test_the_documentation_has_the_layout():
    text = (ROOT / "docs/training.md").read_text()
    assert layout_table() in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own, of pydantic
def test_a_workspace_has_the_layout():
    """With W&B's package for workspaces, which is an extra."""
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("somebody", "attnres")
    assert [section.name for section in workspace.sections] == [section.name for section in LAYOUT]
    for section, expected in zip(workspace.sections, LAYOUT, strict=True):
        lines = [(panel.title, list(panel.y)) for panel in section.panels if hasattr(panel, "y")]
        assert lines == [(panel.title, list(panel.metrics)) for panel in expected.panels if panel.kind == "lines"]
        assert all(panel.x == STEP for panel in section.panels if hasattr(panel, "y"))
    view = workspace._to_model().model_dump_json()  # what is sent
    assert all(name in view for section in LAYOUT for panel in section.panels for name in panel.metrics)


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


def test_the_layout_is_printed_without_an_account(capsys):
    assert main(["panels", "--dry_run"]) == 0
    assert capsys.readouterr().out.strip() == layout_table()


@pytest.fixture
def silence():
    """The address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        connections = []

        def accept() -> None:
            while True:
                try:
                    connections.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
    for connection in connections:
        connection.close()


def test_a_server_that_never_answers_does_not_keep_training_from_ending(silence, tmp_path, monkeypatch, capsys):
    """The run is offline instead, and `wandb sync` uploads all of it."""
    wandb.teardown()
    with monkeypatch.context() as patch:
        for name, value in {"MODE": "online", "BASE_URL": silence, "API_KEY": "0" * 40}.items():
            patch.setenv(f"WANDB_{name}", value)
        patch.setattr("train.loggers.wandb.INIT_SECONDS", 1)
        run_dir = fit(tmp_path / "run", *PROBED, "--trainer.max_steps=2", "--probe.every_n_steps=0")
        wandb.teardown()
    assert "W&B cannot be reached" in capsys.readouterr().err
    assert (run_dir / "hf/attnres_run.json").exists()
    assert probe_rows(history(synced_run(run_dir))) == pytest.approx(expected_rows(run_dir))
