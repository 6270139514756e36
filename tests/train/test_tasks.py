"""Each task is trained, probed and reported by the same commands: one of a user's own, too, that nothing else names."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import probe.cli
import train.cli
from attnres.tasks import task_from_dict

SIZE = ["--model.hidden_size=16", "--model.intermediate_size=16", "--model.num_hidden_layers=4", "--model.head_dim=8"]
SIZE += ["--model.num_attention_heads=2", "--model.num_key_value_heads=2", "--model.attnres_num_blocks=2"]
SIZE += [
    "--data.batch_size=4",
    "--data.num_validation_examples=8",
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
]
SIZE += ["--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1", "--trail.every_n_steps=2"]
SIZE += ["--probe.num_resamples=20", "--probe.sublayers=[mlp]", "--data.curriculum.kind=linear"]
SIZE += ["--data.curriculum.steps=2"]
PROBE = ["--num_sequences=16", "--num_resamples=20", "--sublayers=[mlp]", "--scopes=[all]", "--device=cpu"]
TASKS = {
    "pointer": (["--data.task=Pointer", "--data.task.address_bits=2"], [1, 2], ["position_0"]),
    "hops": (["--data.task=Hops", "--data.task.num_facts=6"], [4, 6], ["hops_1", "hops_2"]),
    "own": (["--data.task=tests.support.own_task.First", "--data.task.length=5"], [2, 5], ["position_0"]),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
@pytest.mark.parametrize(("options", "sizes", "groups"), TASKS.values(), ids=TASKS.keys())
def test_a_task_is_trained_probed_and_reported(options, sizes, groups, architecture, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.cli.main(["fit", f"--run_dir={run}", f"--model.architecture={architecture}", *SIZE, *options]) == 0
    metrics = pd.read_csv(run / "metrics.csv")
    assert {metrics["train/size"].min(), metrics["train/size"].max()} == set(sizes)
    by_group = metrics[[f"val/accuracy_{name}" for name in groups]].dropna()
    assert by_group.mean(axis=1).to_list() == pytest.approx(metrics["val/accuracy"].dropna().to_list())
    task = task_from_dict(json.loads((run / "hf/task.json").read_text()))
    assert (task.size, task.seed) == (sizes[-1], 0)
    command = ["run", str(run)] if architecture == "attnres" else ["baseline", str(run), "--num_blocks=2"]
    assert probe.cli.main([*command, f"--output={tmp_path / 'out'}", *PROBE]) == 0
    results = tmp_path / "out" if architecture == "attnres" else tmp_path / "out/probe"
    summary = json.loads((results / "summary.json").read_text())
    assert summary["task"] == task.to_dict()
    assert summary["flip"]["n_queried"] > 0
    assert summary["clean"]["plateau_accuracy"] == pytest.approx(task.plateau_accuracy)
    assert probe.cli.main(["report", str(run if architecture == "attnres" else tmp_path / "out")]) == 0


@pytest.mark.parametrize("options", [options for options, *_ in TASKS.values()], ids=TASKS.keys())
def test_a_run_goes_on_amid_its_curriculum(options, tmp_path):
    """Whatever its sizes are: the same losses of the same sizes as a run that nothing has stopped."""
    small = [*SIZE, *options, "--data.curriculum.steps=5", "--trail.every_n_steps=0", "--probe.enabled=false"]
    small += ["--model.warmup_steps=9"]  # the rate does not depend on the number of steps, then

    def fit(run: str, *words: str) -> pd.DataFrame:
        assert train.cli.main(["fit", f"--run_dir={tmp_path / run}", *small, *words]) == 0
        return pd.read_csv(tmp_path / run / "metrics.csv")[["step", "train/loss", "train/size"]].dropna()

    whole = fit("whole", "--trainer.max_steps=6")
    fit("half", "--trainer.max_steps=3")
    resumed = fit("half", "--ckpt_path=last", "--trainer.max_steps=6")
    pd.testing.assert_frame_equal(resumed, whole)
    assert whole["train/size"].iloc[2] < whole["train/size"].iloc[-1] == whole["train/size"].max()


def test_estimate_takes_any_task(capsys):
    assert train.cli.main(["estimate", *SIZE, *TASKS["hops"][0]]) == 0
    assert "hops, facts and further hops 6" in capsys.readouterr().out


def test_the_seed_is_that_of_the_run(capsys, tmp_path):
    with pytest.raises(SystemExit):
        train.cli.main(["fit", f"--run_dir={tmp_path / 'run'}", *SIZE, "--data.task.seed=3"])
    assert "the task's seed is that of seed_everything (0): leave it out, got 3" in capsys.readouterr().err


def test_a_task_that_is_not_known_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        train.cli.main(["fit", f"--run_dir={tmp_path / 'run'}", *SIZE, "--data.task=Pinter"])
    assert "data.task" in (error := capsys.readouterr().err)
    assert "Pinter" in error
    assert error.count("\n") == 1


def test_the_seed_of_a_run_reaches_its_task(tmp_path):
    assert train.cli.main(["fit", f"--run_dir={tmp_path / 'run'}", *SIZE, "--seed_everything=5"]) == 0
    assert json.loads((tmp_path / "run/hf/task.json").read_text())["seed"] == 5
