"""`attnres-train`: what a run leaves behind, resuming, and what it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import attnres
from attnres.tasks import MQAR
from train.cli.checks import check_same_model, explain
from train.cli.fit import main
from train.recall.module import RetrievalModule

TINY = [
    "--model.hidden_size=16",
    "--model.intermediate_size=16",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--model.head_dim=8",
    "--model.attnres_num_blocks=2",
    "--data.num_pairs=4",
    "--data.vocab_size=32",
    "--data.batch_size=8",
    "--data.num_validation_examples=8",
    "--trainer.accelerator=cpu",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--probe.enabled=false",
]
pytestmark = [pytest.mark.filterwarnings("error:::(train|attnres)"), pytest.mark.usefixtures("quiet_wandb")]


def fit(run_dir: Path, *options: str) -> Path:
    main(["fit", f"--run_dir={run_dir}", *TINY, *options])
    return run_dir


def losses(run_dir: Path) -> dict[int, float]:
    rows = pd.read_csv(run_dir / "metrics.csv").dropna(subset="train/loss")
    assert rows["step"].is_unique
    return dict(zip(rows["step"], rows["train/loss"], strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        return fit(tmp_path_factory.mktemp("runs") / "run", "--trainer.max_steps=4", "--seed_everything=3")


def test_a_run_leaves_its_configuration_metrics_and_models(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["seed_everything"], config["model"]["hidden_size"]) == (3, 16)
    metrics = pd.read_csv(run / "metrics.csv")
    positions = {f"val/accuracy_position_{i}" for i in range(4)}
    train = {f"train/{name}" for name in ("loss", "accuracy", "pairs", "learning_rate")}
    assert train | positions | {"val/loss", "val/accuracy"} <= set(metrics)
    gradients = metrics[[f"train/grad_norm_{kind}" for kind in ("queries", "gains", "biases")]].dropna()
    assert len(gradients) == 4
    assert (gradients["train/grad_norm_queries"] > 0).all()
    last = metrics.dropna(subset="val/accuracy").iloc[-1]
    assert last["val/accuracy"] == pytest.approx(last[sorted(positions)].mean())
    assert json.loads((run / "hf/task.json").read_text()) == MQAR(4, 32, seed=3).to_dict()
    about = json.loads((run / "hf/attnres_run.json").read_text())
    assert about == {"condition": "cumulative", "seed": 3, "step": 4}


def test_export_and_checkpoint_are_the_same_model(run):
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    hparams = checkpoint["hyper_parameters"]
    assert checkpoint["datamodule_hyper_parameters"]["task"] == MQAR(4, 32, seed=3).to_dict()
    assert (hparams["condition"], hparams["seed"], checkpoint["global_step"]) == ("cumulative", 3, 4)
    rebuilt = attnres.AttnResForCausalLM(attnres.AttnResConfig(**hparams["model_config"]))
    rebuilt.load_state_dict({key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()})
    exported = AutoModelForCausalLM.from_pretrained(run / "hf")
    input_ids = MQAR(4, 32).batch("probe", range(3)).input_ids
    with torch.no_grad():
        assert torch.equal(exported(input_ids).logits, rebuilt(input_ids).logits)


def test_wandb_is_offline_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    fit(tmp_path / "run", "--trainer.max_steps=1")
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_wandb_disabled_writes_nothing(run):
    assert not (run / "wandb").exists()


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_resumed_run_goes_on_exactly(interrupted, tmp_path, monkeypatch):
    options = ["--model.warmup_steps=9", "--data.curriculum.steps=5", "--data.curriculum.kind=linear"]
    whole = fit(tmp_path / "whole", "--trainer.max_steps=6", *options)
    with monkeypatch.context() as patch:
        if interrupted:  # the last checkpoint is then from the middle, step 2, and rows of later steps exist
            patch.setattr("train.run.callbacks.RunExport.on_train_end", lambda *_: None)
        half = fit(tmp_path / "half", "--trainer.max_steps=3", *options)
    checkpoint = half / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == (2 if interrupted else 3)
    main(["fit", f"--config={half / 'config.yaml'}", f"--ckpt_path={checkpoint}", "--trainer.max_steps=6"])
    assert losses(half) == losses(whole)
    assert len(losses(whole)) == 6
    pairs = pd.read_csv(half / "metrics.csv").dropna(subset="train/pairs")["train/pairs"]
    assert list(pairs) == [1, 1, 2, 2, 3, 4]


def test_extras_can_be_switched_off(tmp_path):
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    run_dir = fit(tmp_path / "run", "--trainer.max_steps=1", *off)
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "provenance.json", "hf"}


def test_what_fails_while_setting_up_is_no_run(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalModule, "setup", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(tmp_path / "run", "--trainer.max_steps=1")
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "run/wandb").mkdir()  # W&B starts before anything is set up
    fit(tmp_path / "run", "--trainer.max_steps=1")
    assert (tmp_path / "run/config.yaml").exists()


def test_steps_of_several_batches(tmp_path):
    """With gradient accumulation, intervals still count optimiser steps, and the configuration is the user's."""
    options = ["--trainer.max_steps=5", "--trainer.val_check_interval=2", "--trainer.accumulate_grad_batches"]
    runs = {batches: fit(tmp_path / str(batches), *options, str(batches)) for batches in (1, 3)}
    metrics = {batches: pd.read_csv(run / "metrics.csv") for batches, run in runs.items()}
    for column in ("val/accuracy", "train/loss"):
        steps = {batches: list(table.dropna(subset=column)["step"]) for batches, table in metrics.items()}
        assert steps[1] == steps[3]
    assert len(metrics[3].dropna(subset="val/accuracy")) == 2
    assert yaml.safe_load((runs[3] / "config.yaml").read_text())["trainer"]["val_check_interval"] == 2


@pytest.mark.parametrize("checkpoint_given", [False, True])
def test_validate_writes_nothing(checkpoint_given, run, capsys):
    before = snapshot(run)
    checkpoint = [f"--ckpt_path={run / 'checkpoints/last.ckpt'}"] if checkpoint_given else []
    main(["validate", f"--config={run / 'config.yaml'}", *checkpoint])
    shown = re.search(r"val/accuracy\W+([\d.]+)", capsys.readouterr().out)
    assert shown
    accuracy = pd.read_csv(run / "metrics.csv").dropna(subset="val/accuracy")["val/accuracy"].iloc[-1]
    assert float(shown[1]) == pytest.approx(accuracy)  # the trained model's
    assert snapshot(run) == before


def test_validate_needs_a_checkpoint(tmp_path, capsys):
    for options in (["validate"], ["validate", "--ckpt_path=last"], ["fit", "--ckpt_path=last"]):
        assert "--run_dir is required: give the folder whose checkpoint" in refused(capsys, *options, *TINY)
    assert str(tmp_path) in refused(capsys, "validate", f"--run_dir={tmp_path}", *TINY)


def test_help_describes_the_subcommands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Train a model into a run directory." in shown
    assert "Measure a checkpoint's accuracy" in shown


def trained_and_initial(run_dir: Path, *options: str) -> tuple[dict, dict]:
    fit(run_dir, "--trainer.max_steps=3", *options)
    trained = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        initial = type(trained)(trained.config)
    return trained.state_dict(), initial.state_dict()


@pytest.mark.parametrize("routing", ["learned", "frozen"])
@pytest.mark.parametrize("source", ["cumulative", "block_sum"])
def test_only_frozen_routing_stays(routing, source, tmp_path):
    options = [f"--model.attnres_routing={routing}", f"--model.attnres_source={source}", "--data.curriculum.kind=off"]
    trained, initial = trained_and_initial(tmp_path / "run", *options, "--model.weight_decay=0")
    moved = {key for key in trained if not torch.equal(trained[key], initial[key])}
    queries = {key for key in trained if "_res_proj" in key}
    # Layer 0 attends to one source, or to two copies of it: its routing takes no gradient.
    unused = {key for key in queries if "layers.0.attn_res" in key}
    assert {key for key in trained if "_res_" not in key} <= moved
    if routing == "frozen":
        assert not {key for key in moved if "_res_" in key}
    else:
        assert queries - unused <= moved


def test_vanilla_trains(tmp_path):
    trained, initial = trained_and_initial(tmp_path / "run", "--model.architecture=vanilla")
    assert all(not torch.equal(trained[key], initial[key]) for key in trained)
    about = json.loads((tmp_path / "run/hf/attnres_run.json").read_text())
    assert about["condition"] == "vanilla"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BAD_INPUT = {
    "unknown option": (["--model.hiden_size=3"], ["model.hiden_size", "model.hidden_size"]),
    "abbreviated option": (["--data.curriculum.thresh=0.5"], ["data.curriculum.thresh", "data.curriculum.threshold"]),
    "unknown key": (["--config=unknown_key.yaml"], ["modl.hidden_size", "model.hidden_size"]),
    "group is a number": (["--config=number.yaml"], ["model", "number.yaml", "mapping"]),
    "group is a word": (["--config=word.yaml"], ["model", "vanilla", "mapping", "model.architecture: vanilla"]),
    "not YAML": (["--config=broken.yaml"], ["broken.yaml"]),
    "missing file": (["--config=missing.yaml"], ["config", "missing.yaml"]),
    "wrong type": (["--model.hidden_size=wide"], ["model.hidden_size", "int", "wide"]),
    "wrong choice": (["--model.architecture=rnn"], ["model.architecture", "attnres", "vanilla"]),
    "K too large": (["--data.num_pairs=17"], ["num_pairs", "17", "at most 16"]),
    "no layers": (["--model.num_hidden_layers=0"], ["num_hidden_layers", "positive"]),
    "no layers, vanilla": (["--model.architecture=vanilla", "--model.num_hidden_layers=-1"], ["num_hidden_layers"]),
    "more blocks than layers": (["--model.attnres_num_blocks=3"], ["attnres_num_blocks", "num_hidden_layers (2)"]),
    "no steps": (["--trainer.max_steps=0"], ["trainer.max_steps", "positive"]),
    "curriculum": (["--data.curriculum.threshold=1"], ["curriculum.threshold", "between 0 and 1"]),
    "seed": (["--seed_everything=-1"], ["seed_everything", ">=0"]),
    "nonsense option": (["--model.nope=3"], ["model.nope", "--help"]),
    "binary file": (["--config=binary.yaml"], ["binary.yaml", "UTF-8"]),
    "one of several types": (["--trainer.precision=foo"], ["trainer.precision", "'bf16-mixed'", "got foo"]),
    "betas": (["--model.betas=[0.9,1.0]"], ["betas", "below 1"]),
    "no validation interval": (["--trainer.val_check_interval=0"], ["trainer.val_check_interval", "positive"]),
    "no batches": (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches", "positive"]),
    "no part of the batches": (["--trainer.limit_train_batches=0.5"], ["trainer.limit_train_batches", "left out"]),
    "no logging interval": (["--trainer.log_every_n_steps=0"], ["trainer.log_every_n_steps", "positive"]),
    "clipping": (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val", "not be negative"]),
    "epochs": (["--trainer.max_epochs=0"], ["trainer.max_epochs", "trainer.max_steps"]),
    "accelerator": (["--trainer.accelerator=foo"], ["foo", "cpu"]),
    "one pair to probe": (["--probe.enabled=true", "--data.num_pairs=1"], ["num_pairs", "at least 2"]),
    "few queries": (["--probe.enabled=true", "--probe.num_sequences=64"], ["probe.num_sequences", "at least 256"]),
    "run below a file": (["--run_dir=number.yaml/run"], ["--run_dir", "number.yaml/run", "Not a directory"]),
    "run is a file": (["--run_dir=number.yaml"], ["--run_dir", "number.yaml", "Not a directory"]),
    "missing checkpoint": (["--ckpt_path=missing.ckpt"], ["--ckpt_path", "missing.ckpt", "does not exist"]),
    "foreign checkpoint": (["--ckpt_path=broken.yaml"], ["--ckpt_path", "broken.yaml", "not a checkpoint"]),
}


def refused(capsys, *args: str) -> str:
    """Runs the command, which must exit with status 2 and one line; returns that line."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("attnres-train: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(("options", "words"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_refused_in_one_line(options, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE")  # it would write to wandb/
    Path("binary.yaml").write_bytes(b"\x80\xff\x00")
    Path("unknown_key.yaml").write_text("modl:\n  hidden_size: 3\n")
    Path("number.yaml").write_text("model: 3\n")
    Path("word.yaml").write_text("model: vanilla\n")
    Path("broken.yaml").write_text("model:\n  - a: 3\n :")
    before = sorted(Path().iterdir())
    message = refused(capsys, "fit", "--run_dir=run", *TINY, *options)
    for word in words:
        assert word in message
    assert sorted(Path().iterdir()) == before


def test_a_run_directory_that_cannot_be_created_is_refused(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", fail)
    assert "Permission denied" in refused(capsys, "fit", f"--run_dir={tmp_path / 'run'}", *TINY)


def test_explain_suggests_only_what_is_alike():
    known = ["model.hidden_size", "model.betas", "trainer.max_steps", "data.curriculum.steps"]
    suggestions = {
        "model.hiden_size": "model.hidden_size",
        "hidden_size": "model.hidden_size",
        "trainer.steps": "trainer.max_steps",
        "model.nope": None,
        "data.curriculum.nope": None,
    }
    for key, nearest in suggestions.items():
        message = explain(f"unrecognized arguments: --{key}", known, [])
        assert f"did you mean {nearest}?" in message if nearest else "did you mean" not in message


def test_check_same_model():
    vanilla, ours = ({"model_type": name, "hidden_size": 16} for name in ("qwen3", "qwen3_attnres"))
    check_same_model({**ours, "transformers_version": "6", "_name_or_path": "x"}, checkpoint_of(ours))
    with pytest.raises(ValueError, match="architecture vanilla, the configuration says attnres"):
        check_same_model({**ours, "attnres_num_blocks": 2}, checkpoint_of(vanilla))
    with pytest.raises(ValueError, match="hidden_size 16, the configuration says 32"):
        check_same_model({**ours, "hidden_size": 32}, checkpoint_of(ours))


def checkpoint_of(model_config: dict) -> dict:
    return {"hyper_parameters": {"model_config": model_config}}


def test_a_run_directory_in_use_is_refused(run, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert "is not empty" in refused(capsys, "fit", f"--run_dir={tmp_path}", *TINY)
    before = snapshot(run)
    assert "is not empty" in refused(capsys, "fit", f"--run_dir={run}", *TINY)
    assert "--run_dir is required" in refused(capsys, "fit", *TINY)
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    assert "another run" in refused(capsys, "fit", f"--run_dir={tmp_path}", *TINY, checkpoint)
    other_model = ["--model.hidden_size=32", checkpoint]
    assert "hidden_size 16" in refused(capsys, "fit", f"--run_dir={run}", *TINY, *other_model)
    assert snapshot(run) == before


def test_an_unknown_wandb_mode_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "foo")
    assert "online, offline, disabled" in refused(capsys, "fit", f"--run_dir={tmp_path / 'run'}", *TINY)
    assert not (tmp_path / "run").exists()


def test_wandb_online_without_a_key_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("wandb.api", type("Api", (), {"api_key": None}))
    assert "WANDB_MODE=online" in refused(capsys, "fit", f"--run_dir={tmp_path / 'run'}", *TINY)
    assert not (tmp_path / "run").exists()


def test_the_console_script_ignores_modules_of_the_working_directory(tmp_path):
    for name in ("train.py", "attnres.py", "probe/__init__.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} of the working directory was imported')\n")
    script = Path(sys.executable).with_name("attnres-train")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [script, "fit", "--run_dir=run", *TINY, "--trainer.max_steps=2", "--data.num_workers=1"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step 2/2" in result.stdout
    assert (tmp_path / "run/hf/model.safetensors").exists()
