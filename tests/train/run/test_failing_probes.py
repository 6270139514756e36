"""Probes that fail: training goes on to the same bits, a line says so, and the run keeps which are missing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import probe.cli
import probe.training.shared
from attnres.tasks import MQAR
from probe import Examples, ProbeSettings, measure
from probe.files.failed import FailedProbes, read_failed
from probe.training.trail import TrailProber
from tests.train.cli.test_fit import fit, losses

pytestmark = pytest.mark.usefixtures("quiet_wandb")
OPTIONS = [
    *("--trainer.max_steps=4", "--model.warmup_steps=9", "--data.curriculum.kind=off"),
    *("--probe.enabled=true", "--probe.log_spaced=false", "--probe.accuracy_jump=0", "--probe.num_resamples=20"),
    *("--probe.every_n_steps=1", "--probe.families=[older]"),
]


def failing(patch, steps: set[int], error: Callable[[], Exception]) -> None:
    probe_model = probe.training.shared.probe_model

    def run(*args, step: int, **kwargs):
        if step in steps:
            raise error()
        return probe_model(*args, step=step, **kwargs)

    patch.setattr("probe.training.shared.probe_model", run)


def probed(run: Path) -> set[int]:
    return set(pd.read_parquet(run / "probe/effects.parquet")["step"])


def test_training_goes_on_and_the_report_says_what_is_missing(tmp_path, monkeypatch, capsys):
    whole, run = fit(tmp_path / "whole", *OPTIONS), tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, {1, 2}, lambda: ValueError("Encountered all NA values"))
        capsys.readouterr()
        fit(run, *OPTIONS)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attnres-train")]
    assert [line[:44] for line in lines] == [f"attnres-train: the probe at step {n} has failed"[:44] for n in (1, 2)]
    assert losses(run) == losses(whole)
    assert (run / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
    assert probed(run) == {0, 3, 4}
    assert [probe["step"] for probe in read_failed(run / "probe")] == [1, 2]
    probe.cli.main(["report", str(run)])
    shown = capsys.readouterr().out
    assert f"MISSING PROBES: {run}: 2 probes have failed and are missing, at steps 1, 2" in shown
    assert "ValueError: Encountered all NA values" in shown


def test_a_run_without_a_single_probe_says_why(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, set(range(5)), lambda: TypeError("no"))
        fit(run, *OPTIONS)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        probe.cli.main(["report", str(run)])
    assert end.value.code == 2
    assert (
        "5 probes have failed and are missing, at steps 0, 1, 2, 3, 4; the last one: TypeError: no"
        in capsys.readouterr().err
    )


def test_a_full_disk_is_not_taken_for_a_failing_probe(tmp_path, monkeypatch, capsys):
    """The run stops, and once there is room again all its probes are made."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        failing(patch, {3}, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(SystemExit) as end:
            fit(run, *OPTIONS)
    assert end.value.code == 74
    fit(run, *OPTIONS, "--ckpt_path=last")
    assert probed(run) == {0, 1, 2, 3, 4}
    assert read_failed(run / "probe") == []


def test_a_step_of_the_trail_that_fails_gives_way_to_another(tmp_path, monkeypatch, capsys):
    trail = ["--trail.every_n_steps=1", "--probe.trail_probes=5", "--probe.every_n_steps=0", "--trainer.max_steps=8"]
    probe_step, tried = TrailProber.probe, []

    def first_fails(self, step: int) -> None:
        tried.append(step)
        if len(tried) == 1:
            raise ValueError("it is torn")
        probe_step(self, step)

    monkeypatch.setattr(TrailProber, "probe", first_fails)
    run = fit(tmp_path / "run", *OPTIONS, *trail)
    assert probed(run) == {0, 8, *tried[1:]}
    assert len(tried) == 4
    assert [probe["step"] for probe in read_failed(run / "probe")] == tried[:1]


def test_two_processes_leave_out_the_same_probe(tmp_path, monkeypatch):
    """It fails in the second of them; neither waits for the other."""
    sweep = probe.training.shared.sweep_share

    def run(rank, *args, step, **kwargs):
        if rank == 1 and step == 2:
            raise RuntimeError("of rank 1")
        return sweep(rank, *args, step=step, **kwargs)

    monkeypatch.setattr("probe.training.shared.sweep_share", run)
    two = ["--trainer.strategy=ddp_fork", "--trainer.devices=2", "--data.batch_size=4"]
    made = fit(tmp_path / "run", *OPTIONS, *two)
    assert probed(made) == {0, 1, 3, 4}
    (failed,) = read_failed(made / "probe")
    assert failed["step"] == 2
    assert (made / "hf/attnres_run.json").exists()


def test_what_is_kept_of_failures_goes_back_with_the_run(tmp_path):
    failed = FailedProbes(tmp_path)
    for step in (4, 2, 6):
        failed.add(step, ValueError(f"at {step}"))
    assert [probe["step"] for probe in read_failed(tmp_path)] == [2, 4, 6]
    failed.remove_after(4)
    failed.remove(2)
    assert read_failed(tmp_path) == [{"step": 4, "why": "ValueError: at 4"}]
    failed.remove(4)
    assert not (tmp_path / "failed.json").exists()
    (tmp_path / "failed.json").write_text("{}")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"failed\.json must hold"):
        read_failed(tmp_path)


@pytest.mark.parametrize("most", [64, 300])
def test_a_probe_that_lacks_memory_goes_on_in_halves(most, make_model, monkeypatch, caplog):
    examples = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(12)))
    settings = ProbeSettings(batch_size=12, num_resamples=20)
    model = make_model()
    whole = measure(model, examples, settings)

    def small(module, args):
        if args[0].numel() > most:
            raise MemoryError

    hook = model.get_input_embeddings().register_forward_pre_hook(small)
    try:
        with caplog.at_level("WARNING"):
            halves = measure(model, examples, settings)
    finally:
        hook.remove()
    assert ("in halves" in caplog.text) == (most < 12 * 12)
    numbers = [
        table.effects.select_dtypes("number").drop(columns=["p_value"], errors="ignore") for table in (whole, halves)
    ]
    pd.testing.assert_frame_equal(*numbers, check_exact=False, atol=1e-4, rtol=1e-3)
