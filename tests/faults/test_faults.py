"""A fault of every kind, and that what it must not do is seen: nothing lost, altered, silent or left over.

The long run: `make test-faults`, docs/faults.md.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

from attnres.files import MANIFEST
from tests.faults import pairs, trial
from tests.faults.kinds import KINDS
from tests.faults.suite import outcomes, table, tally
from tests.faults.trial import Bench, Fault

QUICK = ("run", "export")
OF_TRAINING = ("W&B", "a worker")
"""Kinds that only training has."""
NEEDS_ROOT = "a small file system"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults") / "bench")
    yield bench
    bench.close()


@pytest.mark.parametrize("name", [name for name in KINDS if name not in (*OF_TRAINING, NEEDS_ROOT)])
def test_a_fault_of_each_kind_does_no_harm(bench, name):
    found = list(outcomes(bench, name, seed=1, count=1, commands=QUICK))
    assert found
    assert [wrong for outcome in found for wrong in outcome.wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name != NEEDS_ROOT])
def test_a_fault_of_each_kind_in_every_command_does_no_harm(bench, name):
    found = list(outcomes(bench, name, seed=2, count=1))
    assert found
    assert [wrong for outcome in found for wrong in outcome.wrong] == []


@pytest.mark.parametrize(("a", "b"), [("run", "run"), ("export", "run"), ("trail", "trail")])
def test_two_commands_at_once_do_no_harm(bench, a, b):
    outcome = pairs.carry_out(bench, a, b)
    assert outcome.wrong == ()
    assert outcome.status == (2 if a == b else 0)
    if a == b:
        assert "another process" in outcome.line or "exist" in outcome.line


def test_two_reports_at_once_do_no_harm(bench):
    """The first may have ended before the second writes."""
    outcome = pairs.carry_out(bench, "report", "report")
    assert outcome.wrong == ()
    assert outcome.status in (0, 2)


def test_what_is_wrong_with_a_pair_is_counted(bench, monkeypatch):
    status = bench.nursery.status
    with monkeypatch.context() as patch:
        patch.setattr(bench.nursery, "status", lambda pid, seconds: 74 if status(pid, seconds) is not None else None)
        patch.setattr(bench, "go_on", lambda *_: [])
        outcome = pairs.carry_out(bench, "export", "export")
    assert tally([outcome])[pairs.KIND]["status"] == 2


# What the judgement is worth: commands that do what they must not.


def alter_a_table(folder: Path) -> str:
    """A number, and nothing that knows what it was."""
    path = folder / "probed" / "effects.parquet"
    effects = pd.read_parquet(path)
    effects.loc[:, "mass"] *= 2
    effects.to_parquet(path)
    (folder / "probed" / MANIFEST).unlink()
    return str(path.relative_to(folder))


def leave_a_process() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)


def remove(name: str) -> None:
    Path(name).unlink()


def test_the_judgement_sees_an_altered_number_that_is_taken(bench):
    fault = Fault("altered", "report", "a number", frozenset({2}), damage=alter_a_table)
    outcome = bench.carry_out(fault)
    assert outcome.status == 0
    assert any(wrong.startswith("altered: ") and "claims.json" in wrong for wrong in outcome.wrong)


def test_the_judgement_sees_a_process_that_is_left(bench, monkeypatch):
    monkeypatch.setattr(trial, "GRACE", 0.2)
    fault = Fault("left", "export", "a process", frozenset({74}), injections=[leave_a_process], free=None)
    outcome = bench.carry_out(Fault(**{**vars(fault), "damage": lambda folder: "run/config.yaml"}))
    assert any(wrong.startswith("leftover: processes") for wrong in outcome.wrong)
    assert not bench.leftover(10.0)  # it was killed


def test_the_judgement_sees_lost_files_and_wrong_ends(bench):
    lost = Fault("lost", "run", "a file", frozenset({2}), injections=[partial(remove, "run/hf/model.safetensors")])
    outcome = bench.carry_out(lost)
    assert {wrong.split(":")[0] for wrong in outcome.wrong} >= {"lost"}
    assert any("run/hf/model.safetensors" in wrong for wrong in outcome.wrong)
    ended = bench.carry_out(Fault("status", "compare", "a bug", frozenset({74}), injections=[partial(sys.exit, 3)]))
    assert {wrong.split(":")[0] for wrong in ended.wrong} == {"status", "silent"}


def test_counts_are_of_kinds(bench):
    fault = Fault("b", "run", "x", frozenset(), is_outside=True)
    found = [trial.Outcome(fault, 74, "", ()), trial.Outcome(fault, -9, "", ("lost: y", "altered: z"))]
    counts = tally(found)
    assert {key: counts["b"][key] for key in ("faults", "from outside", "lost", "altered", "silent")} == {
        "faults": 2,
        "from outside": 2,
        "lost": 1,
        "altered": 1,
        "silent": 0,
    }
    assert counts["b"]["statuses"] == {"74": 1, "-9": 1}
    assert table(counts).splitlines()[-1].split() == ["all", "2", "2", "1", "1", "0", "0", "0", "0"]
