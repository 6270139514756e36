"""The trail of a run: every step that was asked for, loadable as it is, and nothing else changed by it."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from attnres.tasks import MQAR
from probe.files.checkpoints import load_model
from probe.files.trail import WEIGHTS, Trail
from tests.train.cli.test_fit import TINY, fit
from train.cli import main

pytestmark = [pytest.mark.filterwarnings("error:::(train|attnres|probe)"), pytest.mark.usefixtures("quiet_wandb")]

EVERY_3 = ["--trail.every_n_steps=3", "--trainer.max_steps=8", "--model.warmup_steps=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return fit(tmp_path_factory.mktemp("trail") / "run", *EVERY_3)


def contents(run: Path) -> dict[int, tuple[bytes, ...]]:
    """The bytes of each step's files."""
    trail = Trail(run)
    return {step: tuple(path.read_bytes() for path in sorted(trail.folder_of(step).iterdir())) for step in trail.steps}


def test_steps_load_as_they_are(run):
    trail = Trail(run)
    assert trail.steps == [0, 3, 6, 8]
    assert trail.last_step == 8
    states = [AutoModelForCausalLM.from_pretrained(trail.folder_of(step)).state_dict() for step in trail.steps]
    final = AutoModelForCausalLM.from_pretrained(run / "hf").state_dict()
    assert all(torch.equal(final[name], value) for name, value in states[-1].items())
    assert final.keys() == states[-1].keys()
    for before, after in pairwise(states):
        assert not all(torch.equal(before[name], value) for name, value in after.items())


def test_a_step_knows_its_task_and_run(run):
    for source in (str(Trail(run).folder_of(6)), str(run / "hf")):
        found = load_model(source)
        assert found.task == MQAR(4, 32)
        assert (found.run, found.condition, found.seed) == ("run", "cumulative", 0)
        assert found.step == (8 if source.endswith("hf") else 6)
        assert not found.model.training


def test_training_is_the_same_to_the_bit(run, tmp_path):
    without = fit(tmp_path / "run", *EVERY_3, "--trail.every_n_steps=0")
    assert not (without / "trail").exists()
    assert (without / "hf" / WEIGHTS).read_bytes() == (run / "hf" / WEIGHTS).read_bytes()
    tables = [pd.read_csv(path / "metrics.csv") for path in (run, without)]
    pd.testing.assert_frame_equal(*[table.drop(columns=list(table.filter(like="throughput"))) for table in tables])


def test_vanilla_models_and_tied_embeddings_have_one_too(tmp_path):
    options = ["--trail={every_n_steps: 2, until_step: 3}", "--model.tie_word_embeddings=true", "--trainer.max_steps=5"]
    options += ["--model.architecture=vanilla", "--trainer.accumulate_grad_batches=2"]
    run = fit(tmp_path / "run", *options)
    trail = Trail(run)
    assert trail.steps == [0, 2, 5]
    assert (trail.folder_of(5) / WEIGHTS).stat().st_size == pytest.approx(
        (run / "hf" / WEIGHTS).stat().st_size, rel=0.1
    )
    loaded, final = trail.load(5).model.state_dict(), AutoModelForCausalLM.from_pretrained(run / "hf").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in final.items())
    assert trail.load(2).condition == "vanilla"


def test_a_resumed_run_writes_the_rest_again(run, tmp_path, monkeypatch):
    """The checkpoint is of step 6; what lies beyond it may have been written in halves, or by another training."""
    half = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        fit(half, *EVERY_3)
    shutil.copytree(half / "trail/step_3", half / "trail/step_7")
    (half / "trail/step_8" / WEIGHTS).write_bytes(b"half")
    (half / "trail/step_8" / WEIGHTS).rename(half / "trail/step_8" / f"{WEIGHTS}.part")
    assert Trail(half).steps == [0, 3, 6, 7]
    main(["fit", f"--config={half / 'config.yaml'}", "--ckpt_path=last"])
    assert contents(half) == contents(run)
    assert {path.name for path in (half / "trail").iterdir()} == {path.name for path in (run / "trail").iterdir()}


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_its_trail_anew(run, tmp_path, monkeypatch):
    killed = tmp_path / "run"

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.run.checkpoints.SaveCheckpoint.on_validation_end", die)
        with pytest.raises(SystemExit):  # Lightning's, at an interrupt
            fit(killed, *EVERY_3, "--trainer.val_check_interval=5")
    assert Trail(killed).steps == [0, 3]
    assert Trail(killed).last_step is None
    fit(killed, *EVERY_3, "--ckpt_path=last")
    assert contents(killed) == contents(run)


def test_its_size_is_known_before_and_said(run, tmp_path, capsys, caplog):
    main(["estimate", *TINY, *EVERY_3, "--peak_tflops=1", "--json=true"])
    found = json.loads(capsys.readouterr().out)["trail"]
    trail = Trail(run)
    sizes = [(trail.folder_of(step) / WEIGHTS).stat().st_size for step in trail.steps]
    assert found["steps"] == len(sizes)
    assert 0 < sum(sizes) - found["bytes"] < 10_000 * len(sizes)  # headers
    with caplog.at_level("INFO"):
        fit(tmp_path / "run", *EVERY_3)
    assert "trail: weights of 4 steps, 0.0 MiB each, 0 MiB in " in caplog.text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--trail.every_n_steps=-2", "trail.every_n_steps must be at least 0, got -2"),
        ("--trail.until_step=-1", "trail.until_step must be at least 0, got -1"),
        ("--trail.every=2", "option trail.every does not exist"),
    ],
)
def test_errors(option, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", option)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
