"""`attnres-train study`: all runs, killed and resumed, failures, the table."""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pytest
import yaml

import probe.cli
import probe.commands
import train.cli
import train.run.checkpoints
from attnres import FAMILIES
from probe.failures import Stopped, raising_signals
from probe.files.parts import Parts
from tests.train.cli.test_fit import refused
from train.study import cli as study_cli
from train.study import runs as study_runs
from train.study.description import load_study
from train.study.table import runs_table

SIZE = {
    "model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "warmup_steps": 1},
    "data": {"task": {"init_args": {"num_pairs": 4, "vocab_size": 32}}, "batch_size": 8, "num_validation_examples": 8},
    "trainer": {"accelerator": "cpu", "val_check_interval": 2, "log_every_n_steps": 1, "max_steps": 6},
    "probe": {"every_n_steps": 3, "log_spaced": False, "num_resamples": 20},
}
SIZE["model"] |= {"num_attention_heads": 2, "num_key_value_heads": 2, "attnres_num_blocks": 2, "learning_rate": 0.02}
STUDY = {
    "base": ["size.yaml", "data.curriculum.kind=off"],
    "conditions": {"cumulative": ["model.attnres_source=cumulative"], "vanilla": ["vanilla.yaml"]},
    "seeds": [0, 1],
    "probe": "--num_sequences 8 --num_resamples 20 --sublayers [self_attn,mlp] --scopes [all] --device cpu",
    "baseline": "--num_blocks 2",
}
MAIN = {"attnres-train": train.cli.main, "attnres-probe": probe.cli.main}


def write_study(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "size.yaml").write_text(yaml.safe_dump(SIZE))
    (folder / "vanilla.yaml").write_text(yaml.safe_dump({"model": {"architecture": "vanilla"}}))
    (folder / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}))
    return folder / "study.yaml"


def execute(command: list[str], lock) -> int:
    """As `study_runs._execute`, in a fork that has imported everything: seconds sooner."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            MAIN[command[0]](command[1:])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_in(moment: str | None) -> None:
    """From now on, the whole study is killed at a moment of one of its runs."""

    def die_after(do, is_the_moment):
        def wrapped(*args, **kwargs):
            done = do(*args, **kwargs)
            if is_the_moment(*args):
                os.killpg(0, signal.SIGKILL)
            return done

        return wrapped

    if moment == "training":
        save = train.run.checkpoints.save_checkpoint
        train.run.checkpoints.save_checkpoint = die_after(
            save, lambda t: t.default_root_dir.endswith("cumulative-seed1")
        )
    elif moment == "probe":
        Parts.save = die_after(Parts.save, lambda parts, *_: "cumulative-seed0" in str(parts.directory))
    elif moment == "end of a probe":  # all is measured and exported, and its tables are not written yet
        probe.commands.recall_accuracy = die_after(probe.commands.recall_accuracy, lambda *_: True)


def run_study(arguments: list[str], output: Path, moment: str | None = None) -> None:
    """In a process and group of its own."""
    os.setsid()
    os.environ["WANDB_MODE"] = "disabled"
    study_runs._execute = execute
    die_in(moment)
    with output.open("w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        sys.exit(train.cli.main(["study", *arguments]))


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything before they start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.study.test_study"])
    return context


def study(processes, file: Path, directory: Path, *options: str, moment: str | None = None) -> tuple[int, str]:
    """Exit code, and what was printed."""
    output = directory.with_suffix(".log")
    arguments = ["--config", str(file), "--dir", str(directory), *options]
    process = processes.Process(target=run_study, args=(arguments, output, moment))
    process.start()
    process.join()
    return process.exitcode, output.read_text()


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A study that was left alone: its description, its folder, what it printed."""
    folder = tmp_path_factory.mktemp("study")
    file, directory = write_study(folder), folder / "runs"
    code, printed = study(processes, file, directory)
    assert code == 0, printed
    return file, directory, printed


def starts(run: Path) -> list[int]:
    """The steps from which training was started."""
    return [segment["from_step"] for segment in json.loads((run / "provenance.json").read_text())["segments"]]


def tables_of(printed: str) -> str:
    return printed[printed.index("\ncondition ") : printed.index("\nwritten:")]


@pytest.mark.slow
def test_killed_at_several_moments_it_ends_as_if_left_alone(whole, processes, tmp_path):
    file, directory, printed = whole
    killed = tmp_path / "runs"
    logs = []
    for moment in ("probe", "end of a probe", "training"):
        code, log = study(processes, file, killed, moment=moment)
        assert code == -signal.SIGKILL
        logs.append(log)
    for log in logs[1:]:
        assert "going on with the unfinished probe" in log
    code, log = study(processes, file, killed)
    assert code == 0, log
    commands = [line for line in log.splitlines() if ": attnres-" in line]
    assert [re.sub(r"\S+/runs/", "", line).split(" --")[0] for line in commands] == [
        "[3/4] cumulative-seed1: attnres-train fit",
        "[3/4] cumulative-seed1: attnres-probe run cumulative-seed1",
        "[4/4] vanilla-seed1: attnres-train fit",
        "[4/4] vanilla-seed1: attnres-probe baseline vanilla-seed1",
    ]
    assert [line.endswith("--ckpt_path last") for line in commands] == [True, False, False, False]
    assert {run.name: starts(run) for run in sorted(killed.glob("*-seed?"))} == {
        "cumulative-seed0": [0],
        "cumulative-seed1": [0, 2],
        "vanilla-seed0": [0],
        "vanilla-seed1": [0],
    }
    for run in directory.glob("*-seed?"):
        a, b = ((folder / run.name / "hf/model.safetensors").read_bytes() for folder in (directory, killed))
        assert a == b
    for name in ("study", "study_seeds"):
        tables = [pd.read_parquet(folder / f"{name}.parquet") for folder in (directory, killed)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)
        assert len(tables[0]) == len(pd.read_csv(killed / f"{name}.csv"))
    assert tables_of(log) == tables_of(printed)


def test_finished_runs_are_left_as_they_are_and_failed_ones_reported(whole, processes, tmp_path):
    directory = shutil.copytree(whole[1], tmp_path / "runs")
    runs = sorted(directory.glob("*-seed*"))
    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    conditions = {"broken": ["model.num_attention_heads=3"], **STUDY["conditions"]}
    more = write_study(tmp_path / "more", conditions=conditions)
    code, log = study(processes, more, directory, "--seed", "1")
    assert code == 1
    assert "num_key_value_heads (2) must divide num_attention_heads (3)" in log
    assert {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")} == before
    rows = pd.read_parquet(directory / "study.parquet").set_index("run")
    failed = "failed: attnres-train fit (exit status 2)"
    assert rows["status"].to_dict() == {
        **dict.fromkeys([run.name for run in runs if not run.name.endswith("wrapped")], "finished"),
        **{"broken-seed0": "not begun", "broken-seed1": failed},
    }
    (line,) = (line for line in log.splitlines() if line.startswith("broken ") and " 1 " in line)
    assert line.endswith(failed)
    assert "broken: 0 of 2 runs finished" in log


def test_a_file_emptied_by_a_kill_is_written_again(whole, processes, tmp_path):
    file, whole_directory, printed = whole
    directory = shutil.copytree(whole_directory, tmp_path / "runs")
    killed, wrapped = directory / "cumulative-seed0", directory / "vanilla-seed0-wrapped"
    (killed / "hf/attnres_run.json").write_text("")  # in the export, before its checkpoint
    (killed / "checkpoints/previous.ckpt").replace(killed / "checkpoints/last.ckpt")
    (killed / "checkpoints/manifest.json").unlink()  # says that last.ckpt is another
    (wrapped / "probe/summary.json").write_text("")
    code, log = study(processes, file, directory)
    assert code == 0, log
    commands = [line.partition(": attnres-")[2].split()[0] for line in log.splitlines() if ": attnres-" in line]
    assert commands == ["train", "probe", "probe"]
    assert starts(killed) == [0, 4]
    assert tables_of(log) == tables_of(printed)


def test_a_probe_that_was_altered_is_kept_and_said(whole, processes, tmp_path):
    file, directory = whole[0], shutil.copytree(whole[1], tmp_path / "runs")
    results = directory / "vanilla-seed0-wrapped/probe"
    summary = (results / "summary.json").read_text()
    (results / "summary.json").write_text(summary.replace('"seed": 0', '"seed": 1'))
    before = {path: path.read_bytes() for path in results.iterdir()}
    code, log = study(processes, file, directory)
    assert code == 1
    assert "vanilla-seed0: damaged: " in log
    assert f"{results}/summary.json" in log
    assert {path: path.read_bytes() for path in results.iterdir()} == before


def test_the_table_is_what_the_runs_say(whole):
    _, directory, _ = whole
    rows = pd.read_parquet(directory / "study.parquet").set_index(["condition", "seed"])
    assert sorted(rows.index) == [(name, seed) for name in ("cumulative", "vanilla") for seed in (0, 1)]
    effects = {}
    for (condition, seed), row in rows.iterrows():
        run = directory / f"{condition}-seed{seed}"
        metrics = pd.read_csv(run / "metrics.csv")
        assert row["step"] == 6
        assert row["validation_accuracy"] == metrics["val/accuracy"].dropna().iloc[-1]
        wrapped = condition == "vanilla"
        results = directory / f"{run.name}-wrapped/probe" if wrapped else run / "probe/final"
        summary = json.loads((results / "summary.json").read_text())
        assert row["model"] == summary["condition"] == ("wrapped" if wrapped else "cumulative")
        assert row["clean_margin"] == summary["clean"]["logit_diff"]
        assert bool(row["task_learned"]) is summary["clean"]["task_learned"]
        table = pd.read_parquet(results / "effects.parquet").query(
            "metric == 'logit_diff' and positions == 'all' and scope == 'all' and kind == 'mask_renormalise'"
        )
        cells = table.set_index(["sublayer", "family"])
        effects[condition, seed] = -cells["effect"]
        for sublayer in ("self_attn", "mlp"):
            for family in FAMILIES:
                cell = cells.loc[(sublayer, family)]
                expected = {"mass": cell["mass"], "harm": -cell["effect"], "strength": cell["strength"]}
                for what, value in expected.items():
                    np.testing.assert_equal(row[f"{what}/{sublayer}/{family}"], value)
        strong = cells["strength"].dropna()
        np.testing.assert_equal(row["largest_strength"], strong.max() if len(strong) else np.nan)

    seeds = pd.read_parquet(directory / "study_seeds.parquet").set_index(["condition", "quantity"])
    for condition in ("cumulative", "vanilla"):
        a, b = (effects[condition, seed]["mlp", "current"] for seed in (0, 1))
        row = seeds.loc[(condition, "harm/mlp/current")]
        assert (row["n_seeds"], row["median"]) == (2, pytest.approx((a + b) / 2))
        assert (row["smallest"], row["largest"]) == (min(a, b), max(a, b))
        # t of one degree of freedom: 12.706 standard errors, of half the difference each
        assert row["ci_high"] - row["mean"] == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
        p_values = seeds.loc[condition]["p_value"].dropna().sort_values()
        assert set(p_values.index) <= {f"harm/{s}/{f}" for s in ("self_attn", "mlp") for f in FAMILIES}
        smallest = seeds.loc[(condition, p_values.index[0])]
        assert smallest["p_adjusted"] == pytest.approx(min(1, len(p_values) * p_values.iloc[0]))  # Holm's first


def test_the_first_solved_step_is_of_the_model_that_was_validated(tmp_path, whole):
    """`metrics.csv` counts batches from 0: the row of step 3 is of the model after 4 steps."""
    file, directory, _ = whole
    run = next(load_study(file).runs(directory))
    metrics = pd.read_csv(run.directory / "metrics.csv")
    metrics["val/accuracy"] = metrics["step"].map({1: 0.98, 3: 0.99, 5: 0.985})
    solved = tmp_path / "solved" / run.name
    (solved / "hf").mkdir(parents=True)
    (solved / "hf/attnres_run.json").write_text('{"step": 6}')
    metrics.to_csv(solved / "metrics.csv", index=False)
    row = runs_table([next(load_study(file).runs(tmp_path / "solved"))], {run.name: "unfinished"}).iloc[0]
    assert (row["first_solved_step"], row["validation_accuracy"]) == (4, 0.985)
    assert pd.isna(row["clean_margin"])


def test_runs_that_never_validate_have_a_table(processes, tmp_path):
    options = ["trainer.val_check_interval=100", "trainer.max_steps=2", "probe.enabled=false"]
    file = write_study(tmp_path, base=[*STUDY["base"], *options], seeds=[0], probe=None)
    code, log = study(processes, file, tmp_path / "runs")
    assert code == 0, log
    rows = pd.read_parquet(tmp_path / "runs/study.parquet")
    assert rows["status"].tolist() == ["finished"] * 2
    assert rows["step"].tolist() == [2, 2]
    assert rows[["validation_accuracy", "first_solved_step", "clean_margin"]].isna().all(axis=None)


DAMAGE = {
    "cumulative-seed1/probe/final/effects.parquet": "size is 0 bytes",
    "vanilla-seed0-wrapped/probe/summary.json": "it lacks run, condition",
    "vanilla-seed1/metrics.csv": "metrics.csv is not a readable table",
}


def test_a_damaged_run_is_a_row_that_says_so(whole, tmp_path, capsys):
    file, directory = whole[0], shutil.copytree(whole[1], tmp_path / "runs")
    for path in DAMAGE:
        (directory / path).write_text('{"wraps": {}}' if path.endswith("json") else "")
        (directory / path).with_name("manifest.json").unlink()  # as an older run: else its digests tell
    assert train.cli.main(["study", "--config", str(file), "--dir", str(directory), "--table"]) == 0
    printed = capsys.readouterr().out
    statuses = pd.read_parquet(directory / "study.parquet").set_index("run")["status"]
    for path, reason in DAMAGE.items():
        found = statuses[path.split("/")[0].removesuffix("-wrapped")]
        assert re.match(f"damaged: .*{reason}", found)
        assert found in printed
    assert statuses.eq("finished").sum() == 1


def test_the_commands_are_those_of_a_person(tmp_path, capsys):
    file, directory = write_study(tmp_path), tmp_path / "runs"
    (directory / "vanilla-seed1").mkdir(parents=True)
    (directory / "vanilla-seed1/config.yaml").touch()
    arguments = ["study", "--config", str(file), "--dir", str(directory), "--dry_run", "--seed", "1"]
    assert train.cli.main(arguments) == 0
    base = f"attnres-train fit --config {tmp_path}/size.yaml --data.curriculum.kind=off"
    probe_options = shlex.join(shlex.split(STUDY["probe"]))  # brackets are quoted, as a shell needs it
    place = f"--seed_everything 1 --run_dir {directory}"
    assert capsys.readouterr().out.splitlines() == [
        f"{base} --model.attnres_source=cumulative {place}/cumulative-seed1",
        f"attnres-probe run {directory}/cumulative-seed1 --output {directory}/cumulative-seed1/probe/final "
        + probe_options,
        f"{base} --config {tmp_path}/vanilla.yaml {place}/vanilla-seed1 --ckpt_path last",
        f"attnres-probe baseline {directory}/vanilla-seed1 --output {directory}/vanilla-seed1-wrapped --num_blocks 2 "
        + probe_options,
    ]
    assert [path.name for path in directory.iterdir()] == ["vanilla-seed1"]


CHANGES = {
    "a seed is gone": ({"seeds": [1, 2]}, [], ["the seed 0, which is gone"]),
    "a condition is gone": ({"conditions": {"x": []}}, [], ["the condition cumulative, which is gone"]),
    "an option": ({}, ["trainer.max_steps=7"], ["conditions.cumulative.trainer.max_steps (6, now 7)"]),
    "the probe": ({"probe": None}, [], ["another probe (", "now null"]),
}


@pytest.mark.parametrize(("change", "options", "words"), CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_study_is_refused(change, options, words, whole, tmp_path, capsys):
    _, directory, _ = whole
    before = (directory / "study.json").read_text()
    file = write_study(tmp_path, **{"base": [*STUDY["base"], *options], **change})
    message = refused(capsys, "study", "--config", str(file), "--dir", str(directory))
    for word in [str(directory), *words]:
        assert word in message
    assert (directory / "study.json").read_text() == before


BAD_STUDIES = {
    "no list of seeds": ({"seeds": 3}, ["seeds", "integers", "got 3"]),
    "a negative seed": ({"seeds": [0, -1]}, ["seeds", "different", "from 0"]),
    "no conditions": ({"conditions": {}}, ["conditions", "at least one"]),
    "a condition no folder can have": ({"conditions": {"a/b": []}}, ["conditions.a/b", "letters"]),
    "an option of the study": ({"base": ["run_dir=x"]}, ["base", "run_dir", "the study does"]),
    "an unknown option": ({"conditions": {"a": ["model.hiden_size=3"]}}, ["conditions.a", "model.hidden_size"]),
    "a missing file": ({"base": ["nothing.yaml"]}, ["conditions.cumulative", "nothing.yaml"]),
    "no list of options": ({"base": "size.yaml"}, ["base", "list"]),
    "an unknown key": ({"seed": [1]}, ["seed ", "seeds"]),
    "an unknown option of the probe": ({"probe": "--familys embedding"}, ["probe", "did you mean families?"]),
    "an unknown kind": ({"probe": "--kinds [mask]"}, ["probe", "mask_renormalise"]),
    "the probe's output": ({"probe": "--output x"}, ["probe", "--output"]),
    "an open quotation": ({"probe": "--kinds 'mask"}, ["probe", "quotation"]),
    "help on the probe": ({"probe": "--help"}, ["probe", "--help is no option"]),
    "options of the probe as a list": ({"probe": ["--kinds"]}, ["probe", "command line"]),
}


@pytest.mark.parametrize(("change", "words"), BAD_STUDIES.values(), ids=BAD_STUDIES.keys())
def test_a_bad_study_is_refused_before_it_begins(change, words, tmp_path, capsys):
    file = write_study(tmp_path, **change)
    message = refused(capsys, "study", "--config", str(file), "--dir", str(tmp_path / "runs"))
    for word in [str(file), *words]:
        assert word in message
    assert not (tmp_path / "runs").exists()


def test_bad_arguments_are_refused(tmp_path, capsys):
    config, directory = ["--config", str(write_study(tmp_path))], tmp_path / "runs"
    place = ["--dir", str(directory)]
    for arguments, words in (
        (config, "--dir is required"),
        ([*config, *place, "--condition", "frozen"], "has cumulative, vanilla"),
        ([*config, *place, "--seed", "7"], "--seed 7"),
        ([*config, *place, "--dry_runs"], "did you mean dry_run?"),
        ([*config, "--dir", str(tmp_path)], "is not empty and holds no study"),
        (["--config", str(tmp_path / "nothing.yaml"), *place], "cannot be read"),
    ):
        assert words in refused(capsys, "study", *arguments)
    directory.mkdir()
    (directory / "study.json").write_text("{}")
    for options in ([], ["--table"]):
        assert "is not a study's: it lacks seeds" in refused(capsys, "study", *config, *place, *options)


def test_runs_that_were_copied_together_have_a_table(whole, tmp_path, capsys):
    file, directory, printed = whole
    together = tmp_path / "together"
    arguments = ["--config", str(file), "--dir", str(together), "--table"]
    assert "is no folder" in refused(capsys, "study", *arguments)
    assert not together.exists()
    for run in directory.glob("*-seed*"):
        shutil.copytree(run, together / run.name)
    assert train.cli.main(["study", *arguments]) == 0
    assert tables_of(capsys.readouterr().out) == tables_of(printed)
    assert not (together / "study.json").exists()
    shutil.copy(directory / "study.json", together)
    other = str(write_study(tmp_path / "other", seeds=[1]))
    assert "the seed 0, which is gone" in refused(capsys, "study", "--config", other, *arguments[2:])


def hold(file: Path, directory: Path, fifo: Path) -> None:
    """A study whose only command reads from a pipe."""
    run = next(load_study(file).runs(directory))
    study_runs.all_commands = lambda _: [["cat", str(fifo)]]
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (as long as the process lives)
    try:
        with raising_signals():
            study_cli._run_all([run])
    except Stopped as stopped:
        sys.exit(128 + stopped.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_run_is_worked_on_twice(number, processes, tmp_path):
    """A run is free when its command has ended: at once if the study is told to end, later if it is killed."""
    file, directory, fifo = write_study(tmp_path), tmp_path / "runs", tmp_path / "fifo"
    directory.mkdir()
    os.mkfifo(fifo)
    process = processes.Process(target=hold, args=(file, directory, fifo))
    process.start()
    run = next(load_study(file).runs(directory))
    with opened(fifo):  # the command has begun
        assert study_runs.run_all(run, "second") == study_runs.BUSY
        os.kill(process.pid, number)
        process.join()
        if number == signal.SIGTERM:
            assert process.exitcode == 128 + signal.SIGTERM
            assert is_free(run)
        else:
            assert study_runs.run_all(run, "second") == study_runs.BUSY
    assert any(is_free(run) or time.sleep(0.02) for _ in range(250))


def test_a_command_that_is_just_starting_is_stopped_too(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def _execute_child(self, *args):
            super()._execute_child(*args)
            started.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with (tmp_path / "lock").open("w") as lock, pytest.raises(Stopped), raising_signals():
            study_runs._execute(["sleep", "60"], lock)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def opened(fifo: Path) -> IO[bytes]:
    """The end of a pipe that is written to, once the other end is read from."""
    for _ in range(1500):
        with contextlib.suppress(OSError):
            return os.fdopen(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
        time.sleep(0.02)
    raise TimeoutError("nothing reads from the pipe")


def is_free(run) -> bool:
    with (run.directory.parent / "locks" / run.name).open() as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False
