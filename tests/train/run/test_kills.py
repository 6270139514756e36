"""Training that is killed, again and again, at any moment: the same command ends as a run does that is left alone."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from probe.cli import main as probe_main
from probe.files import tables as storage
from probe.files.checkpoints import read_lightning
from probe.files.trail import WEIGHTS, Trail
from probe.training.trail import TrailProber
from tests.support.wandb_server import synced_history
from tests.train.cli.test_fit import TINY
from train.cli import main
from train.loggers.metrics_file import MetricsLogger
from train.loggers.wandb import RunWandbLogger
from train.run.callbacks import CurriculumCallback
from train.run.checkpoints import LAST, PREVIOUS, newest_checkpoint

OPTIONS = [
    *TINY,
    "--trainer.max_steps=36",
    "--trainer.val_check_interval=3",
    "--trainer.accumulate_grad_batches=2",
    "--data.num_workers=1",
    "--data.curriculum.threshold=0.05",  # the running accuracy decides, and has to come back
    "--model.learning_rate=0.02",
    "--probe.enabled=true",
    "--probe.every_n_steps=10",
    "--probe.accuracy_jump=0.001",  # probes that validations trigger
    "--probe.num_resamples=50",
    "--probe.trail_probes=17",
    "--trail.every_n_steps=2",  # 19 steps
]
KILLS = ["while starting"] * 2 + ["while training"] * 4 + ["while saving"] * 3
ON_TRAIL = ["while probing the trail"] * 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def output_of(run_dir: Path) -> Path:
    """What the processes of a run have printed."""
    return run_dir.with_name("output.txt")


def train(
    run_dir: Path,
    save: int | None = None,
    batch: int | None = None,
    of_trail: bool = False,
    seconds: float = 0.0,
) -> None:
    """In a process of its own, which dies in the middle of checkpoint `save`, counted from now, or `seconds` after the
    end of batch `batch`, or after the beginning of the first probe of the trail."""
    os.environ["WANDB_MODE"] = "offline"
    os.environ.pop("WANDB_SERVICE", None)  # of the tests' process, which outlives this one: as from a shell, its own
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as they do from a shell
    run_dir.parent.mkdir(exist_ok=True)
    sys.stdout = sys.stderr = output_of(run_dir).open("a")
    save_whole, on_train_batch_end = torch.save, CurriculumCallback.on_train_batch_end
    num_saves = num_batches = 0

    def save_half(content, file) -> None:
        nonlocal num_saves
        num_saves += 1
        save_whole(content, file)
        if num_saves == save:
            file.truncate(file.tell() // 2)
            die()

    def count(*args) -> None:
        nonlocal num_batches
        num_batches += 1
        on_train_batch_end(*args)
        if num_batches == batch:
            threading.Timer(seconds, die).start()

    def probe(*args) -> None:
        if of_trail:
            threading.Timer(seconds, die).start()
        probe_step(*args)

    probe_step = TrailProber.probe
    torch.save, CurriculumCallback.on_train_batch_end, TrailProber.probe = save_half, count, probe
    main(["fit", f"--run_dir={run_dir}", "--ckpt_path=last", *OPTIONS])


def prune(run_dir: Path) -> None:
    """In a process of its own, which dies in the middle."""
    sys.stderr = output_of(run_dir).open("a")
    remove, removed = shutil.rmtree, []

    def remove_two(folder: Path, **how) -> None:
        removed.append(folder)
        if len(removed) == 2:
            (folder / "config.json").unlink()
            die()
        remove(folder, **how)

    shutil.rmtree = remove_two
    probe_main(["prune", str(run_dir)])


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything before they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.run.test_kills"])
    return context


def run(processes, run_dir: Path, kill: str | None = None, random_numbers: random.Random | None = None) -> int:
    """Train in a new process and kill it, at a moment that is drawn; returns its exit code."""
    draw = random_numbers or random.Random()
    options: dict[str, float] = {}
    if kill == "at the first batch":  # after the first probe, before the first checkpoint
        options = {"batch": 1, "seconds": 0.0}
    elif kill == "while saving":
        options = {"save": draw.randint(1, 2)}
    elif kill == "while probing the trail":
        options = {"of_trail": True, "seconds": draw.uniform(0, 0.2)}
    elif kill == "while training":
        options = {"batch": draw.randint(4, 12), "seconds": draw.uniform(0, 0.05)}
    process = processes.Process(target=train, args=(run_dir,), kwargs=options)
    process.start()
    process.join(draw.uniform(0, 0.5) if kill == "while starting" else None)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def same(a, b) -> bool:
    """Bit for bit, in depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_left_alone(processes, tmp_path):
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    assert run(processes, whole) == 0, output_of(whole).read_text()
    random_numbers = random.Random(0)
    steps = []
    for kill in ["at the first batch", *random_numbers.sample(KILLS, len(KILLS)), *ON_TRAIL]:
        assert run(processes, killed, kill, random_numbers) == -signal.SIGKILL, output_of(killed).read_text()
        _, checkpoint, torn = newest_checkpoint(killed)
        assert not torn  # what was cut off has never been put in place
        steps.append(checkpoint.get("global_step", 0))
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3  # it got on in between
    assert run(processes, killed) == 0, output_of(killed).read_text()

    a, b = (read_lightning(path / "checkpoints" / LAST) for path in (whole, killed))
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "TaskDataModule"):
        assert same(a[key], b[key]), key
    tables = [pd.read_csv(path / "metrics.csv", dtype=str) for path in (whole, killed)]
    assert "throughput/tokens_per_second" in tables[0]  # the other may never have trained long enough at a stretch
    tables = [table.drop(columns=list(table.filter(like="throughput/"))) for table in tables]
    pd.testing.assert_frame_equal(*tables)
    assert (whole / "hf/model.safetensors").read_bytes() == (killed / "hf/model.safetensors").read_bytes()
    for name in ("effects", "clusters", "geometry"):
        tables = [pd.read_parquet(path / "probe" / f"{name}.parquet") for path in (whole, killed)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
    probed = set(storage.read_effects(whole)["step"])
    assert probed >= {0, 1, 2, 4, 8, 10, 16, 20, 30, 32, 36}
    assert {step for step in probed if step % 2} > {1}  # those of accuracy jumps
    trails = [Trail(path) for path in (whole, killed)]
    assert trails[0].steps == trails[1].steps == list(range(0, 37, 2))
    assert len(probed.intersection(trails[0].steps)) == 17
    for step in trails[0].steps:
        first, second = ((trail.folder_of(step) / WEIGHTS).read_bytes() for trail in trails)
        assert first == second
    rows = pd.read_csv(whole / "metrics.csv")
    histories = [logged(path) for path in (whole, killed)]
    assert histories[0] == histories[1]
    for metric in ("probe/accuracy", "probe_harm_low/mlp/all/embedding", "probe/heat_maps"):
        assert {step for step, name in histories[1] if name == metric} == probed
    assert {step for step, name in histories[1] if name == "train/loss"} == set(range(36))
    assert list(rows["step"][rows["train/loss"].notna()]) == list(range(36))
    assert rows["train/size"].nunique() == 3

    pruning = processes.Process(target=prune, args=(killed,))
    pruning.start()
    pruning.join()
    assert pruning.exitcode == -signal.SIGKILL, output_of(killed).read_text()
    probe_main(["prune", str(killed)])
    assert set(trails[1].steps) == probed.intersection(trails[0].steps)
    assert len(list(trails[1].folder.glob("step_*"))) == 17
    assert trails[1].load(36).step == 36


def logged(run_dir: Path) -> dict[tuple[int, str], float | str]:
    """[step, name] -> value, or hash of an image or table, of all that W&B was told of a run, each of them once."""
    rows = synced_history(run_dir)
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    found: dict[tuple[int, str], float | str] = {}
    for row in rows:
        step = row.pop("trainer/global_step")
        for name, value in row.items():
            if not name.startswith(("_", "epoch", "throughput/")):  # W&B's own, Lightning's in every row, timings
                assert (step, name) not in found, (step, name)
                found[step, name] = value["sha256"] if isinstance(value, dict) else value
    return found


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def blank(path: Path) -> None:
    """As after a loss of power: of full length, and zeros in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("tear", [cut, *(pytest.param(tear, marks=pytest.mark.slow) for tear in (blank, empty))])
def test_a_torn_checkpoint_is_named_and_passed_over(tear, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    command = ["fit", f"--run_dir={tmp_path / 'run'}", *TINY, "--trainer.max_steps=6", "--ckpt_path=last"]
    main(command)
    folder = tmp_path / "run" / "checkpoints"
    rows = (tmp_path / "run/metrics.csv").read_text()
    whole = copy.deepcopy(read_lightning(folder / LAST))  # its tensors are mapped from the file
    assert read_lightning(folder / PREVIOUS)["global_step"] == 4
    tear(folder / LAST)
    capsys.readouterr()
    main(command)
    assert f"'{folder / LAST}' is not whole and is passed over" in capsys.readouterr().err
    assert same(read_lightning(folder / LAST)["state_dict"], whole["state_dict"])
    assert (tmp_path / "run/metrics.csv").read_text() == rows
    assert (folder / f"{LAST}.torn").exists()  # and has not taken the place of the whole one
    assert read_lightning(folder / PREVIOUS)["global_step"] == 4

    for name in (LAST, PREVIOUS):
        tear(folder / name)
    with pytest.raises(SystemExit):
        main(command)
    assert "holds no whole checkpoint; remove checkpoints/ to start at step 0" in capsys.readouterr().err


def test_a_row_that_was_not_written_whole_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/loss\r\n0,10,1.5\r\n0,11,1.25\r\n0,1")  # of "0,12,1.125"
    logger = MetricsLogger(tmp_path, first_step=12)
    logger.log_metrics({"train/loss": 1.0, "train/new": 2.0}, step=12)
    logger.save()
    assert list(pd.read_csv(path)["step"]) == [10, 11, 12]


def test_what_the_server_has_not_received_is_sent_again(tmp_path, monkeypatch):
    """Online, the rows of the files that W&B could not upload before it was killed are not taken for logged."""
    (tmp_path / "metrics.csv").write_text("step,train/loss\r\n0,1.5\r\n1,1.25\r\n2,1.0\r\n")
    rows = [{"_step": step, "trainer/global_step": step, "train/loss": 1.5 - step / 4} for step in range(3)]
    sent: dict[str, list] = {"online": [], "offline": []}
    for mode, logged in sent.items():
        run = SimpleNamespace(step=1, log=lambda row, logged=logged, **how: logged.append((row, how)))
        logger = RunWandbLogger(tmp_path, first_step=3, mode=mode)
        with monkeypatch.context() as patch:
            patch.setattr("train.loggers.wandb_files.history", lambda *_: rows)
            patch.setattr(logger, "_start", lambda run=run, logger=logger: vars(logger).update(_experiment=run) or run)
            assert logger.experiment is run
    how = {"commit": True}
    row = [{"train/loss": 1.25, "trainer/global_step": 1}, {"train/loss": 1.0, "trainer/global_step": 2}]
    assert sent["online"] == [(row[0], {"step": 1, **how}), (row[1], {"step": 2, **how})]
    assert sent["offline"] == []
