"""`attnres-train find_lr`: a learning-rate range test."""

from __future__ import annotations

import json
from itertools import pairwise

import pandas as pd
import pytest

from tests.train.cli.test_fit import TINY, fit
from train.cli.fit import main

OPTIONS = [*TINY, "--num_steps=40", "--min_lr=1e-4", "--max_lr=1.0", "--data.curriculum.kind=off"]


@pytest.fixture
def found(tmp_path, monkeypatch, capsys) -> dict:
    monkeypatch.chdir(tmp_path)
    main(["find_lr", *OPTIONS, "--json=true"])
    assert list(tmp_path.iterdir()) == []
    return json.loads(capsys.readouterr().out)


def test_rates_grow_evenly_and_the_loss_is_that_of_training(found, tmp_path, monkeypatch):
    rates, losses = found["rates"], found["losses"]
    assert len(rates) == len(losses) <= 40
    assert rates[0] == pytest.approx(1e-4, rel=0.3)
    ratios = [b / a for a, b in pairwise(rates)]
    assert ratios[5:] == pytest.approx([(1.0 / 1e-4) ** (1 / 40)] * len(ratios[5:]), rel=0.05)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run = fit(tmp_path / "run", "--trainer.max_steps=1", "--data.curriculum.kind=off")
    first = pd.read_csv(run / "metrics.csv")["train/loss"].iloc[0]
    assert losses[0] == pytest.approx(first, abs=1e-5)  # the first step's, before any change
    assert rates[0] <= found["suggestion"] <= rates[-1]
    assert found["configured"] == pytest.approx(3e-3)


def test_the_table_names_the_suggestion(found, capsys):
    main(["find_lr", *OPTIONS])
    out = capsys.readouterr().out
    assert f"steepest fall at {found['suggestion']:.2e}" in out
    assert "model.learning_rate is 3.00e-03" in out


def test_routing_rates_do_not_hide_the_test(found, capsys):
    """Groups with rates of their own take part in it."""
    main(["find_lr", *OPTIONS, "--model.routing_learning_rates.queries=0.0", "--json=true"])
    assert json.loads(capsys.readouterr().out)["losses"] == pytest.approx(found["losses"], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min_lr=0"], "min_lr (0) must be positive and below max_lr (1)"),
        (["--min_lr=2"], "min_lr (2) must be positive and below max_lr (1)"),
        (["--num_steps=19"], "num_steps must be at least 20, got 19"),
        (["--trainer.strategy=fsdp2"], "find_lr runs on one device: trainer.strategy must not be fsdp2"),
        (["--trainer.fast_dev_run=true"], "find_lr takes --num_steps steps: trainer.fast_dev_run must be false"),
        (["--min_rl=1"], "option min_rl does not exist; did you mean min_lr?"),
    ],
)
def test_bad_input_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["find_lr", *OPTIONS, *options])
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"attnres-train: error: {message}\n"
