"""Tokens per second and MFU, by a clock that is set here."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest

from attnres import AttnResForCausalLM
from tests.train.cli.test_fit import TINY
from train.cli import main
from train.recall.flops import forward_flops
from train.recall.module import RetrievalModule
from train.run import throughput

STEP, PAUSE, PEAK = 2.0, 1000.0, 1e9  # seconds of a step, and of a validation; operations per second


@pytest.fixture
def clock(monkeypatch) -> None:
    now = [0.0]
    for module in ("train.run.throughput.time", "lightning.pytorch.callbacks.throughput_monitor.time"):
        monkeypatch.setattr(module, SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("lightning.pytorch.callbacks.throughput_monitor.get_available_flops", lambda *_: PEAK)

    def slowly(name: str, seconds: float) -> None:
        step = getattr(RetrievalModule, name)

        def run(*args, **kwargs):
            now[0] += seconds
            return step(*args, **kwargs)

        monkeypatch.setattr(RetrievalModule, name, run)

    slowly("training_step", STEP)
    slowly("on_validation_epoch_end", PAUSE)


def test_rates_are_those_of_the_steps_alone(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    batches = 2
    options = [
        "--trainer.max_steps=16",
        f"--trainer.accumulate_grad_batches={batches}",
        "--trainer.val_check_interval=3",
    ]
    options += ["--data.curriculum.kind=off", "--data.batch_size=8", "--trainer.log_every_n_steps=1"]
    main(["fit", f"--run_dir={tmp_path / 'run'}", *TINY, *options])
    rows = pd.read_csv(tmp_path / "run/metrics.csv")
    logged = rows.dropna(subset=["throughput/tokens_per_second"])
    assert list(logged["step"]) == list(range(throughput.WINDOW // batches - 1, 16))
    assert logged["train/loss"].notna().all()  # in the step's own row
    tokens = 8 * 3 * 4
    assert set(logged["throughput/tokens_per_second"]) == {tokens / STEP}
    # A batch's forward and backward pass, three forward passes, in a step's time, as a share of the peak.
    config = AttnResForCausalLM.from_pretrained(tmp_path / "run" / "hf").config
    flops = 3 * 8 * sum(forward_flops(config, seq=3 * 4, queries=4).values())
    assert logged["throughput/mfu"].tolist() == pytest.approx([flops / STEP / PEAK] * len(logged), rel=1e-6)
