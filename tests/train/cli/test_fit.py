"""`attnres-train`: what a run leaves behind, resuming, and what it refuses."""

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import attnres
from attnres.tasks import MQAR
from train.cli import main
from train.cli.checks import POSITIVE_TRAINER_OPTIONS
from train.recall.module import RetrievalModule

TINY = [
    "--model.hidden_size=16",
    "--model.intermediate_size=16",
    "--model.num_hidden_layers=2",
    "--model.num_attention_heads=2",
    "--model.num_key_value_heads=2",
    "--model.head_dim=8",
    "--model.attnres_num_blocks=2",
    "--data.task.num_pairs=4",
    "--data.task.vocab_size=32",
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
    train = {f"train/{name}" for name in ("loss", "accuracy", "size", "learning_rate")}
    assert train | positions | {"val/loss", "val/accuracy"} <= set(metrics)
    gradients = metrics[[f"train/grad_norm_{kind}" for kind in ("queries", "gains", "biases")]].dropna()
    assert len(gradients) == 4
    assert (gradients["train/grad_norm_queries"] > 0).all()
    last = metrics.dropna(subset="val/accuracy").iloc[-1]
    assert last["val/accuracy"] == pytest.approx(last[sorted(positions)].mean())
    assert json.loads((run / "hf/task.json").read_text()) == MQAR(4, 32, seed=3).to_dict()
    about = json.loads((run / "hf/attnres_run.json").read_text())
    assert about == {"condition": "cumulative", "seed": 3, "step": 4}
    assert not (run / "wandb").exists()  # W&B is disabled


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
    pairs = pd.read_csv(half / "metrics.csv").dropna(subset="train/size")["train/size"]
    assert list(pairs) == [1, 1, 2, 2, 3, 4]


def test_a_model_that_was_trained_is_let_go(tmp_path, monkeypatch):
    """Several may be trained in one process, one after another."""
    made = []
    monkeypatch.setattr(RetrievalModule, "setup", lambda module, stage: made.append(weakref.ref(module)), raising=False)
    fit(tmp_path / "run", "--trainer.max_steps=1")
    gc.collect()
    assert [reference() for reference in made] == [None]


def test_extras_can_be_switched_off(tmp_path):
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    run_dir = fit(tmp_path / "run", "--trainer.max_steps=1", *off)
    files = {"config.yaml", "provenance.json", "hf", "manifest.json", "train.lock"}
    assert {path.name for path in run_dir.iterdir()} == files


def test_what_fails_while_setting_up_is_no_run(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("something broke")

    with monkeypatch.context() as patch:
        patch.setattr(RetrievalModule, "setup", fail)
        with pytest.raises(SystemExit, match="1"):
            fit(tmp_path / "run", "--trainer.max_steps=1")
    assert "internal error: RuntimeError: something broke" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["train.lock"]
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


@pytest.mark.parametrize("checkpoint", [[], ["--ckpt_path=last"], ["--ckpt_path=checkpoints/last.ckpt"]])
def test_validate_writes_nothing(checkpoint, run, monkeypatch, capsys):
    monkeypatch.chdir(run)
    before = snapshot(run)
    main(["validate", "--config=config.yaml", *checkpoint])
    shown = re.search(r"val/accuracy\W+([\d.]+)", capsys.readouterr().out)
    assert shown
    accuracy = pd.read_csv(run / "metrics.csv").dropna(subset="val/accuracy")["val/accuracy"].iloc[-1]
    assert float(shown[1]) == pytest.approx(accuracy)  # the trained model's
    assert snapshot(run) == before


def test_validate_needs_a_checkpoint(tmp_path, capsys):
    for options in (["validate"], ["validate", "--ckpt_path=last"], ["fit", "--ckpt_path=last"]):
        assert "--run_dir is required: give the folder whose checkpoint" in refused(capsys, *options, *TINY)
    assert str(tmp_path) in refused(capsys, "validate", f"--run_dir={tmp_path}", *TINY)


@pytest.mark.parametrize(
    ("options", "still"),
    [
        (["--model.architecture=vanilla"], []),
        # Layer 0 attends to one source, or to two copies of it: its routing takes no gradient.
        (["--model.attnres_source=cumulative"], ["layers.0.attn_res"]),
        (["--model.attnres_source=block_sum"], ["layers.0.attn_res"]),
        (["--model.attnres_routing=frozen"], ["_res_"]),
        (["--model.attnres_routing=frozen", "--model.attnres_source=block_sum"], ["_res_"]),
    ],
)
def test_what_is_trained(options, still, tmp_path):
    options = [*options, "--data.curriculum.kind=off", "--model.weight_decay=0", "--trainer.max_steps=3"]
    trained = AutoModelForCausalLM.from_pretrained(fit(tmp_path / "run", *options) / "hf")
    torch.manual_seed(0)
    initial = type(trained)(trained.config).state_dict()
    unmoved = {key for key, value in trained.state_dict().items() if torch.equal(value, initial[key])}
    matched = {key for key in initial if any(part in key for part in still)}
    optional = {key for key in initial if "_res_" in key and "_res_proj" not in key}
    assert matched - optional <= unmoved <= matched | optional
    if still == ["_res_"]:
        assert unmoved == matched


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
    "no layers": (["--model.num_hidden_layers=0"], ["num_hidden_layers", "positive"]),
    "no layers, vanilla": (["--model.architecture=vanilla", "--model.num_hidden_layers=-1"], ["num_hidden_layers"]),
    "seed": (["--seed_everything=-1"], ["seed_everything", ">=0"]),
    "nonsense option": (["--model.nope=3"], ["model.nope", "--help"]),
    "binary file": (["--config=binary.yaml"], ["binary.yaml", "UTF-8"]),
    "one of several types": (["--trainer.precision=foo"], ["trainer.precision", "'bf16-mixed'", "got foo"]),
    "no part of the batches": (["--trainer.limit_train_batches=0.5"], ["trainer.limit_train_batches", "left out"]),
    "clipping": (["--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val", "not be negative"]),
    "epochs": (["--trainer.max_epochs=0"], ["trainer.max_epochs", "trainer.max_steps"]),
    "accelerator": (["--trainer.accelerator=foo"], ["foo", "cpu"]),
    "one pair to probe": (["--probe.enabled=true", "--data.task.num_pairs=1"], ["num_pairs", "at least 2"]),
    "few queries": (["--probe.enabled=true", "--probe.num_sequences=64"], ["probe.num_sequences", "at least 256"]),
    "run below a file": (["--run_dir=number.yaml/run"], ["--run_dir", "number.yaml/run", "Not a directory"]),
    "missing checkpoint": (["--ckpt_path=missing.ckpt"], ["--ckpt_path", "missing.ckpt", "does not exist"]),
    "foreign checkpoint": (["--ckpt_path=broken.yaml"], ["--ckpt_path", "broken.yaml", "not a checkpoint"]),
}
BAD_INPUT |= {key: ([f"--trainer.{key}=0"], [f"trainer.{key}", "positive"]) for key in POSITIVE_TRAINER_OPTIONS}


def refused(capsys, *args: str) -> str:
    """Runs the command, which must exit with status 2 and one line; returns that line."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(f"attnres-train {args[0]}: error: ")
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


def test_a_run_directory_in_use_is_refused(run, tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    assert "is not empty" in refused(capsys, "fit", f"--run_dir={tmp_path}", *TINY)
    before = snapshot(run)
    assert "is not empty" in refused(capsys, "fit", f"--run_dir={run}", *TINY)
    assert "--run_dir is required" in refused(capsys, "fit", *TINY)
    checkpoint = f"--ckpt_path={run / 'checkpoints/last.ckpt'}"
    assert "another run" in refused(capsys, "fit", f"--run_dir={tmp_path}", *TINY, checkpoint)
    for change, words in (
        ("--model.hidden_size=32", "model.hidden_size 16, the configuration says 32"),
        ("--model.architecture=vanilla", "architecture attnres, the configuration says vanilla"),
        ("--model.attnres_source=block_sum", "model.attnres_source cumulative, the configuration says block_sum"),
    ):
        assert words in refused(capsys, "fit", f"--run_dir={run}", *TINY, change, checkpoint)
        assert words in refused(capsys, "validate", *TINY, change, checkpoint)
    assert snapshot(run) == before


@pytest.mark.parametrize(("mode", "words"), [("foo", "online, offline, disabled"), ("online", "WANDB_MODE=online")])
def test_a_wandb_mode_that_cannot_be_is_refused(mode, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr("wandb.api", type("Api", (), {"api_key": None}))
    assert words in refused(capsys, "fit", f"--run_dir={tmp_path / 'run'}", *TINY)
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
