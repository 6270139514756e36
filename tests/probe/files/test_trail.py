"""The trail on disk: what is whole is read, what is not is not; pruned, exported, held by one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnres.files import MANIFEST
from attnres.tasks import MQAR
from probe.files.checkpoints import load_model
from probe.files.layout import RUN_FILE, TASK_FILE
from probe.files.trail import WEIGHTS, Trail, step_size
from probe.settings import TrailSettings

TASK = MQAR(num_pairs=4, vocab_size=40)


@pytest.fixture
def trail(tmp_path, make_model) -> Trail:
    """Of steps 0, 2 and 4, whose embeddings hold the step."""
    made = Trail(tmp_path / "run")
    made.start(0, TASK.to_dict(), {"condition": "frozen", "seed": 3})
    for step in (0, 2, 4):
        model = make_model()
        torch.nn.init.constant_(model.model.embed_tokens.weight, step)
        made.write(step, model, model.state_dict())
    return made


def tokens_of(model) -> set[float]:
    return set(model.model.embed_tokens.weight.unique().tolist())


def test_steps_come_back(trail, make_model):
    assert trail.steps == [0, 2, 4]
    found = trail.load(2)
    assert tokens_of(found.model) == {2.0}
    assert (found.task, found.run, found.condition, found.seed, found.step) == (TASK, "run", "frozen", 3, 2)
    size = (trail.folder_of(2) / WEIGHTS).stat().st_size
    assert 0 < size - step_size(make_model()) < 20_000


def test_a_step_without_its_weights_is_not_there(trail):
    weights = trail.folder_of(2) / WEIGHTS
    weights.rename(weights.with_name(f"{WEIGHTS}.part"))
    assert trail.steps == [0, 4]
    with pytest.raises(ValueError, match=r"step 2 is not in .*trail: the nearest are 0, 4"):
        trail.load(2)


def test_a_torn_step_is_an_error_of_one_line(trail):
    weights = trail.folder_of(2) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"step_2/{WEIGHTS} is not what was written"):
        trail.load(2)
    (trail.folder_of(2) / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"step_2: its weights cannot be read"):
        trail.load(2)


def test_going_on_from_a_step_forgets_what_came_after(trail):
    trail.finish(4)
    assert trail.last_step == 4
    trail.start(2, TASK.to_dict(), {"condition": "frozen", "seed": 3})
    assert trail.steps == [0, 2]
    assert trail.last_step is None


def test_pruning_keeps_what_it_is_told_and_goes_on_where_it_was_killed(trail, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("probe.files.trail.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trail.prune({4})
    assert trail.steps == [2, 4]  # the weights of step 0 are gone, its folder is not
    assert trail.prune({4}) == [0, 2]
    assert trail.steps == [4]
    assert {path.name for path in trail.folder.iterdir()} == {"step_4", TASK_FILE, RUN_FILE, MANIFEST}
    assert tokens_of(trail.load(4).model) == {4.0}


def test_an_exported_step_is_a_model_with_its_task(trail, tmp_path):
    trail.export(2, tmp_path / "exported")
    found = load_model(str(tmp_path / "exported"))
    assert tokens_of(found.model) == {2.0}
    assert (found.task, found.condition, found.seed, found.step) == (TASK, "frozen", 3, 2)
    assert json.loads((tmp_path / "exported/attnres_run.json").read_text()) == {
        "condition": "frozen",
        "seed": 3,
        "step": 2,
    }
    with pytest.raises(ValueError, match="exists: choose another folder"):
        trail.export(4, tmp_path / "exported")
    with pytest.raises(ValueError, match="step 3 is not in"):
        trail.export(3, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="there is no trail"):
        Trail(tmp_path).export(3, tmp_path / "other")


def test_one_process_holds_it(trail):
    message, other = "another process probes or prunes", Trail(trail.folder.parent)
    with trail.held(), pytest.raises(ValueError, match=message), other.held():
        pass
    with trail.held():
        pass


def test_what_was_written_is_durable_after_a_sync(trail, monkeypatch, make_model):
    """Training goes on meanwhile; what has been removed since is no error."""
    trail.sync()
    names: dict[int, str] = {}
    synced: list[str] = []
    may_begin, opens, syncs = Event(), os.open, os.fsync

    def open_(path, flags, *args, **kwargs):
        descriptor = opens(path, flags, *args, **kwargs)
        names[descriptor] = Path(path).name
        return descriptor

    def sync(descriptor):
        may_begin.wait()
        syncs(descriptor)
        synced.append(names[descriptor])

    monkeypatch.setattr("probe.files.trail.os.open", open_)
    monkeypatch.setattr("probe.files.trail.os.fsync", sync)
    model = make_model()
    for step in (6, 8):
        trail.write(step, model, model.state_dict())
    assert trail.steps == [0, 2, 4, 6, 8]
    assert synced == []
    may_begin.set()
    trail.sync()
    assert sorted(synced) == sorted(["trail", "config.json", "manifest.json", WEIGHTS] * 2 + ["step_6", "step_8"])
    trail.write(10, model, model.state_dict())
    trail.remove([10])
    trail.sync()


def test_what_cannot_be_made_durable_is_an_error(trail, monkeypatch, make_model):
    trail.sync()
    model = make_model()

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("probe.files.trail.os.fsync", fail)
    trail.write(6, model, model.state_dict())
    with pytest.raises(OSError, match="Input/output"):
        trail.sync()


@given(every=st.integers(0, 30), until=st.none() | st.integers(0, 70), max_steps=st.integers(1, 60))
def test_the_list_of_steps_is_that_of_the_steps_that_are_named(every, until, max_steps):
    settings = TrailSettings(every, until)
    assert settings.steps(max_steps) == [step for step in range(max_steps + 1) if settings.names(step, max_steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (TrailSettings(), []),
        (TrailSettings(4), [0, 4, 8, 10]),
        (TrailSettings(5), [0, 5, 10]),
        (TrailSettings(2, 5), [0, 2, 4, 10]),
        (TrailSettings(20), [0, 10]),
    ],
)
def test_steps(settings, expected):
    assert settings.steps(10) == expected
